"""Stage `evaluate@<model>`: answer the whole benchmark and write per-question predictions and their summary.

Naturally degraded images (data/bench/incoming) and copies by further degradations (data/bench/extra) are answered
separately, after MMD-Bench, so that no figure of MMD-Bench depends on them. With `evaluate.cluster` a Dask cluster
answers (clear/bench/answers.py); the predictions are the same. `clear evaluate --development` answers data/development
instead, where recipes are compared, and changes no tracked file.
"""

from pathlib import Path

from tqdm import tqdm

from clear.bench import predictions
from clear.bench.answers import answer, development
from clear.bench.models import UnderTest, under_test
from clear.data.io import write_json
from clear.data.records import Sample, read_samples
from clear.schema import Config

BENCH = Path("data/bench")


def run(config: Config, model: str) -> None:
    """Evaluate one model of MODELS on data/bench."""
    tested = under_test(model, config)
    samples = [sample for part in ("clean", "degraded") for sample in read_samples(BENCH / part)]
    rows = _answered(tested, model, samples, "milliseconds_per_question")
    came = _answered(tested, model, list(read_samples(BENCH / "incoming")), "milliseconds_per_incoming_question")
    extra = _answered(tested, model, list(read_samples(BENCH / "extra")), "milliseconds_per_extra_question")
    out = Path("data/predictions") / f"{model}.parquet"
    predictions.write(out, rows + came + extra)
    found = _figures(out, config)
    if came:
        found["incoming"] = predictions.incoming_metrics(predictions.read_incoming(out))
    if extra:
        found["extra"] = predictions.extra_metrics(predictions.read_extra(out))
    write_json(f"data/metrics/evaluate_{model}.json", found)


def run_development(config: Config, model: str) -> Path:
    """Evaluate one model of MODELS on data/development; returns the file of its figures, with the predictions beside.

    Both are run records in the private folder of the project: nothing that DVC or git tracks changes.
    """
    from clear.data.workspace import home

    tested = under_test(model, config)
    rows = _answered(tested, model, development())
    out = home() / "development" / config.profile / f"{model}.parquet"
    predictions.write(out, rows)
    write_json(out.with_suffix(".json"), _figures(out, config))
    return out.with_suffix(".json")


def _figures(out: Path, config: Config) -> dict:
    e = config.evaluate
    return predictions.metrics(predictions.read(out), confidence=e.confidence, resamples=e.bootstrap, seed=config.seed)


def _answered(tested: UnderTest, model: str, samples: list[Sample], figure: str = "") -> list[dict]:
    """Rows for every question of `samples`; the time goes to the run record as `figure`, if it is named."""
    from clear.data.workspace import record_run

    total = sum(len(sample.questions) for sample in samples)
    if not total:
        return []
    with tqdm(total=total, desc=f"evaluate {model}", unit="question", mininterval=2) as bar:
        rows, seconds = answer(tested, samples, bar.update)
    if figure:
        record_run(f"evaluate_{model}", **{figure: 1000 * seconds / total})
    return rows
