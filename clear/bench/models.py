"""The models that are compared, and how each one answers: the list used by stages, report, page and flows.

dvc.yaml and `gate.model` of params cannot import it; tests/test_pipeline.py checks that they agree with it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clear.errors import ClearError

if TYPE_CHECKING:
    from clear.schema import Config

MODELS = {
    "base": ("base", "plain", "bridge"),
    "sft_direct": ("sft_direct", "plain", "bridge"),
    "sft": ("sft", "auto", "reencode"),
    "reencode": ("bridge", "auto", "reencode"),
    "bridge": ("bridge", "auto", "bridge"),
    "grpo": ("grpo", "auto", "bridge"),
}
"""Model name → (folder under data/models, restoration mode, feedback), in the order of the report. `sft` reads its
pictures by decode-reencode until the mlp bridge is trained; with the parameter-free `direct` bridge it answers through
the bridge path."""


def evaluations(folder: str) -> list[str]:
    """The names under which the model of a folder below data/models is evaluated."""
    return [name for name, (of, *_) in MODELS.items() if of == folder]


@dataclass(frozen=True)
class UnderTest:
    """A model under test: its folder, how it restores and reads what it restored (Options of the engine)."""

    folder: Path
    restore: str
    feedback: str
    config: "Config"
    digest: str = ""
    """What the files of the folder must be (clear/bench/answers.py); empty where it is this machine's own."""
    latents: Path | None = None
    """The folder in which the latents of what it is shown are kept (clear/model/latents.py)."""


def under_test(model: str, config: "Config") -> UnderTest:
    """How a model of MODELS answers under `config`; its folder is one of the working directory."""
    if model not in MODELS:
        raise ClearError(f"evaluate: model '{model}' is not one of {', '.join(MODELS)}.")
    from clear.data.workspace import latents_dir, model_folder

    folder, restore, feedback = MODELS[model]
    if model == "sft" and config.bridge.kind == "direct":
        feedback = "bridge"
    return UnderTest(model_folder(folder, config), restore, feedback, config, latents=latents_dir())
