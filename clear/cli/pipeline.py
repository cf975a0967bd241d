"""The pipeline's stages as commands, named as in dvc.yaml; normally `dvc repro` runs them, in the project's folder."""

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from clear.bench.models import MODELS
from clear.errors import ClearError, say
from clear.schema import Config

STAGES = {
    "source": "Clean samples, split once.",
    "degrade": "Degraded copies for training and validation.",
    "mmd_bench": "The benchmark, clean and degraded.",
    "validate": "Check that the data is what it claims to be.",
    "base": "Train the model that has seen no degraded question, or register a checkpoint.",
    "traces": "Demonstrations: restore and answer, or answer directly.",
    "sft": "Supervised fine-tuning on the traces.",
    "sft_direct": "The baseline without restoration.",
    "bridge": "Train the latent representation bridge.",
    "grpo": "Interleaved GRPO.",
}
REPORT = "Render tables, statistics and pictures."


def run_stage(name: str, module: str, *args: Any, **kwargs: Any) -> None:
    """Run `clear.stages.<module>.run(config, …)` on the parameters of this folder and record its cost as `name`.

    One stage runs in a folder at a time: a second one raises Busy, which says who is in the way (clear/data/lock.py).
    Raises ClearError where its parameters or code are edited meanwhile (`require_unedited`).
    """
    from clear.config import load
    from clear.data import lock
    from clear.data.workspace import require_unedited, stage_run, unedited
    from clear.model.weights import with_local_weights

    first = int(os.environ.get("RANK", 0)) == 0  # of several processes that train one model, one stands for all
    with unedited() if first else nullcontext():
        config = with_local_weights(load(), module)
        _say_if_too_large(config, module)
        with lock.stage(Path.cwd(), name) if first else nullcontext(), stage_run(name):
            require_unedited()  # the weights, and the lock, may have been waited for
            importlib.import_module(f"clear.stages.{module}").run(config, *args, **kwargs)
            require_unedited()


def _say_if_too_large(config: Config, module: str) -> None:
    """Before minutes of loading: say that a stage of a given checkpoint needs more memory than the card has."""
    stage = {"traces": "evaluate"}.get(module, module)
    sized = stage in ("sft", "bridge", "grpo", "evaluate")
    if not sized or not config.model.checkpoint or config.runtime.device == "cpu":
        return
    import torch

    if torch.cuda.is_available():
        cards = importlib.import_module("clear.training.cards")
        device, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        text = cards.too_small(config, stage, torch.cuda.get_device_properties(device).total_memory, world)
        if text:
            say(f"note: {text}", sys.stderr)


def stage(name: str) -> Callable[[], None]:
    """The command that runs a stage without arguments."""

    def command() -> None:
        if name == "sft_direct":
            run_stage(name, "sft", direct=True)
        else:
            run_stage(name, name)

    return command


def evaluate(
    model: Annotated[str, typer.Argument(help=f"{', '.join([*MODELS][:-1])} or {[*MODELS][-1]}.")],
    development: Annotated[
        bool, typer.Option("--development", help="Answer data/development, where recipes are compared, instead.")
    ] = False,
) -> None:
    """Run MMD-Bench for one model."""
    if model not in MODELS:
        raise ClearError(f"evaluate {model}: choose one of {', '.join(MODELS)}.")
    if development:
        from clear.config import load
        from clear.model.weights import with_local_weights
        from clear.stages.evaluate import run_development

        say(f"figures: {run_development(with_local_weights(load(), 'evaluate'), model)}")
        return
    run_stage(f"evaluate_{model}", "evaluate", model)


def seeds(
    wanted: Annotated[list[int] | None, typer.Argument(help="Seeds to run; none: only render the page again.")] = None,
) -> None:
    """Run the pipeline under several seeds, one after the other, and write docs/RESULTS.md from all there are."""
    from clear.project import seeds as several

    say(f"results: {several.run(Path.cwd(), wanted or [])}")


def ablations(
    wanted: Annotated[list[str] | None, typer.Argument(help="Names in clear/conf/ablations.yaml; none: all.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="A seed that `make results` ran here; default: the committed one.")
    ] = None,
) -> None:
    """Change one setting at a time, run what it reaches, and add the comparison to docs/RESULTS.md."""
    from clear.project import ablations as changed

    say(f"results: {changed.run(Path.cwd(), wanted or list(changed.listed()), seed)}")
