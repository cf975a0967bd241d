"""The degradation protocol: types, severities, sampling weights and seeds (METHOD §6).

Departure (METHOD §8 item 15): everything random follows from a hash of the sample id, the corruption, the severity
and the protocol version, never from order, worker count or a shared generator, so any copy can be made again alone.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from clear.data.records import EXTRA
from clear.degradation.corruptions import CORRUPTIONS, corrupt
from clear.errors import ClearError

PROTOCOL_VERSION = "3"
"""Part of every seed: change it whenever a formula or the order of random draws changes."""

SEVERITIES = {"low": 0.23, "mid": 0.45, "high": 0.9}
"""Intensity of each severity."""

GROUPS = {
    "capture": ("lens_blur", "lens_flare", "motion_blur", "dirty_lens", "hsv_saturation"),
    "transmission": ("jpeg", "block_exchange", "mean_shift", "scan_lines"),
    "environment": ("dark", "turbulence", "gaussian_noise", "color_diffusion"),
    "post": ("sharpness", "graffiti", "watermark_damage"),
}
"""Where in the life of a picture a corruption happens."""

TRAINING_WEIGHTS = {
    "lens_blur": 30,
    "lens_flare": 15,
    "motion_blur": 30,
    "dirty_lens": 15,
    "hsv_saturation": 10,
    "jpeg": 15,
    "block_exchange": 40,
    "mean_shift": 15,
    "scan_lines": 30,
    "dark": 40,
    "turbulence": 30,
    "gaussian_noise": 15,
    "color_diffusion": 15,
    "sharpness": 10,
    "graffiti": 45,
    "watermark_damage": 45,
}
"""Relative frequency in training; the sum is 400."""

BENCHMARK_WEIGHTS = {
    **dict.fromkeys(GROUPS["capture"], 20),
    **dict.fromkeys(GROUPS["transmission"], 25),
    **dict.fromkeys(GROUPS["environment"], 25),
    **dict.fromkeys(GROUPS["post"], 33),
    "watermark_damage": 34,
}
"""Relative frequency in the published benchmark generator; the sum is 400."""

CELLS = tuple(
    (list(CORRUPTIONS)[k % 16], list(SEVERITIES)[(k + k // 16) % 3]) for k in range(len(CORRUPTIONS) * len(SEVERITIES))
)
"""All (corruption, severity) pairs, ordered so that any few neighbours differ in both."""


def training_weights(held_out: Collection[str] = ()) -> dict[str, float]:
    """Relative frequencies in training without those of `held_out`. Raises ClearError for a name that there is not."""
    if unknown := [name for name in held_out if name not in TRAINING_WEIGHTS]:
        raise ClearError(f"degrade.held_out: '{unknown[0]}' is not one of {', '.join(TRAINING_WEIGHTS)}.")
    return {name: 0.0 if name in held_out else float(weight) for name, weight in TRAINING_WEIGHTS.items()}


def _hash(*parts: str) -> int:
    text = "|".join((*parts, PROTOCOL_VERSION)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def seed_of(sample_id: str, corruption: str, severity: str) -> int:
    """The uint64 seed of one degraded copy."""
    return _hash(sample_id, corruption, severity)


def order_of(sample_id: str) -> int:
    """A uint64 that sorts samples into a fixed random order."""
    return _hash(sample_id, "order")


def draw(sample_id: str, weights: Mapping[str, float], severity_weights: Sequence[float]) -> tuple[str, str]:
    """Draw (corruption, severity) for one sample; the same id always gives the same draw.

    `weights` maps corruptions to relative frequencies, `severity_weights` are those of low, mid and high. Raises
    ClearError if they are not usable.
    """
    for name in weights:
        if name not in CORRUPTIONS and not name.startswith(EXTRA):
            raise ClearError(f"'{name}' is not a corruption; choose one of {', '.join(CORRUPTIONS)}.")
    if len(severity_weights) != len(SEVERITIES):
        raise ClearError(f"degrade.severity_weights = {list(severity_weights)} must give low, mid and high a weight.")
    rng = np.random.default_rng(_hash(sample_id, "draw"))
    corruption = list(weights)[_pick(rng, list(weights.values()), "corruption weights")]
    return corruption, list(SEVERITIES)[_pick(rng, severity_weights, "degrade.severity_weights")]


def _pick(rng: np.random.Generator, weights: Sequence[float], name: str) -> int:
    values = np.asarray(weights, float)
    if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise ClearError(f"{name} = {list(weights)} must be non-negative with a positive sum.")
    return int(np.searchsorted(np.cumsum(values) / values.sum(), rng.random(), side="right"))


def degrade(image: np.ndarray, corruption: str, severity: str, sample_id: str, scale: float) -> np.ndarray:
    """The degraded copy of uint8 RGB (H, W, 3) that this protocol version defines for a sample.

    Raises ClearError naming the sample for an unknown corruption or severity and for an image the corruption refuses.
    """
    if severity not in SEVERITIES:
        raise ClearError(f"sample {sample_id}: '{severity}' is not a severity; choose one of {', '.join(SEVERITIES)}.")
    rng = np.random.default_rng(seed_of(sample_id, corruption, severity))
    try:
        return corrupt(corruption, image, SEVERITIES[severity], rng, scale)
    except ClearError as error:
        raise ClearError(f"sample {sample_id}: {error}") from error
