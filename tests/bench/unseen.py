"""Damage that no training has seen: `python tests/bench/unseen.py` prints a Markdown table.

The clean pictures of data/samples/development are damaged in three ways, one copy each, and every model answers the
questions about them:

    presets   one of the presets (rain, fog, scratches, …) at one of its levels
    two       two different corruptions of the sixteen at mid, one over the other
    twice     a corruption at hard, applied twice: worse than any level there is

Each model is paired with direct fine-tuning on the same questions, with a bootstrap interval by image. The rows of a
model are kept in --out, so a killed run goes on; they are bound to its files and to params.yaml.
"""

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from clear.bench.models import MODELS, under_test
from clear.bench.predictions import KEY
from clear.config import load
from clear.data.images import decode_image, encode_image
from clear.data.records import EXTRA, Sample, read_samples
from clear.degradation.corruptions import CORRUPTIONS, corrupt
from clear.degradation.presets import LEVELS, PRESETS
from clear.degradation.protocol import SEVERITIES, seed_of
from clear.model.runtime import apply_runtime
from clear.report.claims import NAMES
from tests.bench.paired import difference, rows_of, shown

COLUMNS = [*KEY, "pair", "correct", "restored"]
BESIDE = "sft_direct"
Damaged = tuple[np.ndarray, str, str]
"""A picture, the name of its damage, and the level."""


def presets(image: np.ndarray, sample: str, scale: float) -> Damaged:
    """One preset at one of its levels, both drawn for the sample."""
    drawn = random.Random(f"presets {sample}")
    name, level = drawn.choice(sorted(PRESETS)), drawn.choice(sorted(LEVELS))
    entry = PRESETS[name]
    rng = np.random.default_rng(seed_of(sample, entry.label, level))
    return entry.function(image, entry.severities[level], rng, scale), entry.label, level


def two(image: np.ndarray, sample: str, scale: float) -> Damaged:
    """Two different corruptions at mid, in a drawn order."""
    names = random.Random(f"two {sample}").sample(sorted(CORRUPTIONS), 2)
    for name in names:
        image = corrupt(name, image, SEVERITIES["mid"], np.random.default_rng(seed_of(sample, name, "mid")), scale)
    return image, EXTRA + "_and_".join(names), "mid"


def twice(image: np.ndarray, sample: str, scale: float) -> Damaged:
    """One corruption at hard, and again with other random numbers."""
    name = random.Random(f"twice {sample}").choice(sorted(CORRUPTIONS))
    for time in ("first", "second"):
        rng = np.random.default_rng(seed_of(f"{sample} {time}", name, "high"))
        image = corrupt(name, image, SEVERITIES["high"], rng, scale)
    return image, EXTRA + name, "high"


WAYS: dict[str, Callable[[np.ndarray, str, float], Damaged]] = {"presets": presets, "two": two, "twice": twice}


def damaged(samples: list[Sample], way: str, scale: float, questions: int) -> list[Sample]:
    """A copy of every sample, damaged in one of WAYS, with its first questions."""
    copies = []
    for sample in samples:
        image, name, level = WAYS[way](decode_image(sample.image, sample.id), sample.id, scale)
        asked = sample.questions[:questions]
        kept = {"degraded": encode_image(image, "jpeg"), "corruption": name, "severity": level, "questions": asked}
        copies.append(replace(sample, **kept))
    return copies


def main() -> None:
    """Answer what is not answered yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["base", BESIDE, "grpo"], choices=[*MODELS])
    parser.add_argument("--ways", nargs="+", default=[*WAYS], choices=[*WAYS])
    parser.add_argument("--limit", type=int, default=0, help="only the first pictures; 0 = all")
    parser.add_argument("--out", type=Path, default=Path(".clear/unseen"))
    arguments = parser.parse_args()
    config = load()
    apply_runtime(config)
    clean = list(read_samples("data/samples/development"))[: arguments.limit or None]
    print(f"| damage | model | right | restored | minus {NAMES[BESIDE]} |\n|---|---|---|---|---|")
    for way in arguments.ways:
        copies = damaged(clean, way, config.degrade.size_scale, config.mmd_bench.degraded_questions)
        frames = {}
        for model in dict.fromkeys([BESIDE, *arguments.models]):
            file = arguments.out / way / f"{model}_{arguments.limit}.json"
            frames[model] = rows_of(f"{way} {model}", under_test(model, config), copies, file, COLUMNS)
        for model in arguments.models:
            frame = frames[model]
            lead = "" if model == BESIDE else shown(difference(frame, frames[BESIDE], "correct", config))
            right, called = (f"{100 * frame[column].mean():.1f} %" for column in ("correct", "restored"))
            print(f"| {way} | {NAMES[model]} | {right} | {called} | {lead} |", flush=True)


if __name__ == "__main__":
    main()
