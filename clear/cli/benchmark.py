"""Commands for VLMEvalKit's files: score its predictions, degrade its benchmarks."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clear.errors import ClearError, say

if TYPE_CHECKING:
    import pandas as pd


BESIDE = (".parquet", ".jsonl", "_rejects.parquet")
"""Ends of the names of a table's record, journal and rejects (clear.bench.vlmeval.answering)."""


def score(
    files: Annotated[
        list[Path], typer.Argument(help="Tables of predictions (TSV, xlsx, CSV, Parquet, JSON), one per set and model.")
    ],
    out: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Write the scored rows here (Parquet).")] = None,
    judge: Annotated[
        bool, typer.Option("--judge", help="Grade MM-Vet and unmatched answers by the endpoint `judge` of params.yaml.")
    ] = False,
    reference: Annotated[
        str, typer.Option(help="The model that all others are compared with, question by question.")
    ] = "",
    published: Annotated[
        bool, typer.Option("--published", help="Add the paper's figures, as rows that are marked as published.")
    ] = False,
    manifest: Annotated[
        Path | None, typer.Option(help="manifest.parquet of mmd-bench: which questions share a picture.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the leaderboard here (Markdown).")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the leaderboard here (one HTML page).")] = None,
) -> None:
    """Score prediction files of VLMEvalKit on benchmarks and their degraded copies (docs/DATA.md).

    Tables of several models, or one of the options from --reference on, make a leaderboard (docs/LEADERBOARD.md).
    """
    from clear.bench.vlmeval import collect, scores
    from clear.data.io import replacing, write_json, write_text

    outputs = {"--json": out, "--rows": rows, "--markdown": markdown, "--html": html}
    _refuse_outputs({option: path for option, path in outputs.items() if path is not None}, files, manifest)
    several = len({*collect.models_of(files)} - {""}) > 1
    if several or reference or published or manifest or markdown or html:
        from clear.bench.vlmeval.leaderboard import leaderboard
        from clear.bench.vlmeval.published import rows as published_rows
        from clear.report import leaderboard as forms

        frame, report = _scored(collect.read(files, manifest), judge)
        found = leaderboard(frame, reference, report.get("model", ""))
        if published:
            found["published"], notes = published_rows(found)
            found["notes"] += notes
        shown = forms.text(found)
        for path, form in ((markdown, forms.markdown), (html, forms.html)):
            if path is not None:
                write_text(path, form(found))
    else:
        frame, report = _scored(scores.read_predictions(files), judge)
        found = scores.summary(frame, collect.no_average(frame))
        shown = scores.table(found)
    if report:
        found["judge"] = report
    if out is not None:
        write_json(out, found)
    if rows is not None:
        with replacing(rows, several=True) as partial:
            frame.to_parquet(partial, index=False)
    say(shown)
    rejected = frame["reject"][frame["reject"] != ""]
    if len(rejected):
        say(f"{len(rejected)} rows have no verdict and are in no figure; the first: {rejected.iloc[0]}", sys.stderr)


def _refuse_outputs(outputs: dict[str, Path], tables: list[Path], manifest: Path | None) -> None:
    """Raise ClearError, before the work, for an output (by option) that is a folder, or a file of another use."""
    known: dict[Path, str] = {}
    for table in (path for path in tables if path.name):
        said = f"is where `clear answer` keeps what it knows of {table.name}"  # the leaderboard reads the record
        known |= {table.with_name(table.stem + end).resolve(): said for end in BESIDE}
    known |= {path.resolve(): "is one of the files to be read" for path in [*tables, manifest] if path is not None}
    for option, path in outputs.items():
        if path.is_dir():  # else it would be refused in the same words after the work
            raise ClearError(f"{path}: Is a directory; correct the path.")
        if path.exists() and not path.is_file():
            continue  # /dev/stdout, which may have several
        if path.resolve() in known:
            raise ClearError(f"{option} {path}: {known[path.resolve()]}; name another file.")
        known[path.resolve()] = f"is what {option} writes"


def _scored(frame: "pd.DataFrame", judge: bool) -> "tuple[pd.DataFrame, dict]":
    """The rows with their scores, and what the judge says of itself; nothing where there is none."""
    from contextlib import nullcontext

    from tqdm import tqdm

    from clear.bench.vlmeval import scores
    from clear.config import load
    from clear.data.workspace import replies_file
    from clear.llm.endpoint import connect

    with connect(load().judge, "judge", replies_file("judge")) if judge else nullcontext() as client:
        with tqdm(desc="judge", unit="question", disable=not judge) as bar:
            frame = scores.score(frame, client, bar.update)
        if client is None:
            return frame, {}
        from clear.bench.judge import prompt_hash

        return frame, client.report() | {"prompts": prompt_hash()}


def mmd_bench(
    source: Annotated[Path, typer.Option(readable=False, help="VLMEvalKit's LMUData folder, or one TSV of it.")],
    out: Annotated[Path, typer.Option(help="Folder for the degraded TSVs and manifest.parquet.")],
    protocol: Annotated[
        str, typer.Option(help="row: one corruption per picture at three levels; full: all 16, in 48 files.")
    ] = "row",
    names: Annotated[
        str, typer.Option(help="With full: ours, or authors: their names, 16 files at level high.")
    ] = "ours",
    scale: Annotated[float, typer.Option(help="Factor on sizes in pixels; 1 = as published.")] = 1.0,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 = one per core.")] = 0,
) -> None:
    """Write degraded benchmark files (TSV) that VLMEvalKit reads; the stage `mmd_bench` makes this project's own.

    The same command again continues after an interruption. Files that cannot be read and rows that cannot be degraded
    are left out, are listed in rejects.parquet and make the exit status 1. docs/DATA.md says how to evaluate.
    """
    from clear.bench.vlmeval.tsv import NAMES, PROTOCOLS, REJECTS, write_benchmarks
    from clear.data.rejects import read_rejects
    from clear.sources.lmudata import FILE

    if not 0 < scale <= 100:
        raise ClearError(f"--scale {scale:g}: a number above 0 and at most 100; 1 = as published.")
    if protocol not in PROTOCOLS:
        raise ClearError(f"--protocol {protocol}: choose one of {', '.join(PROTOCOLS)}.")
    if names not in NAMES or (names == "authors" and protocol != "full"):
        raise ClearError(f"--names {names}: choose one of {', '.join(NAMES)}, authors with --protocol full only.")
    if not os.path.lexists(source):
        raise ClearError(f"--source {source}: nothing is there; name a folder with VLMEvalKit's TSV files.")
    for file in write_benchmarks(source, out, protocol, scale, workers, say, names):
        say(str(file))
    say(str(out / "manifest.parquet"))
    if rejects := read_rejects(out / REJECTS):
        files = sum(reject.reason == FILE for reject in rejects)
        counts = {"files that cannot be read": files, "rows that cannot be degraded": len(rejects) - files}
        said = ", ".join(f"{what} and were left out: {number}" for what, number in counts.items() if number)
        raise ClearError(
            f"{said}; all others are written. {out / REJECTS} has them, the first: "
            f"{rejects[0].id} ({rejects[0].reason}): {rejects[0].detail}"
        )
