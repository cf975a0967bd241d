"""Commands about this project's folder: its results, its parameters, a run of it aside."""

import importlib
from pathlib import Path
from typing import Annotated

import typer

from clear.errors import ClearError, say
from clear.schema import PROFILES

_NAMES = f"{', '.join(PROFILES[:-1])} or {PROFILES[-1]}"


def results(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The tables of README, from data/metrics.")] = False,
) -> None:
    """Print the result table, beside the committed figures where they differ, and the report's path."""
    from clear.project.results import markdown, render

    say(markdown(Path()) if as_markdown else render(Path()))


def params(
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As in Hydra: profile=smoke, grpo.lr=1e-5.")
    ] = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="The other way: write what was changed in params.yaml into clear/conf.")
    ] = False,
) -> None:
    """Compose clear/conf into params.yaml."""
    from clear.config import PARAMS
    from clear.project.scratch import write_params

    if adopt:
        from clear.project.adopt import adopt as adopt_params

        if overrides:
            raise ClearError("--adopt takes the values of params.yaml; leave --set out.")
        changed = adopt_params(Path())
        for line in changed or ["clear/conf composes to params.yaml already."]:
            say(line)
        return
    write_params(PARAMS, overrides or [])
    say(f"{PARAMS} written.")


def memory(
    profile: Annotated[str, typer.Option(help=f"{_NAMES}; default: params.yaml.")] = "",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With --profile: sft.traces.batch=1.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Devices that share weights and batch (FSDP).")] = 1,
    cards: Annotated[
        bool, typer.Option(help="All profiles of BAGEL-7B and types of weights, with the smallest card each fits.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Bytes, machine-readable.")] = False,
) -> None:
    """Estimate the memory each stage needs, before anything is loaded."""
    import json
    from dataclasses import asdict

    from clear.config import compose, from_dict, load

    if cards:
        if profile or overrides:
            raise ClearError("--cards lists every profile as it is; leave --profile and --set out.")
        fitting = importlib.import_module("clear.training.cards")
        found = fitting.rows(gpus)
        say(json.dumps([asdict(row) for row in found], indent=2) if as_json else fitting.table(found))
        return
    if overrides and not profile:
        raise ClearError("--set changes a composed profile; name it with --profile, or edit params.yaml.")
    config = from_dict(compose([f"profile={profile}", *(overrides or [])])) if profile else load()
    module = importlib.import_module("clear.training.memory")
    vocab = module.BAGEL_VOCABULARY
    if config.base.joint.steps:  # trained from scratch, on a closed vocabulary
        from clear.model.tokenizer import word_tokenizer
        from clear.training.build import scene_words

        vocab = word_tokenizer(scene_words()).get_vocab_size()
    found = [module.estimate(config, stage, vocab, gpus) for stage in module.STAGES]
    if as_json:
        content = {"profile": config.profile, "gpus": gpus, "stages": [asdict(one) for one in found]}
        say(json.dumps(content, indent=2))
    else:
        say(module.report(found, config.profile, gpus))


def scratch(
    profile: Annotated[str, typer.Argument(help=f"{_NAMES}.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As in Hydra: grpo.group_size=4.")
    ] = None,
) -> None:
    """Run the pipeline under another profile in a copy of this folder; nothing tracked here changes."""
    from clear.project.results import render
    from clear.project.scratch import run

    say(render(run(Path(), profile, overrides or [])))
