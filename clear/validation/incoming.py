"""Check one set of data/incoming before the pipeline takes it in (docs/DEGRADATIONS.md).

The rules are those of the stages: `clear.sources.intake` refuses rows, and stage `validate` judges the rest, and the
set as a whole, with the same named expectations. `clear incoming check NAME` prints the verdict.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from clear.data.io import replacing, write_json
from clear.data.pool import parallel
from clear.data.rejects import write_rejects
from clear.degradation.incoming import planned
from clear.schema import Config
from clear.sources.incoming import FOLDER, unknown
from clear.sources.intake import SLICES
from clear.validation import accept
from clear.validation import frames as columns
from clear.validation.expectations import Failure, run_checks
from clear.validation.suites import incoming_checks

SHOWN = 20
"""Rejected rows in a verdict; rejects.parquet has all."""


@dataclass(frozen=True)
class Verdict:
    """What is known of a set. `slices` counts samples, `failed` and `rejects` are for people; `report` is a JSON file
    with all of this; rejects.parquet, metrics.parquet (one row per sample) and data_docs/ lie beside it."""

    name: str
    fingerprint: str
    success: bool
    accepted: int
    rejected: int
    paired: int
    questions: int
    slices: dict[str, int]
    failed: list[dict]
    rejects: list[dict]
    report: Path

    def as_json(self) -> dict:
        """The verdict as plain values."""
        return asdict(self) | {"report": self.report.as_posix()}


def check(name: str, config: Config, folder: Path = FOLDER, out: Path | None = None) -> Verdict:
    """Check one set and write the report into `out`, by default data/report/<profile>/incoming/<name>.

    It succeeds if at least one sample was accepted and no expectation fails; rejected rows are a failure if there are
    too many (`incoming.limits`). Other sets are not read. Raises ClearError for a set that is not here or cannot be
    read.
    """
    from clear.data.workspace import report_dir

    if not name:  # to `planned` this means all sets, such as an unset variable of a script must not
        raise unknown(name, folder)
    came = planned(config, name, folder)
    (one,) = came.sets
    out = out or report_dir() / "incoming" / name
    out.mkdir(parents=True, exist_ok=True)
    samples, workers = came.samples(*SLICES), config.degrade.workers
    frame = columns.build_frame(parallel(accept.measure_sample, samples, workers, came.count(*SLICES), f"check {name}"))
    failed: Sequence[Failure] = ()
    if len(frame):
        in_bench = frame["split"] == "bench"
        columns.add_shared_pictures(frame, [frame[~in_bench]], [frame[in_bench]])
        whole = accept.set_checks(frame, came.rows[one.name], len(came.rejects), config.incoming.limits)
        checks = incoming_checks(config.validate.duplicate_limit) + whole
        failed = run_checks({name: frame}, {name: checks}, out / "data_docs")[name]
    write_table(frame.drop(columns="answers"), out / "metrics.parquet")
    write_rejects(out / "rejects.parquet", came.rejects)
    counts: Mapping[str, int | str] = came.summary()[one.name]
    verdict = Verdict(
        name=one.name,
        fingerprint=one.fingerprint,
        success=bool(len(frame)) and not failed,
        accepted=len(frame),
        rejected=len(came.rejects),
        paired=counts["paired"],
        questions=counts["questions"],
        slices={part: counts[part] for part in SLICES},
        failed=[
            {
                "expectation": f.check.name,
                "means": f.check.means,
                "whole": f.check.whole,
                "count": f.count,
                "ids": list(f.keys),
            }
            for f in failed
        ],
        rejects=[asdict(reject) for reject in came.rejects[:SHOWN]],
        report=out / "verdict.json",
    )
    write_json(verdict.report, verdict.as_json() | {"report": verdict.report.name})
    return verdict


def write_table(frame: pd.DataFrame, file: Path) -> None:
    """Write a frame as Parquet; equal frames give equal bytes."""
    with replacing(file) as partial:
        frame.to_parquet(partial, index=False)


def lines(verdict: Verdict) -> list[str]:
    """The verdict in words."""
    slices = ", ".join(f"{count} {name}" for name, count in verdict.slices.items())
    said = [
        f"{verdict.name}: {'good' if verdict.success else 'NOT good'}",
        f"{verdict.accepted} samples ({verdict.paired} with a clean partner, {verdict.questions} questions): {slices}",
    ]
    if not verdict.accepted:
        said.append("no row of the set can be used")
    for f in verdict.failed:
        rows = "" if f["whole"] else f" for {f['count']} samples: {', '.join(f['ids'][:3])}"
        said.append(f"fails '{f['expectation']}' (not true that {f['means']}){rows}")
    said += [f"{verdict.rejected} rows rejected, listed in {verdict.report.with_name('rejects.parquet')}"] * (
        verdict.rejected > 0
    )
    said += [f"  {reject['id']} ({reject['reason']}): {reject['detail']}" for reject in verdict.rejects]
    said.append(f"report: {verdict.report}")
    return said
