"""What a failed DVC command means, in one line that says what to do; DVC's own last lines where nothing fits."""

from collections.abc import Sequence

CAUSES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("NoSuchBucket", "The specified bucket does not exist"),
        "the remote's bucket does not exist; create it, or name another one with `make remote BUCKET=…`",
    ),
    (
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "Forbidden", "AccessDenied", "Access Denied", "(403)"),
        "the remote refuses these keys; check AWS_PROFILE or AWS_ACCESS_KEY_ID with its secret, and their rights",
    ),
    (
        ("Unable to locate credentials", "NoCredentialsError", "Credential error"),
        "there are no keys for the remote; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and its secret",
    ),
    (
        ("No space left on device", "[Errno 28]", "Disk quota exceeded"),
        "the disk is full; free some space (`dvc gc --workspace` removes data of other revisions) and run again",
    ),
    (
        ("QuotaExceeded", "InsufficientCapacity", "XMinioStorageFull", "(507)"),
        "the remote is full; free some space there and run again",
    ),
)
"""Words in DVC's output → what they mean."""

NOISE = ("Having any troubles?", "Is your cache up to date?", "<https://error.dvc.org")


def explain(lines: Sequence[str]) -> str:
    """The cause of a failure from a command's last lines, in one line."""
    recent = [line for line in lines[-30:] if not line.startswith(NOISE)]
    said = " | ".join(line.removeprefix("ERROR:").strip() for line in recent[-3:]) or "no output"
    errors = [line for line in recent if line.startswith("ERROR:")] + recent[-3:]
    for signs, meaning in CAUSES:
        if any(sign in line for line in errors for sign in signs):
            return f"{meaning} ({said})"
    return said
