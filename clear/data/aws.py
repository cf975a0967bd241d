"""Clients of S3 and of other AWS services, and what they refuse as one line with place, reason and remedy.

Credentials, region and endpoint come from where AWS tools look for them: AWS_PROFILE, AWS_ACCESS_KEY_ID and its secret,
AWS_DEFAULT_REGION, AWS_ENDPOINT_URL, ~/.aws. A caller that has settings of its own for them names these instead.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clear.errors import ClearError

_REMEDIES = {
    "check the bucket's name and {endpoint}": ("NoSuchBucket", "InvalidBucketName"),
    "these credentials lack that right; ask for it, or set AWS_PROFILE to others": (
        "AccessDenied",
        "AccessDeniedException",
        "UnauthorizedOperation",
    ),
    "check AWS_ACCESS_KEY_ID and {endpoint}": ("InvalidAccessKeyId", "UnrecognizedClientException"),
    "the secret is not the access key's; check AWS_SECRET_ACCESS_KEY": (
        "SignatureDoesNotMatch",
        "InvalidSignatureException",
    ),
    "log in again": ("ExpiredToken", "ExpiredTokenException", "InvalidToken"),
    # The answer to a HEAD, with which every download begins, has no body that could say more.
    "S3 does not say why; log in again, or check rights and AWS_DEFAULT_REGION of these credentials": ("400", "403"),
    "the bucket is in another region; set AWS_DEFAULT_REGION": ("PermanentRedirect", "AuthorizationHeaderMalformed"),
    "the object changed while it was read; {again}": ("PreconditionFailed",),
    "this machine's clock is wrong; set it (`timedatectl set-ntp true`)": ("RequestTimeTooSkewed",),
}
_PASSING = (
    *("Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled", "RequestThrottledException"),
    *("TooManyRequestsException", "RequestLimitExceeded", "RequestTimeout", "RequestTimeoutException"),
)
"""Codes of an answer that another time is another one, with a status below 500."""
_MOST_RETRIES = 5
_PATIENT, _QUICK = (10.0, 60.0), (5.0, 10.0)  # seconds for a connection, and for data
_PAUSE = 0.5  # seconds before a broken body is asked for again, doubled each time
_LONGEST_PAUSE = 20.0


class Unreachable(ClearError):
    """The service did not answer, or broke off; that may pass."""


def client(
    service: str = "s3",
    *,
    region: str = "",
    endpoint: str = "",
    profile: str | None = None,
    patient: bool = True,
    settings: str = "AWS_PROFILE, AWS_DEFAULT_REGION or AWS_ENDPOINT_URL",
) -> Any:
    """A boto3 client; what is empty comes from the AWS environment. Nothing is sent yet.

    A patient one waits 10 s for a connection and 60 s for data, and asks six times (or as AWS_MAX_ATTEMPTS says); else
    5 s, 10 s and twice, for a person who waits. Raises ClearError that points at `settings` where none can be made.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    retries: dict[str, Any] = {"mode": "standard"}
    if not patient:
        retries["max_attempts"] = 1
    elif "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["max_attempts"] = _MOST_RETRIES
    connect, read = _PATIENT if patient else _QUICK
    config = Config(retries=retries, connect_timeout=connect, read_timeout=read)
    try:
        # A session of its own: boto3's default one would keep the first credentials it saw.
        session = boto3.session.Session(profile_name=profile)
        return session.client(service, region_name=region or None, endpoint_url=endpoint or None, config=config)
    except (BotoCoreError, ValueError) as error:
        raise ClearError(f"AWS {service} cannot be used: {_sentence(error)}; correct {settings}.") from error


@contextmanager
def explained(
    place: str, *, endpoint: str = "AWS_ENDPOINT_URL", again: str = "repeat the command", remedy: str = ""
) -> Iterator[None]:
    """Turn what boto3 raises inside into one line about `place`, such as s3://bucket/key.

    Unreachable for a network or a service that fails, else ClearError. The remedy follows from the error's code, else
    it is `remedy`; `endpoint` names the setting that has the service's address, `again` how to go on after an outage.
    The error of boto3 is the cause of what is raised.
    """
    from boto3.exceptions import Boto3Error, RetriesExceededError
    from botocore import exceptions

    def refused(error: Any) -> ClearError:
        answer, status = error.response.get("Error", {}), error.response.get("ResponseMetadata", {})
        code, said = answer.get("Code", "?"), _sentence(answer.get("Message") or "")
        reason = f"{place}: {code}: {said}" if said else f"{place}: {code}"
        if status.get("HTTPStatusCode", 400) >= 500 or status.get("HTTPStatusCode") == 429 or code in _PASSING:
            return Unreachable(f"{reason}; {again}.")
        known = next((text for text, codes in _REMEDIES.items() if code in codes), remedy)
        return ClearError(f"{reason}; {known.format(endpoint=endpoint, again=again)}." if known else f"{reason}.")

    def lost(error: Exception) -> Unreachable:
        return Unreachable(f"{place}: no answer ({_sentence(error)}); check the network and {endpoint}, then {again}.")

    try:
        yield
    except exceptions.ClientError as error:
        raise refused(error) from error
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise ClearError(
            f"{place}: no complete AWS credentials ({_sentence(error)}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
        ) from error
    except (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError) as error:
        raise lost(error) from error
    except exceptions.FlexibleChecksumError as error:
        raise Unreachable(f"{place}: what arrived is not what was stored ({_sentence(error)}); {again}.") from error
    except (RetriesExceededError, ConnectionError, TimeoutError) as error:  # the latter two of a socket
        raise lost(error) from error
    except Boto3Error as error:  # a failed upload, which does not say why but in what it was raised from
        cause = error.__context__
        raise (refused(cause) if isinstance(cause, exceptions.ClientError) else lost(error)) from cause or error
    except exceptions.BotoCoreError as error:
        raise ClearError(f"{place}: {_sentence(error)}; {remedy or 'check the AWS settings'}.") from error


def listed(client: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """Every object of a bucket whose key begins with `prefix`, as S3 lists it: Key, Size, ETag, LastModified.

    boto3 takes an answer without content, of a connection that was cut or of a proxy, for a list of nothing, which
    would delete mirrors and end jobs; this asks again, and raises boto3's error of a lost connection.
    """
    wanted = {"Bucket": bucket, "Prefix": prefix}
    while True:
        page = _page(client, wanted)
        yield from page.get("Contents", [])
        if not page["IsTruncated"]:
            return
        wanted["ContinuationToken"] = page["NextContinuationToken"]


def _page(client: Any, wanted: dict[str, str]) -> dict[str, Any]:
    from botocore.exceptions import ResponseStreamingError

    for pause in _pauses(client):
        page = client.list_objects_v2(**wanted)
        if "IsTruncated" in page:  # which every list of S3 says
            return page
        time.sleep(pause)
    raise ResponseStreamingError(error="an answer without a list")


def _pauses(client: Any) -> Iterator[float]:
    """Seconds to wait after each attempt of as many as the client makes of a request; 0 after the last."""
    attempts = (client.meta.config.retries or {}).get("total_max_attempts", 1 + _MOST_RETRIES)
    return (min(_PAUSE * 2**n, _LONGEST_PAUSE) if n + 1 < attempts else 0.0 for n in range(attempts))


def opened(
    client: Any, bucket: str, key: str, start: int = 0, etag: str = "", size: int = 2**20
) -> tuple[dict[str, Any], Iterator[bytes]]:
    """S3's answer about an object, and its content from byte `start` on in chunks of at most `size` bytes.

    boto3 repeats a request until its answer begins; where a connection breaks after that, this asks for the rest of the
    same version, as often and with pauses that double. `etag` is the version that is wanted, "" the present one. Raises
    what boto3 raises; PreconditionFailed is the code for an object that has changed.
    """

    def ask(place: int, version: str) -> dict[str, Any]:
        wanted = ({"Range": f"bytes={place}-"} if place else {}) | ({"IfMatch": version} if version else {})
        return client.get_object(Bucket=bucket, Key=key, **wanted)

    def chunks(answer: dict[str, Any]) -> Iterator[bytes]:
        from botocore import exceptions

        place, end, pauses = start, start + answer["ContentLength"], _pauses(client)
        while place < end:
            try:
                for chunk in answer["Body"].iter_chunks(size):
                    place, pauses = place + len(chunk), _pauses(client)
                    yield chunk
                return
            except (exceptions.HTTPClientError, exceptions.IncompleteReadError):
                if not (pause := next(pauses)):
                    raise
            time.sleep(pause)
            answer = ask(place, version)

    answer = ask(start, etag)
    version = answer["ETag"]
    return answer, chunks(answer)


def save(client: Any, bucket: str, key: str, file: Path) -> None:
    """Write the content of an object to a file, as `opened` reads it. Unlike boto3's downloads it asks for no header
    first, whose refusal has no code: of credentials that have expired S3 says there no more than 400."""
    with file.open("wb") as written:
        for chunk in opened(client, bucket, key)[1]:
            written.write(chunk)


def content(client: Any, bucket: str, key: str, start: int = 0) -> bytes:
    """The content of an object from byte `start` on, as `opened` reads it."""
    return b"".join(opened(client, bucket, key, start)[1])


def _sentence(said: object) -> str:
    """A message of another program on one line and without its full stop."""
    return " ".join(str(said).split()).rstrip(".")
