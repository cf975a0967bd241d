"""Commands about what was made: releases of models, where an output comes from, and what nobody needs any more."""

from pathlib import Path
from typing import Annotated

import typer

from clear.errors import ClearError, say


def release(
    model: Annotated[str, typer.Argument(help="A model of `artifacts` in dvc.yaml; default: gate.model.")] = "",
    version: Annotated[str, typer.Argument(help="The new version, such as v1.2.0.")] = "",
    stage: Annotated[
        str, typer.Option(help="Stage it is meant for: the gate compares with the version that is there.")
    ] = "prod",
    assign: Annotated[
        tuple[str, str] | None,
        typer.Option("--assign", metavar="STAGE VERSION", help="Put a version into a stage; a former one goes back."),
    ] = None,
    history: Annotated[
        bool, typer.Option("--history", help="List versions and assignments, the newest first.")
    ] = False,
    because: Annotated[
        str, typer.Option(help="A person's reason where the gate cannot decide; goes into the tag.")
    ] = "",
    push: Annotated[
        bool, typer.Option("--push", help="Push what was made; else the command for it is printed.")
    ] = False,
) -> None:
    """Release a model: gate, cards, commit and tag; or put a version into a stage (docs/RELEASE.md)."""
    from clear.config import load
    from clear.data.io import aligned
    from clear.project.release import publish, registry

    if bool(version) + bool(assign) + history != 1:
        raise ClearError("say one thing: MODEL and VERSION, or --assign STAGE VERSION, or --history.")
    model = model or load().gate.model
    if history:
        registry.artifact(Path(), model)
        rows = [
            (event.when, event.what, event.version, event.stage, event.commit[:10], event.author)
            for event in registry.history(Path(), model)
        ]
        lines = aligned([("when", "what", "version", "stage", "commit", "by"), *rows]) if rows else []
        for line in lines or [f"{model} has no release yet; `clear release {model} v0.1.0` makes one."]:
            say(line)
        return
    if assign:
        lines = publish.assign(Path(), model, *assign, because, push)
    else:
        lines = publish.release(Path(), model, version, stage, because, push)
    for line in lines:
        say(line)


def lineage(
    path: Annotated[str, typer.Argument(help="An output, a file in one, or a release: @prod, grpo@v1.2.0.")],
    revision: Annotated[
        str, typer.Option("--rev", help="As this commit has it; default: dvc.lock as it is here.")
    ] = "",
    full: Annotated[bool, typer.Option("--full", help="Data, parameters and code of every stage behind it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All of it, machine-readable.")] = False,
) -> None:
    """Print what made an output: data, code, parameters, parents, machine; and whether it can be made again here."""
    from clear.project.lineage import lineage as trace

    found = trace(Path(), path, revision)
    say(found.json() if as_json else found.text(full))


def tidy(
    days: Annotated[float, typer.Option(help="Younger objects stay, and what younger commits name.")] = 30.0,
    remote: Annotated[bool, typer.Option("--remote", help="DVC's default remote too, not the cache alone.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Remove it; without, it is only listed.")] = False,
    also: Annotated[
        list[Path] | None, typer.Option(metavar="FOLDER", help="Another clone that shares the cache.")
    ] = None,
) -> None:
    """Find data in DVC's cache and remote that no release, branch, pull request or running flow needs."""
    from clear.project.tidy import tidy as find

    for line in find(Path(), days, remote, remove, also or []).lines():
        say(line)
