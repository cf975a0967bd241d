"""Command `clear decision MODEL`: what restoring gains and whether the model knows it, on the development split.

Writes a run record into the private folder of the project: the outcomes per question (Parquet), their figures (JSON)
and the accuracy at every budget of restorations (PNG). Nothing that DVC or git tracks changes.
"""

from pathlib import Path

from tqdm import tqdm

from clear.bench import decision
from clear.bench.models import under_test
from clear.data.io import replacing, write_json
from clear.data.records import read_samples
from clear.data.workspace import home
from clear.errors import ClearError
from clear.report import plots
from clear.report.claims import NAMES
from clear.schema import Config

DEVELOPMENT = Path("data/development")


def run(config: Config, model: str) -> Path:
    """Measure the decision of one model; returns the file of its figures.

    Raises ClearError for a model that never restores, and where the split holds no question.
    """
    tested = under_test(model, config)
    samples = [sample for part in ("clean", "degraded") for sample in read_samples(DEVELOPMENT / part)]
    total = 2 * sum(len(sample.questions) for sample in samples)
    if not total:
        raise ClearError(f"{DEVELOPMENT} holds no question; raise params: source.development (or its share) and rerun.")
    with tqdm(total=total, desc=f"decision {model}", unit="answer", mininterval=2) as bar:
        frame = decision.outcomes(tested, samples, bar.update)
    e = config.evaluate
    out = home() / "development" / config.profile / f"decision_{model}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out.with_suffix(".parquet")) as partial:
        frame.to_parquet(partial)
    found = decision.figures(frame, confidence=e.confidence, resamples=e.bootstrap, seed=config.seed)
    plots.budget(out.with_suffix(".png"), frame, f"{NAMES[model]}, development split")
    write_json(out, found)
    return out


def table(found: dict) -> str:
    """The figures per severity and per corruption at high as text, in percent."""
    columns = ("never", "always", "either", "own", "calls")
    lines = [f"{'':18}" + "".join(f"{name:>9}" for name in columns)]
    for part in ("severity", "corruption"):
        for name, row in found[part].items():
            lines.append(f"{name:18}" + "".join(f"{100 * row[column]:9.1f}" for column in columns))
    odds = found.get("odds_of_a_call_where_it_helps")
    if odds:
        lines.append(
            f"odds of a call where it helps, within kind and level: {odds['estimate']:.1f} times those where it harms "
            f"[{odds['low']:.1f}, {odds['high']:.1f}]"
        )
    return "\n".join(lines)
