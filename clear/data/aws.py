"""Clients of S3 and of other AWS services, and what they refuse as one line with place, reason and remedy.

Credentials, region and endpoint come from where AWS tools look for them: AWS_PROFILE, AWS_ACCESS_KEY_ID and its secret,
AWS_DEFAULT_REGION, AWS_ENDPOINT_URL, ~/.aws. A caller that has settings of its own for them names these instead.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
    "the bucket is in another region; set AWS_DEFAULT_REGION": ("PermanentRedirect", "AuthorizationHeaderMalformed"),
    "the object changed while it was read; {again}": ("PreconditionFailed",),
}
_MOST_RETRIES = 5


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
    connect, read = (10, 60) if patient else (5, 10)
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
        if status.get("HTTPStatusCode", 400) >= 500:
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
    except (RetriesExceededError, ConnectionError, TimeoutError) as error:  # the latter two of a socket
        raise lost(error) from error
    except Boto3Error as error:  # a failed upload, which does not say why but in what it was raised from
        cause = error.__context__
        raise (refused(cause) if isinstance(cause, exceptions.ClientError) else lost(error)) from cause or error
    except exceptions.BotoCoreError as error:
        raise ClearError(f"{place}: {_sentence(error)}; {remedy or 'check the AWS settings'}.") from error


def listed(client: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """Every object of a bucket whose key begins with `prefix`, as S3 lists it: Key, Size, ETag, LastModified."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get("Contents", [])


def _sentence(said: object) -> str:
    """A message of another program on one line and without its full stop."""
    return " ".join(str(said).split()).rstrip(".")
