"""The page's data: predictions of every model, the images they saw, and answers requested on the page."""

from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from clear.bench import predictions
from clear.bench.models import MODELS, UnderTest, under_test
from clear.bench.predictions import KEY
from clear.data.records import Question, Sample
from clear.errors import ClearError
from clear.report.claims import NAMES
from clear.report.gallery import find

if TYPE_CHECKING:
    import pandas as pd

    from clear.reasoning.answering import Answerer
    from clear.reasoning.ask import Asked
    from clear.schema import Config

ALL = "all"
EVERY, WRONG, RIGHT, RESTORED, GAINED, LOST = (
    "every answer",
    "wrong",
    "right",
    "restored",
    "right here, wrong there",
    "wrong here, right there",
)
FILTERS = (EVERY, WRONG, RIGHT, RESTORED, GAINED, LOST)
"""Which answers are listed; the last two compare with another model."""
PARTS = ("clean", "degraded", "incoming", "extra")


def evaluated(root: Path) -> list[str]:
    """The models with predictions in `root`, in the order of the report. Raises ClearError where there is none."""
    found = [name for name in MODELS if (root / "data/predictions" / f"{name}.parquet").exists()]
    if not found:
        raise ClearError(f"{root.resolve()}/data/predictions: no model was evaluated here; run `make repro` first.")
    return found


def stamp(root: Path) -> tuple:
    """Changes whenever predictions, benchmark or parameters do; what is kept in memory is kept under it."""
    files = [root / "params.yaml", *(root / "data/predictions").glob("*.parquet"), *(root / "data/bench").glob("*/*")]
    return tuple(sorted((str(file), file.stat().st_mtime_ns) for file in files if file.is_file()))


def load(root: Path) -> "tuple[dict[str, pd.DataFrame], list[str]]":
    """(predictions by model, the benchmark's and those beyond it, indexed by KEY; what was left out, in words).

    Column `number` is the question's place among those of its part, which seeds its restoration. Kept are the questions
    that all models were asked, with the same text and right answer: models are compared on them. Raises ClearError as
    predictions.read, for no model, and for models that share no question.
    """
    import pandas as pd

    frames: dict[str, pd.DataFrame] = {}
    for name in evaluated(root):
        path = root / "data/predictions" / f"{name}.parquet"
        parts = [read(path) for read in (predictions.read, predictions.read_incoming, predictions.read_extra)]
        parts = [part.assign(number=range(len(part))) for part in parts if len(part)]
        frames[name] = pd.concat(parts, ignore_index=True).set_index(KEY).sort_index()
    # A key alone may be another benchmark's: the pictures of another seed have the same names.
    asked = pd.concat([frame.text + "\0" + frame.answer for frame in frames.values()], axis=1, join="inner")
    shared = asked.index[asked.eq(asked.iloc[:, 0], axis=0).all(axis=1)].sort_values()
    remedy = "they were evaluated on different benchmarks; run `make repro`"
    if not len(shared):
        raise ClearError(f"{root.resolve()}/data/predictions: {', '.join(frames)} share no question: {remedy}.")
    lost = {name: len(frame) - len(shared) for name, frame in frames.items()}
    said = [f"{n} of the {len(frames[name])} answers of {NAMES[name]}" for name, n in lost.items() if n]
    notes = [f"Left out, because not every model was asked the same: {', '.join(said)}; {remedy}."] if said else []
    return {name: frame.loc[shared] for name, frame in frames.items()}, notes


def select(
    frames: "dict[str, pd.DataFrame]", model: str, other: str, corruption: str, severity: str, task: str, show: str
) -> list[tuple]:
    """Keys of the answers of `model` that are asked for, in order; ALL leaves a column open."""
    frame, there = frames[model], frames[other].correct
    kept = np.ones(len(frame), bool)
    for column, wanted in (("corruption", corruption), ("severity", severity)):
        kept &= (wanted == ALL) | (frame.index.get_level_values(column) == wanted)
    kept &= (task == ALL) | (frame.task == task).to_numpy()
    here = frame.correct.to_numpy()
    kept &= {
        EVERY: True,
        WRONG: ~here,
        RIGHT: here,
        RESTORED: frame.restored.to_numpy(),
        GAINED: here & ~there.to_numpy(),
        LOST: ~here & there.to_numpy(),
    }[show]
    return list(frame.index[kept])


def sample_of(root: Path, key: tuple) -> Sample | None:
    """The benchmark's sample of a key, or None where data/bench is not on this machine."""
    folders = [root / "data/bench" / part for part in PARTS]
    return find([folder for folder in folders if folder.is_dir()], {key[:3]}).get(key[:3])


class Models:
    """The models of a workspace, loaded when first asked, the last one kept. Sessions take turns."""

    def __init__(self, root: Path) -> None:
        """Raises ClearError where params.yaml is missing or wrong."""
        from clear.config import load as load_config
        from clear.model.runtime import apply_runtime
        from clear.model.weights import with_local_weights

        self.root = root
        self.config: Config = with_local_weights(load_config(root / "params.yaml"), "ask")
        apply_runtime(self.config)
        self._held: tuple[Path, Answerer] | None = None
        self._turn = Lock()

    def here(self) -> list[str]:
        """The models whose weights are on this machine."""
        return [name for name in MODELS if self._tested(name).folder.exists()]

    def _tested(self, model: str) -> UnderTest:
        tested = under_test(model, self.config)
        return replace(tested, folder=self.root / tested.folder)

    def ask(self, model: str, image: bytes, question: Question, restore: str = "", number: int = 0) -> "Asked":
        """Ask about an encoded image. `restore` is a mode of the engine, or "" as in the evaluation; `number` seeds it.

        Raises ClearError for weights or an image that cannot be read, and for words the model does not know.
        """
        from clear.reasoning.answering import Answerer
        from clear.reasoning.ask import reply

        tested = self._tested(model)
        with self._turn:
            if self._held is None or self._held[0] != tested.folder:
                if not tested.folder.exists():
                    raise ClearError(
                        f"{tested.folder}: no model here; run `make repro`, or `dvc pull {tested.folder}`."
                    )
                self._held = tested.folder, Answerer.load(tested.folder, self.config)
            how = restore or tested.restore, tested.feedback, number
            return reply(self._held[1], image, "this picture", question, *how)
