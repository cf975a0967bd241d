"""Which card each stage of BAGEL-7B fits, for every profile and type of weights: `clear memory --cards`."""

import functools
import itertools
from dataclasses import dataclass

from clear.config import compose, from_dict
from clear.schema import PROFILES, QUANTISED, Config
from clear.training.memory import STAGES, estimate

CARDS = (12, 16, 24, 32, 48, 80, 141)
"""Sizes of cards in GB."""
CONTEXT = 2**30
"""Bytes that the CUDA context and its kernels take of a card."""
WEIGHTS = ("bfloat16", "int8", "nf4")


@dataclass(frozen=True)
class Row:
    """The peaks of one profile's stages with one type of weights, in bytes; None where it cannot be trained so.

    `offload` says whether the decoder's layers wait in host memory."""

    profile: str
    weights: str
    offload: bool
    peaks: dict[str, int | None]


def smallest(peak: int) -> int | None:
    """The smallest card, in GB, that `peak` bytes fit; None if none does.

    A card of N GB has N · 10⁹ bytes here. Consumer cards have 7 % more, those with error correction about as much.
    """
    return next((card for card in CARDS if peak + CONTEXT <= card * 10**9), None)


@functools.cache
def rows(gpus: int = 1) -> list[Row]:
    """Every profile of BAGEL-7B with every type of weights, on the device and waiting in host memory."""
    profiles = [name for name in PROFILES if name.startswith("bagel")]
    return [_row(*chosen, gpus) for chosen in itertools.product(profiles, WEIGHTS, (False, True))]


def _row(profile: str, weights: str, offload: bool, gpus: int) -> Row:
    settings = [f"profile={profile}", f"runtime.weights={weights}", "runtime.precision=bfloat16"]
    config = from_dict(compose([*settings, f"runtime.offload={str(offload).lower()}"]))
    held = (weights in QUANTISED or offload) and not config.lora.rank  # weights that nothing trains
    peaks = {
        stage: None if held and stage != "evaluate" else estimate(config, stage, gpus=gpus).peak for stage in STAGES
    }
    return Row(profile, weights, offload, peaks)


def table(found: list[Row]) -> str:
    """A Markdown table: GiB at the peak, and the smallest card in GB."""
    lines = ["| profile | weights | " + " | ".join(STAGES) + " |", "|---|---|" + "---|" * len(STAGES)]
    for row in found:
        cells = [_cell(row.peaks[stage]) for stage in STAGES]
        lines.append(f"| `{row.profile}` | {row.weights}{', offload' * row.offload} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(peak: int | None) -> str:
    if peak is None:
        return "–"
    card = smallest(peak)
    return f"{peak / 2**30:.1f} ({f'{card} GB' if card else 'none'})"


def too_small(config: Config, stage: str, memory: int, gpus: int = 1) -> str:
    """What to say before a stage is loaded on cards of `memory` bytes that are too small for it; "" if they are not.

    No refusal: the estimate is one.
    """
    needed = estimate(config, stage, gpus=gpus).peak + CONTEXT
    if needed <= memory:
        return ""
    fit = [row for row in rows() if row.peaks[stage] is not None and row.peaks[stage] + CONTEXT <= memory]
    best = "no setting of a profile would fit"
    if fit:
        row = max(fit, key=lambda row: (not row.offload, row.peaks[stage]))  # what waits is slower
        more = " and runtime.offload = true" * row.offload
        best = f"profile {row.profile} with runtime.weights = {row.weights}{more} would fit"
    return (
        f"{stage} needs {needed / 2**30:.1f} GiB by estimate, and this card has {memory / 2**30:.1f}: {best} "
        "(`clear memory --cards`)."
    )
