"""How often `clear watch` calls an unchanged night drifted, and what it notices: `python tests/bench/drift.py`.

Measures on the training data of the working directory (default profile) and prints Markdown tables; --write makes the
figures those that `clear watch` ships with (clear/drift/power.json). With --distance ks the Kolmogorov–Smirnov distance
takes Wasserstein's place, and with --metrics the likeness to kinds of damage is left out: what the choices are worth.
"""

import argparse
import sys
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from clear.data.io import write_json
from clear.drift import power, reference, statistics
from clear.drift.measures import METRICS
from clear.project.watch import calibrated


def largest_gaps(pooled: statistics._Pooled, weights: np.ndarray) -> np.ndarray:
    """Kolmogorov–Smirnov distances in the form of `_Pooled.distances`."""
    found = np.empty((weights.shape[1], len(pooled.orders)))
    for c, (order, gaps) in enumerate(zip(pooled.orders, pooled.gaps, strict=True)):
        found[:, c] = (np.abs(np.cumsum(weights[order[:-1]], axis=0)) * (gaps > 0)[:, None]).max(axis=0)
    return found


def tables(found: dict) -> str:
    """Markdown: false alarms, power by size, and power by kind and level."""
    setting = found["measured"]
    shares = [f"{share:.0%}" for share in found["mixtures"]]
    lines = [
        f"{n} of {setting['unchanged']} unchanged nights at {float(a):.0%}" for a, n in found["false_alarms"].items()
    ]
    lines += ["", "| pictures | " + " | ".join(shares) + " |", "|---" * (len(shares) + 1) + "|"]
    for size, cells in found["power"].items():
        lines.append(
            f"| {size} | " + " | ".join(f"{100 * x:.0f}" for x in np.mean(list(cells.values()), axis=0)) + " |"
        )
    levels = ("low", "mid", "high")
    lines += ["", "| | " + " | ".join(levels) + " |", "|---" * (len(levels) + 1) + "|"]
    main = found["power"][str(setting["size"])]
    for kind in dict.fromkeys(cell.split("/")[0] for cell in main):
        cells = (" / ".join(f"{100 * x:.0f}" for x in main[f"{kind}/{level}"]) for level in levels)
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"replace {power.MEASURED.name}")
    parser.add_argument("--distance", choices=("wasserstein", "ks"), default="wasserstein")
    parser.add_argument("--metrics", action="store_true", help="the metrics alone")
    parser.add_argument("--unchanged", type=int, default=1000, help="nights without change")
    parser.add_argument("--nights", type=int, default=20, help="nights for each power")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(power.SIZES), help="pictures of a night")
    parser.add_argument("--damaged", type=float, default=0.0, help="share of the reference that is damaged")
    parser.add_argument("--alpha", type=float, default=0.01, help="false alarms, as a share of the nights")
    given = parser.parse_args()
    if given.write and (given.distance != "wasserstein" or given.metrics or given.damaged):
        parser.error("--write is for the settings that `clear watch` has")
    whole = reference.Reference.columns
    with (
        mock.patch.object(
            statistics._Pooled, "distances", largest_gaps if given.distance == "ks" else statistics._Pooled.distances
        ),
        mock.patch.object(
            reference.Reference,
            "columns",
            (lambda self, x: whole(self, x)[:, : len(METRICS)]) if given.metrics else whole,
        ),
    ):
        simulation = {"unchanged": given.unchanged, "nights": given.nights, "sizes": tuple(given.sizes)}
        file = calibrated(
            Path(), "", given.damaged, given.alpha, lambda line: print(line, file=sys.stderr), **simulation
        )
    found = power.figures(file)
    file.unlink()  # `clear watch` would take it for a calibration of this folder
    if given.write:
        write_json(power.MEASURED, found)
    print(tables(found))


if __name__ == "__main__":
    main()
