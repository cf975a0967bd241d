"""What quantised weights cost CLEAR: `python tests/bench/quantised.py` prints a Markdown table.

One model of the comparison answers data/development in every type of `runtime.weights`, each paired with float32
on the same questions, with a bootstrap interval by image: accuracy, and how often the model calls for a restoration.
The rows of a type are kept in --out, so a killed run goes on behind the last type; the files are bound to the model's
and to params.yaml, and others are answered anew. On a processor without bfloat16 instructions that type takes a hundred
times as long, so it is left out unless named.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from clear.bench.models import MODELS, under_test
from clear.bench.predictions import KEY
from clear.config import load
from clear.data.records import Sample, read_samples
from clear.model.runtime import apply_runtime
from clear.schema import QUANTISED, Config
from tests.bench.paired import difference, rows_of, shown

EXACT = "float32"
COLUMNS = [*KEY, "pair", "correct", "restored"]


def with_weights(config: Config, kind: str) -> Config:
    """The configuration under a type of weights; all others computed in float32."""
    narrow = kind == "bfloat16"
    return replace(config, runtime=replace(config.runtime, weights=kind, precision="bfloat16" if narrow else "float32"))


def answered(kind: str, model: str, samples: list[Sample], config: Config, out: Path) -> pd.DataFrame:
    """What the model answers with weights of this type."""
    tested = under_test(model, with_weights(config, kind))
    return rows_of(f"{model} {kind}", tested, samples, out / f"{model}_{kind}.json", COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="grpo", choices=[*MODELS])
    parser.add_argument("--weights", nargs="+", default=["int8", "nf4"], choices=["bfloat16", *QUANTISED])
    parser.add_argument("--limit", type=int, default=0, help="only the first pictures of each part; 0 = all")
    parser.add_argument("--out", type=Path, default=Path(".clear/quantised"))
    arguments = parser.parse_args()
    config = load()
    apply_runtime(config)
    parts = [list(read_samples(Path("data/development") / part)) for part in ("clean", "degraded")]
    samples = [sample for part in parts for sample in part[: arguments.limit or None]]
    out = arguments.out / f"{arguments.limit}" if arguments.limit else arguments.out
    exact = answered(EXACT, arguments.model, samples, config, out)
    print(f"{arguments.model}, {len(exact):,} questions, paired with {EXACT}; points [95 % interval]\n")
    print("| weights | accuracy | difference | call rate | difference | seconds |\n|---|---|---|---|---|---|")
    for kind in (EXACT, *arguments.weights):
        frame = exact if kind == EXACT else answered(kind, arguments.model, samples, config, out)
        cells = [kind]
        for column in ("correct", "restored"):
            cells += [f"{100 * frame[column].mean():.2f} %"]
            cells += ["" if kind == EXACT else shown(difference(frame, exact, column, config))]
        print(f"| {' | '.join([*cells, str(round(frame.attrs['seconds']))])} |", flush=True)


if __name__ == "__main__":
    main()
