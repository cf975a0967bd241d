"""How often a night without change is called drifted, and how likely a change is noticed: measured, not derived.

Simulated nights are drawn from training pictures that the classifier has not seen; what is left of these is the
reference, drawn anew for each night, so that the luck of one reference is in the figures. A night with a change has a
share of degraded copies, of pictures that are not in the reference. `power.json` beside this file is of the default
profile, written by `python tests/bench/drift.py`; `clear watch --calibrate` measures the same on the user's own
pictures.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clear.data.records import Sample
from clear.degradation.corruptions import CORRUPTIONS
from clear.degradation.protocol import SEVERITIES
from clear.drift.reference import Reference, copies_of, measured
from clear.drift.resemblance import Cell
from clear.drift.statistics import p_value
from clear.errors import ClearError

MEASURED = Path(__file__).with_name("power.json")
SIZES = (50, 100, 200, 500, 1000)
MIXTURES = (0.05, 0.1, 0.2)
MAIN = 500
"""Pictures of the night whose power is listed for each kind and level."""

PERMUTATIONS = 99
"""Fewer than for a real night: the rate is right with any number, the power a little lower."""

REFERENCE = 1500
ENOUGH = 0.8

COPIES = 60
"""Copies of each kind and level, of which a simulated night draws."""


def damaged_columns(
    reference: Reference, pictures: Sequence[Sample], scale: float, workers: int
) -> dict[Cell, np.ndarray]:
    """Columns of copies of pictures with each of the sixteen corruptions at each level."""
    cells = [(kind, level) for kind in CORRUPTIONS for level in SEVERITIES]
    copies = ((copy.key, copy.seen) for copy in copies_of(pictures, cells, COPIES, scale, workers))
    rows = measured(copies, reference.side, workers, len(cells) * COPIES, "simulated damage")
    values = np.array([row.values for row in rows]).reshape(len(cells), COPIES, -1)
    return {cell: reference.columns(rows) for cell, rows in zip(cells, values, strict=True)}


def calibrate(
    clean: np.ndarray,
    copies: Mapping[Cell, np.ndarray],
    alpha: float,
    unchanged: int = 1000,
    nights: int = 20,
    sizes: tuple[int, ...] = SIZES,
    seed: int = 0,
    say: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Figures in the form of power.json from the columns of unchanged pictures (N, C), and of copies of others by cell.

    `unchanged` simulated nights give the rate of false alarms at the size MAIN or the nearest, `nights` each power.
    Sizes that leave fewer than twice as many pictures for the reference are left out.
    """
    sizes = tuple(size for size in sizes if 3 * size <= len(clean))
    if not sizes:
        raise ClearError(
            f"{len(clean)} held-out pictures are too few to simulate nights with; at least {3 * SIZES[0]}."
        )
    main = min(sizes, key=lambda size: abs(size - MAIN))
    rng = np.random.default_rng(seed)
    p = np.array([_night(clean, None, 0, main, rng) for _ in range(unchanged)])
    alarms = {f"{level:g}": int((p <= level).sum()) for level in sorted({alpha, 0.01, 0.05})}
    say(f"{unchanged} nights of {main} pictures without change: alarms at a rate of {alarms}")
    power: dict[str, dict[str, list[float]]] = {}
    for size in sizes:
        power[str(size)] = {
            "/".join(cell): [_share(clean, rows, share, size, alpha, nights, rng) for share in MIXTURES]
            for cell, rows in copies.items()
        }
        means = np.mean(list(power[str(size)].values()), axis=0)
        say(f"{size} pictures: " + ", ".join(f"{m:.0%} {v:.2f}" for m, v in zip(MIXTURES, means, strict=True)))
    setting = {"alpha": alpha, "unchanged": unchanged, "size": main, "nights": nights, "pictures": len(clean)}
    return {"measured": setting, "mixtures": list(MIXTURES), "false_alarms": alarms, "power": power}


def _share(
    clean: np.ndarray, copies: np.ndarray, share: float, size: int, alpha: float, nights: int, rng: np.random.Generator
) -> float:
    changed = round(share * size)
    return float(np.mean([_night(clean, copies, changed, size, rng) <= alpha for _ in range(nights)]))


def _night(clean: np.ndarray, copies: np.ndarray | None, changed: int, size: int, rng: np.random.Generator) -> float:
    """The p of a night of `size` pictures of which `changed` are copies."""
    order = rng.permutation(len(clean))
    night = clean[order[: size - changed]]
    if changed:
        night = np.vstack([night, copies[rng.integers(len(copies), size=changed)]])
    rest = order[size - changed :][:REFERENCE]
    return p_value(night, clean[rest], PERMUTATIONS, rng)


def figures(file: Path = MEASURED) -> dict[str, Any]:
    """The figures of a file; those of the default profile if there is none. Raises ClearError for a damaged one."""
    kept = file if file.exists() else MEASURED
    try:
        found = json.loads(kept.read_text())
    except ValueError as error:
        raise ClearError(f"{kept}: not valid JSON ({error}); delete it and run `clear watch --calibrate`.") from error
    found["power"] = {size: found["power"][size] for size in sorted(found["power"], key=int)}  # JSON sorts as text
    return found


def needed(measured_power: Mapping[str, Any]) -> list[tuple[float, int | None]]:
    """(share of changed pictures, pictures of a night from which on its mean power over all kinds and levels is
    ENOUGH); None where no size that was measured is enough."""
    found: list[tuple[float, int | None]] = []
    for column, share in enumerate(measured_power["mixtures"]):
        means = {int(n): np.mean([row[column] for row in rows.values()]) for n, rows in measured_power["power"].items()}
        found.append((share, min((size for size, mean in means.items() if mean >= ENOUGH), default=None)))
    return found


def enough(measured_power: Mapping[str, Any]) -> str:
    """One clause: how many pictures it takes."""
    largest = max(map(int, measured_power["power"]))
    said = [f"{size or f'more than {largest}'} for {share:.0%}" for share, size in needed(measured_power)]
    return (
        f"pictures needed to notice, in {ENOUGH:.0%} of nights (mean over the kinds and levels of damage), a share of "
        f"changed ones: {', '.join(said)}"
    )
