"""Commands that judge a change: the lock against the code, and one revision against another.

Their exit status is an answer (0 yes, 1 no), so a file that cannot be read ends them with 2: cannot say.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from clear.errors import ClearError, judging, say


def check() -> None:
    """Compare dvc.lock with parameters, code and committed results; needs no data and no cache.

    Exit status 0: they agree. 1: they do not. 2: cannot say, because a file cannot be read.
    """
    from clear.project.check import drifts

    with judging():
        found = drifts(Path())
        for line in found:
            say(line, sys.stderr)
        if found:
            say(f"{len(found)} drift{'s' if len(found) > 1 else ''} found.", sys.stderr)
        else:
            say("dvc.lock, params.yaml, code and committed results agree.")
    raise typer.Exit(1 if found else 0)


def compare(
    base: Annotated[str, typer.Argument(help="A revision (its merge base with HEAD counts), or a folder with data/.")],
    head: Annotated[str, typer.Argument(help="A revision, or a folder with data/ (`.` is this one).")] = "HEAD",
    out: Annotated[Path | None, typer.Option(help="Folder for the files; default: data/report/compare.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="md (printed if --out is not given), html, json or all.")
    ] = "md",
) -> None:
    """Compare the committed predictions, data and parameters of two revisions.

    Exit status 0: the report is made, whatever it says. 2: it cannot be made; a revision or a file cannot be read.
    """
    from clear.project.compare import render
    from clear.project.compare.load import read_sides
    from clear.project.compare.verdict import decide

    if form not in (*render.FORMATS, "all"):
        raise ClearError(f"--format {form}: choose one of {', '.join(render.FORMATS)} or all.")
    with judging():
        found, verdict = decide(*read_sides(Path(), base, head))
        if form == "md" and out is None:
            said = [render.markdown(found, verdict).removesuffix("\n")]
        else:
            formats = render.FORMATS if form == "all" else (form,)
            said = render.write(found, verdict, out or Path("data/report/compare"), formats)
        for text in said:
            say(text)


def gate(
    base: Annotated[str, typer.Argument(help="As in compare.")],
    head: Annotated[str, typer.Argument(help="As in compare.")] = "HEAD",
) -> None:
    """Decide by the policy in params.yaml whether a change may pass.

    Exit status 0: yes. 1: no. 2: cannot decide; the sides are not comparable, a revision is not in this clone, or a
    file cannot be read.
    """
    from clear.project.compare.load import read_sides
    from clear.project.compare.verdict import decide, report_lines

    with judging():
        _, verdict = decide(*read_sides(Path(), base, head), detail=False)
        for line in report_lines(verdict):
            say(line)
    raise typer.Exit(verdict.status)
