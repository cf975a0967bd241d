"""Commands for VLMEvalKit's files: score its predictions, degrade its benchmarks."""

import os
from pathlib import Path
from typing import Annotated

import typer

from clear.errors import ClearError, naming


def score(
    files: Annotated[
        list[Path], typer.Argument(help="Tables of predictions (TSV, xlsx, CSV, Parquet, JSON), one per set.")
    ],
    out: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Write the scored rows here (Parquet).")] = None,
    judge: Annotated[
        bool, typer.Option("--judge", help="Grade MM-Vet and unmatched answers by the endpoint `judge` of params.yaml.")
    ] = False,
) -> None:
    """Score prediction files of VLMEvalKit on benchmarks and their degraded copies (docs/DATA.md)."""
    from contextlib import nullcontext

    from tqdm import tqdm

    from clear.bench.vlmeval import scores
    from clear.config import load
    from clear.data.io import write_json
    from clear.data.workspace import replies_file
    from clear.llm.endpoint import connect

    frame = scores.read_predictions(files)
    with connect(load().judge, "judge", replies_file("judge")) if judge else nullcontext() as client:
        with tqdm(desc="judge", unit="question", disable=not judge) as bar:
            frame = scores.score(frame, client, bar.update)
        found = scores.summary(frame)
        if client is not None:
            from clear.bench.judge import prompt_hash

            found["judge"] = client.report() | {"prompts": prompt_hash()}
    typer.echo(scores.table(found))
    if found["rejected"]:
        reason = frame["reject"][frame["reject"] != ""].iloc[0]
        typer.echo(f"{found['rejected']} rows have no verdict and are in no figure; the first: {reason}", err=True)
    if out is not None:
        write_json(out, found)
    if rows is not None:
        rows.parent.mkdir(parents=True, exist_ok=True)
        with naming(rows):
            frame.to_parquet(rows, index=False)


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

    if protocol not in PROTOCOLS:
        raise ClearError(f"--protocol {protocol}: choose one of {', '.join(PROTOCOLS)}.")
    if names not in NAMES or (names == "authors" and protocol != "full"):
        raise ClearError(f"--names {names}: choose one of {', '.join(NAMES)}, authors with --protocol full only.")
    if not os.path.lexists(source):
        raise ClearError(f"--source {source}: nothing is there; name a folder with VLMEvalKit's TSV files.")
    for file in write_benchmarks(source, out, protocol, scale, workers, typer.echo, names):
        typer.echo(str(file))
    typer.echo(str(out / "manifest.parquet"))
    if rejects := read_rejects(out / REJECTS):
        files = sum(reject.reason == FILE for reject in rejects)
        counts = {"files that cannot be read": files, "rows that cannot be degraded": len(rejects) - files}
        said = ", ".join(f"{what} and were left out: {number}" for what, number in counts.items() if number)
        raise ClearError(
            f"{said}; all others are written. {out / REJECTS} has them, the first: "
            f"{rejects[0].id} ({rejects[0].reason}): {rejects[0].detail}"
        )
