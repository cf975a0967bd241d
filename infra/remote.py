"""Add a default DVC remote in S3 to this clone: `make remote BUCKET=bucket/prefix [ENDPOINT=url]`.

Written to .dvc/config.local, which git ignores. Credentials and region come from where AWS tools look for them:
AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION, ~/.aws; none is written anywhere. The
bucket is asked first, so that a wrong name or endpoint is one line now and not a trace during a push.
"""

import os
import sys
from pathlib import Path

from clear.data import aws
from clear.data.ports import spare_loopback
from clear.errors import ClearError, fail, say

NAME = "storage"


def add(root: Path, bucket: str, endpoint: str = "") -> str:
    """Set the remote of the project in `root`; returns its url. `bucket` may carry a prefix and a leading s3://.

    Raises ClearError where there is no DVC project, no bucket is named, or the bucket cannot be used.
    """
    from dvc.config import Config

    if not (root / ".dvc" / "config").exists():
        raise ClearError(f"{root}: no DVC project here; run this from the project's folder.")
    place = bucket.removeprefix("s3://").strip("/")
    if not place:
        raise ClearError("no bucket is named: make remote BUCKET=bucket/prefix [ENDPOINT=url].")
    check(place.partition("/")[0], endpoint)
    with Config(str(root / ".dvc")).edit("local") as own:
        own["remote"][NAME] = {"url": f"s3://{place}"}
        own["core"]["remote"] = NAME
        if endpoint:
            own["remote"][NAME]["endpointurl"] = endpoint
        if profile := os.environ.get("AWS_PROFILE"):
            own["remote"][NAME]["profile"] = profile
    return f"s3://{place}"


def check(bucket: str, endpoint: str) -> None:
    """Ask the store for the bucket. Raises ClearError saying whether address, credentials, rights or name are wrong."""
    where = f"s3://{bucket} at {endpoint or 'AWS'}"
    store = aws.client(endpoint=endpoint, patient=False, settings="ENDPOINT, AWS_PROFILE or AWS_DEFAULT_REGION")
    with aws.explained(where, endpoint="ENDPOINT", remedy="check BUCKET, ENDPOINT and the credentials"):
        store.list_objects_v2(Bucket=bucket, MaxKeys=1)  # says why it refuses; head_bucket has a bare status only


def main(arguments: list[str]) -> int:
    """Add the remote to the working directory's project; 0 done, 1 refused with one line."""
    bucket, endpoint = [*arguments, "", ""][:2]
    spare_loopback()
    try:
        url = add(Path.cwd(), bucket, endpoint)
    except ClearError as error:
        return fail(error)
    say(f"default DVC remote: {url}{f' at {endpoint}' if endpoint else ''} (in .dvc/config.local)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
