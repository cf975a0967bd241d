"""`clear watch`: whether new, unlabelled pictures are still what the model was trained on."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from clear.errors import UNDECIDED, ClearError, judging, say


def watch(
    place: Annotated[
        str, typer.Argument(help="A folder, or s3://bucket/prefix; everything below it is looked at.")
    ] = "",
    reference: Annotated[
        str, typer.Option(help="Whose training data to compare with: @prod, @v1.2.0; default: this folder's.")
    ] = "",
    damaged: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the reference that has training's damage; 0 = clean pictures.")
    ] = 0.0,
    alpha: Annotated[float, typer.Option(min=0.001, max=0.5, help="False alarms, as a share of the nights.")] = 0.01,
    since: Annotated[float, typer.Option(min=0, max=10**6, help="Only files changed in so many hours; 0 = all.")] = 0.0,
    limit: Annotated[int, typer.Option(min=1, help="Pictures that are measured at most.")] = 2000,
    night: Annotated[str, typer.Option(help="Name of the night; default: today, UTC.")] = "",
    answers: Annotated[
        Path | None, typer.Option(help="Parquet of `clear answer`, or a folder: the model's share of restorations.")
    ] = None,
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Show thumbnails in the report.")] = True,
    collect: Annotated[
        Path | None, typer.Option(help="Copy pictures into this new folder, as a set to be labelled.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures, machine-readable.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Simulate nights of the reference: false alarms and power.")
    ] = False,
) -> None:
    """Compare unlabelled pictures with what a model was trained on (docs/DRIFT.md).

    Exit status 0: no change. 1: they have changed. 2: cannot say; too few pictures, or something is missing.
    """
    import json

    from clear.drift import power
    from clear.drift.night import SAME, TOO_FEW, lines
    from clear.project.watch import Wishes, calibrated
    from clear.project.watch import watch as run

    with judging():
        if bool(place) == calibrate:
            raise ClearError("name a folder or s3://bucket/prefix to watch, or give --calibrate alone.")
        if calibrate:
            file = calibrated(Path(), reference, damaged, alpha)
            say(f"{power.enough(power.figures(file))}\n{file} written.")
            return
        wishes = Wishes(reference, damaged, alpha, since, limit, night, answers, pictures, collect)
        found, page = run(Path(), place, wishes, lambda line: say(line, sys.stderr))
        for line in [json.dumps(found.as_json(), indent=1)] if as_json else [*lines(found), f"report: {page}"]:
            say(line)
    if found.verdict != SAME:
        raise typer.Exit(UNDECIDED if found.verdict == TOO_FEW else 1)
