"""Which bridge, and does its distillation help? `python tests/bench/bridge_ablation.py` prints a Markdown table.

Each variant is trained by `clear bridge` from data/models/sft, in a folder of its own under --folder that reads this
workspace's data, then answers the development split twice (the benchmark is not for choosing): once deciding by itself
whether to restore (accuracy per level), and once made to restore on every question about a hard-degraded image
(accuracy and time with a restoration in each answer). All differences are paired with the first row, by image.
Decode-reencode needs no training: it is measured on the SFT model, and on the trained mlp bridge's model, whose answers
had the same further steps. What is trained or measured already is kept; delete the folder when data/models/sft has
changed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from clear.bench.scoring import SEVERITIES, is_correct
from clear.bench.statistics import paired_difference
from clear.config import load
from clear.data.records import Question, read_samples
from clear.errors import ClearError
from clear.model.runtime import apply_runtime
from clear.project.scratch import write_params
from clear.reasoning.answering import Answerer

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(".clear/bridge_ablation")
DEVELOPMENT = "data/development"
READ = ("traces", "degraded", "models/sft")
TIMED, ROUNDS = 128, 3


@dataclass(frozen=True)
class Variant:
    """A row: how the bridge is trained (overrides; None: not at all) and how a restored picture is read."""

    name: str
    overrides: tuple[str, ...] | None
    feedback: str = "bridge"
    model: str = ""

    def place(self, folder: Path) -> Path:
        """The workspace it is trained in."""
        return folder / (self.model or self.name)

    def weights(self, folder: Path) -> Path:
        """The folder of its model."""
        return Path("data/models/sft") if self.overrides is None else self.place(folder) / "data/models/bridge"


MLP, DIRECT = "bridge.kind=mlp", "bridge.kind=direct"
VARIANTS = (
    Variant("mlp", (MLP,)),
    Variant("mlp, no distillation", (MLP, "bridge.distill.steps=0")),
    Variant("direct", (DIRECT,)),
    Variant("direct, no distillation", (DIRECT, "sft.distill_weight=0")),
    Variant("decode-reencode", (MLP,), "reencode", "mlp"),
    Variant("decode-reencode, sft", None, "reencode"),
)


def train(variant: Variant, folder: Path, settings: list[str]) -> None:
    """Run `clear bridge` with the variant's overrides, unless its weights are there."""
    place = variant.place(folder)
    for name in READ:
        link = place / "data" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(Path("data", name).resolve())
    write_params(place / "params.yaml", [*settings, *(variant.overrides or ())])
    if variant.weights(folder).exists():
        return
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CLEAR_HOME": str((place / ".clear").resolve())}
    if subprocess.run([sys.executable, "-m", "clear", "bridge"], cwd=place, env=environment, check=False).returncode:
        raise ClearError(f"{place}: `clear bridge` failed (see above).")


class Asked:
    """The development split before one trained variant."""

    def __init__(self, variant: Variant, folder: Path) -> None:
        config = load(variant.place(folder) / "params.yaml")
        apply_runtime(config)
        self.variant, self.answerer = variant, Answerer.load(variant.weights(folder), config)
        self.samples = [*read_samples(f"{DEVELOPMENT}/clean"), *read_samples(f"{DEVELOPMENT}/degraded")]
        self.bank = self.answerer.bank([s.seen for s in self.samples], [s.key for s in self.samples])
        self.all = [(i, q) for i, s in enumerate(self.samples) for q in s.questions]
        self.hard = [(i, q) for i, q in self.all if self.samples[i].severity == SEVERITIES[-1]]

    def answers(self, asked: Sequence[tuple[int, Question]], restore: str) -> dict[str, list]:
        """Per (image, question) pair: right or wrong, restored, level and image."""
        with tqdm(total=len(asked), desc=f"{self.variant.name}: {restore}", unit="question", mininterval=2) as bar:
            answers = self.answerer.answer(self.bank, asked, restore, self.variant.feedback, bar.update)
        return {
            "right": [is_correct(a.prediction, q) for a, (_, q) in zip(answers, asked, strict=True)],
            "restored": [a.restored for a in answers],
            "level": [self.samples[i].severity for i, _ in asked],
            "image": [self.samples[i].id for i, _ in asked],
        }

    def milliseconds(self) -> float:
        """Time of an answer with a restoration, over TIMED questions."""
        begun = time.perf_counter()
        self.answerer.answer(self.bank, self.hard[:TIMED], "always", self.variant.feedback)
        return 1000 * (time.perf_counter() - begun) / TIMED


def measure(variant: Variant, folder: Path) -> dict[str, list]:
    """`free_…` of the whole development split, `forced_…` of its hard part with a restoration in every answer."""
    known = folder / f"{variant.name}.json"
    if not known.exists():
        asked = Asked(variant, folder)
        parts = {"free": asked.answers(asked.all, "auto"), "forced": asked.answers(asked.hard, "always")}
        known.write_text(json.dumps({f"{part}_{k}": v for part, kinds in parts.items() for k, v in kinds.items()}))
    return json.loads(known.read_text())


def latencies(variants: Sequence[Variant], folder: Path) -> dict[str, float]:
    """Milliseconds per restored answer of each variant, medians of ROUNDS in turn."""
    loaded = [Asked(variant, folder) for variant in variants]
    rounds = [[asked.milliseconds() for asked in loaded] for _ in range(ROUNDS)]
    return {v.name: float(np.median(times)) for v, times in zip(variants, zip(*rounds, strict=True), strict=True)}


def rows(found: dict[str, dict[str, list]], milliseconds: dict[str, float]) -> list[str]:
    """The table, each variant against the first one; `milliseconds` may lack."""
    lines = [
        f"| bridge | {' | '.join(SEVERITIES)} | restores, {SEVERITIES[-1]} | against the first, {SEVERITIES[-1]} "
        "| made to restore | against the first | ms per restored answer |",
        "|---|" + "---|" * (len(SEVERITIES) + 5),
    ]
    first = next(iter(found.values()))
    for name, one in found.items():
        right, level = np.array(one["free_right"], float), np.array(one["free_level"])
        hard = level == SEVERITIES[-1]
        cells = [f"{right[level == wanted].mean():.3f}" for wanted in SEVERITIES]
        cells.append(f"{100 * np.array(one['free_restored'])[hard].mean():.1f} %")
        image = np.unique(one["free_image"], return_inverse=True)[1]
        cells.append(_difference(right[hard], np.array(first["free_right"], float)[hard], image[hard]))
        forced = np.array(one["forced_right"], float)
        image = np.unique(one["forced_image"], return_inverse=True)[1]
        cells += [f"{forced.mean():.3f}", _difference(forced, np.array(first["forced_right"], float), image)]
        cells.append(f"{milliseconds[name]:.1f}" if name in milliseconds else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _difference(one: np.ndarray, first: np.ndarray, image: np.ndarray) -> str:
    if one is first or np.array_equal(one, first):
        return "0"
    found = paired_difference(one, first, image)
    return f"{100 * found.estimate:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"


def main() -> None:
    """Train and measure every variant, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where variants are trained and measured")
    parser.add_argument("--profile", default="tiny", help="profile of this workspace's data/models/sft")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-latency", action="store_true", help="for a machine that does other work meanwhile")
    given = parser.parse_args()
    found = {}
    for variant in VARIANTS:
        train(variant, given.folder, [f"profile={given.profile}", f"runtime.threads={given.threads}"])
        found[variant.name] = measure(variant, given.folder)
    times = {} if given.no_latency else latencies(VARIANTS, given.folder)
    print("\n".join(rows(found, times)))


if __name__ == "__main__":
    try:
        main()
    except ClearError as error:
        sys.exit(f"error: {error}")
