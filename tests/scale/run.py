"""`make scale`: how time and memory grow with the number of samples.

    python -m tests.scale.run [SIZE …]     (default: 10,000 and 100,000)

Every step is the real stage or command on a workspace of SIZE samples, in a process of its own. Only what costs by the
picture or by the token is stubbed, at its boundary: a picture is its sample's name in bytes, which nothing decodes, a
degraded copy is made by appending to it, what validation measures of it is the middle of its cell's band, and the
engine answers from a table that is right four times in five. SIZE counts the samples of all splits; a 120th of them are
the benchmark's, so that SIZE / 10 questions are asked of each of the six models. Plots are drawn and Data Docs written.

Prints seconds of processor time (one process, one thread), the largest resident memory (MiB) and, per step, the
exponent of time against size between the smallest and the largest one: 1 is linear, and what a process costs before its
first row makes it less. Resumable: what was measured is in $CLEAR_HOME/scale/<size>/times.json, where a step that is
removed is measured anew.
"""

import argparse
import hashlib
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

from clear.bench import predictions
from clear.bench.models import MODELS
from clear.config import compose, from_dict
from clear.data.io import aligned, write_json, write_text
from clear.data.records import CLEAN, Question, Sample, read_samples, sha256, write_samples
from clear.errors import ClearError
from clear.project.scratch import write_params
from clear.schema import Config
from clear.validation.frames import load_bands
from clear.validation.metrics import Measured, told
from tests.conftest import ROOT

SIZES = (10_000, 100_000)
COUPLES = 240  # a couple of benchmark images, joined by a minimal pair, for as many samples
SPLITS = {"rl": 20, "validation": 100, "development": 300}  # one sample of as many
SETTINGS = ["profile=tiny", "degrade.workers=1"]
BANDS = load_bands()
TASKS, ANSWERS = (
    ("colour", "count", "place", "reading", "shape"),
    ("red", "two", "left", "K", "disc", "green", "a", "b"),
)


def drawn(name: str, below: int) -> int:
    """A number that depends on a name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest()) % below


def sample(split: str, number: int, questions: int) -> Sample:
    """A sample whose picture is its name; those of `bench` and `development` are paired two by two."""
    name = f"{split}:{number:07d}"
    paired = split in ("bench", "development")
    asked = []
    for n in range(questions):
        answer = ANSWERS[drawn(f"{name}/{n}", len(ANSWERS))]
        text = f"which is the {TASKS[n % len(TASKS)]} of thing {n} in row {number % 9} of the picture ?"
        pair = f"{split}:{number // 2}" if paired and n == 0 else ""
        asked.append(Question(f"q{n}", TASKS[n % len(TASKS)], text, answer, (), f"thing {n} is {answer}", pair))
    data = name.encode()
    return Sample(name, "scale", split, data, sha256(data), tuple(asked))


def make(size: int, config: Config) -> None:
    """The clean samples of all splits."""
    bench = 2 * max(8, size // COUPLES)
    counts = {"bench": bench} | {split: max(16, size // part) for split, part in SPLITS.items()}
    counts["sft"] = size - sum(counts.values())
    for split, count in counts.items():
        questions = 3 if split in ("bench", "development") else 2
        write_samples(Path("data/samples") / split, (sample(split, n, questions) for n in range(count)))


def degraded_bytes(job: tuple) -> bytes:
    """In place of a degraded picture."""
    return job[0] + f"/{job[1]}/{job[2]}".encode()


def degrade(size: int, config: Config) -> None:
    """Stages degrade and mmd_bench."""
    from clear.degradation import build
    from clear.stages import degrade, mmd_bench

    build._degraded_bytes = degraded_bytes
    degrade.run(config)
    mmd_bench.run(config)


def measured(sample: Sample) -> Measured:
    """In place of the metrics of a sample's pictures: the means of its cell."""
    digest = sha256(sample.image)
    found = told(sample) | {
        "decodable": True,
        "width": 128,
        "height": 128,
        "luminance": 100.0 + drawn(sample.key, 100) / 7,
        "sharpness": 500.0 + drawn(sample.key, 1000) / 7,
        "entropy": 5.0 + drawn(sample.key, 100) / 70,
        "dhash": digest[:16],
        "pixels": digest,
        "shown": sha256(sample.seen),
    }
    if sample.corruption != CLEAN:
        band = BANDS[sample.corruption][sample.severity]
        middle = (band["mean_low"] + band["mean_high"]) / 2
        found |= {"same_size": True, "difference": 5.0, "psnr": middle, "ssim": 1 - sample.intensity / 2}
    return Measured(**found)


def validate(size: int, config: Config) -> None:
    """Stage validate."""
    from clear.stages import validate
    from clear.validation import accept

    accept.measure_sample = measured
    validate.run(config)


class Table:
    """In place of the engine: right four times in five, depending on question and picture alone."""

    def bank(self, images: list[bytes], names: list[str]) -> list[str]:
        """The pictures by their names."""
        return names

    def answer(
        self, bank: list[str], asked: Iterable[tuple[int, Question]], restore: str, progress: Callable[[int], None]
    ) -> list[SimpleNamespace]:
        """What is said to each question."""
        said = [q.answer if drawn(f"{bank[n]}{q.id}", 5) else "none" for n, q in asked]
        progress(len(said))
        return [SimpleNamespace(prediction=text) for text in said]


def traces(size: int, config: Config) -> None:
    """Stage traces, the oracle's."""
    from clear.reasoning import answering
    from clear.stages import traces

    answering.Answerer.load = classmethod(lambda cls, *_: Table())
    traces.run(config)


def rows(model: str, side: str) -> Iterator[dict]:
    """The predictions of a model: right more often the less damage there is, restoring where there is much."""
    damage = {CLEAN: 0, "low": 5, "mid": 10, "high": 20}
    gains = {"base": 0, "sft_direct": 5, "grpo": 8}.get(model, 6)
    for part in ("clean", "degraded"):
        for sample in read_samples(f"data/bench/{part}", ["id", "questions", "corruption", "severity"]):
            for q in sample.questions:
                key = f"{sample.key}/{q.id}"
                right = drawn(f"{key}/{model}/{side}", 100) >= 10 + damage[sample.severity] - gains / 2
                answer = q.answer if right else "none"
                restored = model not in ("base", "sft_direct") and drawn(f"{key}/r", 40) < damage[sample.severity]
                degraded = sample.severity != CLEAN
                yield {
                    "sample": sample.id,
                    "corruption": sample.corruption,
                    "severity": sample.severity,
                    "question": q.id,
                    "task": q.task,
                    "pair": q.pair,
                    "text": q.text,
                    "answer": q.answer,
                    "prediction": answer,
                    "output": f"<think> sufficient : {q.evidence} </think> <answer> {answer} </answer>",
                    "restored": restored,
                    "correct": right,
                    "tokens": 14,
                    "psnr_degraded": 15.0 + drawn(sample.key, 100) / 10 if degraded else None,
                    "ssim_degraded": 0.5 if degraded else None,
                    "psnr_restored": 20.0 if restored else None,
                    "ssim_restored": 0.7 if restored else None,
                    "restored_png": None,
                }


def answers(size: int, config: Config) -> None:
    """The predictions of every model, twice, and a table of one model's answers in VLMEvalKit's form."""
    for side in ("base", "head"):
        for model in MODELS:
            predictions.write(Path(side) / "data/predictions" / f"{model}.parquet", rows(model, side))
        shutil.copy("params.yaml", side)
    shutil.copytree("head/data/predictions", "data/predictions", dirs_exist_ok=True)
    lines = ["index\tquestion\tA\tB\tC\tD\tanswer\tprediction"]
    options = "\t".join(ANSWERS[:4])
    for n in range(size // 10):
        lines.append(f"{n}\twhat is in row {n} ?\t{options}\t{'ABCD'[n % 4]}\t{'ABCD'[drawn(f'{n}', 4)]}")
    write_text("model_MMStar.tsv", "\n".join(lines) + "\n")


def report(size: int, config: Config) -> None:
    """Stage report."""
    from clear.stages import report

    report.run(config)


def command(*words: str) -> Callable[[int, Config], None]:
    """A command of `clear`, in this process."""

    def run(size: int, config: Config) -> None:
        from clear import cli

        cli.app([*words], standalone_mode=False)

    return run


STEPS = {
    "make": make,
    "degrade": degrade,
    "validate": validate,
    "traces": traces,
    "answers": answers,
    "report": report,
    "compare": command("compare", "base", "head", "--out", "compared"),
    "score": command("score", "model_MMStar.tsv"),
}
NOT_MEASURED = ("make", "answers")


def step(name: str, size: int) -> None:
    """One step, in this process and folder; prints what it took as JSON."""
    if Path("dvc.yaml").exists():
        raise ClearError(f"{Path.cwd()} is a workspace, whose results a step would overwrite; run `make scale`.")
    config = from_dict(compose(SETTINGS))
    begun = time.process_time()
    STEPS[name](size, config)
    seconds = time.process_time() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    write_json("step.json", {"seconds": seconds, "peak": peak})


def measure(state: Path, size: int) -> dict[str, dict]:
    """{step: {seconds, peak}} of a size; what is known already is not run again."""
    folder, file = state / str(size), state / str(size) / "times.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_params(folder / "params.yaml", SETTINGS)
    found = json.loads(file.read_text()) if file.exists() else {}
    environment = os.environ | {"CLEAR_HOME": str(folder / ".clear"), "PYTHONPATH": str(ROOT)}
    for name in STEPS:
        if name not in found:
            command = [sys.executable, "-m", "tests.scale.run", str(size), "--step", name]
            said = folder / f"{name}.log"
            with said.open("wb") as log:
                if subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log).returncode:
                    raise ClearError(f"step {name} of {size:,} samples failed; {said} says why.")
            found[name] = json.loads((folder / "step.json").read_text())
            write_json(file, found)
        print(f"{size:>9,} {name:<9} {found[name]['seconds']:8.1f} s {found[name]['peak']:7.0f} MiB", flush=True)
    return found


def main() -> None:
    """Measure what is not measured yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", type=int, default=SIZES)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step(arguments.step, arguments.sizes[0])
        return
    state = Path(os.environ.get("CLEAR_HOME", ".clear")).absolute() / "scale"
    found = {size: measure(state, size) for size in sorted(arguments.sizes)}
    small, large = min(found), max(found)
    table = [("step", *(f"{size:,}: s, MiB" for size in found), "time grows with size to the power")]
    for name in STEPS:
        if name in NOT_MEASURED:
            continue
        cells = [f"{one[name]['seconds']:.1f}, {one[name]['peak']:.0f}" for one in found.values()]
        grown = found[large][name]["seconds"] / found[small][name]["seconds"]
        power = f"{math.log(grown) / math.log(large / small):.2f}" if large > small else ""
        table.append((name, *cells, power))
    print("\n".join(aligned(table, gap="  ")))


if __name__ == "__main__":
    try:
        main()
    except ClearError as error:
        sys.exit(f"error: {error}")
