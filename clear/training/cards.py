"""Which card each stage of BAGEL-7B fits, for every profile and type of weights: `clear memory --cards`."""

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
    """The peaks of one profile's stages with one type of weights, in bytes; None where it cannot be trained so."""

    profile: str
    weights: str
    peaks: dict[str, int | None]


def smallest(peak: int) -> int | None:
    """The smallest card, in GB, that `peak` bytes fit; None if none does.

    A card of N GB has N · 10⁹ bytes here. Consumer cards have 7 % more, those with error correction about as much.
    """
    return next((card for card in CARDS if peak + CONTEXT <= card * 10**9), None)


def rows(gpus: int = 1) -> list[Row]:
    """Every profile of BAGEL-7B with every type of weights."""
    found = []
    for profile in (name for name in PROFILES if name.startswith("bagel")):
        for weights in WEIGHTS:
            settings = [f"profile={profile}", f"runtime.weights={weights}", "runtime.precision=bfloat16"]
            config = from_dict(compose(settings))
            peaks = {}
            for stage in STAGES:
                frozen = weights in QUANTISED and stage != "evaluate" and not config.lora.rank
                peaks[stage] = None if frozen else estimate(config, stage, gpus=gpus).peak
            found.append(Row(profile, weights, peaks))
    return found


def table(found: list[Row]) -> str:
    """A Markdown table: GiB at the peak, and the smallest card in GB."""
    lines = ["| profile | weights | " + " | ".join(STAGES) + " |", "|---|---|" + "---|" * len(STAGES)]
    for row in found:
        cells = [_cell(row.peaks[stage]) for stage in STAGES]
        lines.append(f"| `{row.profile}` | {row.weights} | {' | '.join(cells)} |")
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
        row = max(fit, key=lambda row: row.peaks[stage])
        best = f"profile {row.profile} with runtime.weights = {row.weights} would fit"
    return (
        f"{stage} needs {needed / 2**30:.1f} GiB by estimate, and this card has {memory / 2**30:.1f}: {best} "
        "(`clear memory --cards`)."
    )
