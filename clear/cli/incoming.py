"""`clear incoming …`: the sets of naturally degraded images in data/incoming."""

from typing import Annotated

import typer

from clear.errors import say

app = typer.Typer(help="Naturally degraded images: the sets of data/incoming.", no_args_is_help=True)


@app.command("list")
def list_sets(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """List the sets with a fingerprint of their content."""
    import json
    from dataclasses import asdict

    from clear.data.workspace import profile
    from clear.sources.incoming import FOLDER, sets

    profile()  # else a folder that is no workspace would pass for one without sets
    found = sets()
    if as_json:
        say(json.dumps({"sets": [asdict(one) for one in found]}, indent=1))
        return
    for one in found:
        state = f"{one.files} files, {one.size / 1e6:.1f} MB, {one.fingerprint[:12]}" if one.present else "not pulled"
        say(f"{one.name}: {state}")
        for fault in one.faults:
            say(f"  cannot be read: {fault}")
    if not found:
        say(f"no set in {FOLDER}; docs/DEGRADATIONS.md says what to put there.")


@app.command("check")
def check_one(
    name: Annotated[str, typer.Argument(help="A folder of data/incoming.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Check one set and write a report: exit status 0 if the pipeline can take it in, else 1."""
    import json

    from clear.config import load
    from clear.data.lock import making
    from clear.data.workspace import report_dir
    from clear.validation.incoming import check as check_set
    from clear.validation.incoming import lines

    with making(report_dir(create=False) / "incoming" / name, "clear incoming check"):
        verdict = check_set(name, load())
    say(json.dumps(verdict.as_json(), indent=1) if as_json else "\n".join(lines(verdict)))
    raise typer.Exit(0 if verdict.success else 1)
