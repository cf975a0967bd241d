"""The suites of named checks for datasets of samples: clean, degraded, and naturally degraded images."""

from clear.data.records import CLEAN, INCOMING
from clear.degradation.corruptions import CORRUPTIONS
from clear.degradation.protocol import SEVERITIES
from clear.validation.expectations import Check

ANSWER_SHARE = 0.7
"""No answer may hold a larger share of the questions of its task."""

_BALANCED = Check("answers_balanced", "answer_share", "no answer dominates its task", high=ANSWER_SHARE)

LEAST_LIKENESS = 0.15
"""Between a picture and its clean partner: the sixteen corruptions at high leave 0.2 and more, other pictures mostly
less."""


def clean_checks(duplicate_limit: int | None = None) -> list[Check]:
    """Rules for clean samples; with `duplicate_limit`, also for images shared with training."""
    return [
        *_common(duplicate_limit),
        _BALANCED,
        Check("labelled_clean", "corruption", "the sample is labelled clean", allowed=(CLEAN,)),
    ]


def degraded_checks(
    copies: int, alpha: float, psnr_slack: float, duplicate_limit: int | None = None, further: tuple[str, ...] = ()
) -> list[Check]:
    """Rules for degraded samples, of which every image has `copies`; `further` are types beyond the sixteen."""
    known = (*CORRUPTIONS, *further)
    return [
        *_common(duplicate_limit),
        _BALANCED,
        Check(
            "corruption_known", "corruption", "the corruption is one of the sixteen or named in params", allowed=known
        ),
        Check("severity_known", "severity", "the severity is low, mid or high", allowed=tuple(SEVERITIES)),
        Check("copies", "copies", f"every image has {copies} degraded copies", allowed=(copies,)),
        Check("as_labelled", "as_labelled", "intensity and seed belong to id, corruption, severity", allowed=(True,)),
        Check("same_size", "same_size", "the degraded image has the size of the clean one", allowed=(True,)),
        Check("changed", "difference", "the degraded image is not the clean one", low=0, strict=True),
        Check("psnr_band", "psnr_outside", "PSNR lies in the band of its cell", low=0, high=psnr_slack),
        Check("mean_psnr_band", "mean_psnr_outside", "mean PSNR of the cell lies in its band", low=0, high=psnr_slack),
        Check("severity_histogram", "severity_p", "severities follow the protocol", low=alpha, whole=True),
        Check("corruption_histogram", "corruption_p", "corruptions follow the protocol", low=alpha, whole=True),
    ]


MONOTONE = Check("monotone", "monotone", "mean PSNR and SSIM of the type fall from low to high", allowed=(True,))
"""Rule for a benchmark with every image at all levels."""


def incoming_checks(duplicate_limit: int) -> list[Check]:
    """Rules for the samples of a set of naturally degraded images, over all its slices; those for the set as a whole
    are in clear/validation/accept.py."""
    return [
        *_common(duplicate_limit),
        Check("labelled_incoming", "severity", "the severity is incoming", allowed=(INCOMING,)),
        Check("same_size", "same_size", "the degraded image has the size of the clean one", allowed=(True,)),
        Check("changed", "difference", "the degraded image is not the clean one", low=0, strict=True),
        Check("partner", "likeness", "the clean partner shows the same scene", low=LEAST_LIKENESS),
    ]


def _common(duplicate_limit: int | None) -> list[Check]:
    checks = [
        Check("unique", "key", "no copy occurs twice"),
        Check("decodable", "decodable", "both images can be read completely", allowed=(True,)),
        Check("hash", "hash_true", "image_sha256 is the digest of the clean image", allowed=(True,)),
        Check("has_questions", "questions", "the sample has a question", low=1),
    ]
    if duplicate_limit is not None:
        text = "no image is shared with a training split, nor between benchmark and development"
        checks.append(Check("shared_images", "shared_images", text, low=0, high=duplicate_limit))
    return checks
