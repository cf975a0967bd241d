"""What `make kill` kills: every stage of dvc.yaml, and the long commands a person types.

The workspace is the smoke profile with few samples and few steps, a checkpoint after every second one.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.incoming_sets import put
from tests.helpers.stages import STAGES, entry_of, made_by
from tests.helpers.tables import b64, mmbench, picture, write_tsv

OVERRIDES = [
    "profile=smoke",
    "runtime.threads=1",
    "runtime.checkpoint_every=2",
    "runtime.log_every=2",
    "degrade.workers=2",
    "source={pretrain: 24, sft: 24, rl: 8, validation: 16, bench: 16, development: 16}",
    *(f"base.{phase}={{steps: 6, warmup: 1, batch: 8}}" for phase in ("vit", "vae", "joint")),
    *(f"sft.{phase}={{steps: 6, warmup: 1, batch: 8}}" for phase in ("restoration", "traces")),
    *(f"bridge.{phase}={{steps: 4, warmup: 1, batch: 8}}" for phase in ("distill", "answer", "decide")),
    "grpo={steps: 4, prompts: 2, group_size: 2, warmup: 1, holdout_every: 2}",
    "sampling.flow_steps=2",
    "evaluate.bootstrap=50",
]


@dataclass(frozen=True)
class Command:
    """What is typed after `python -m clear`, the files and folders that it makes, and what it needs beside the results
    of all stages. Of a command that makes none, what it prints is compared; files that end in `timed` hold seconds, and
    are not. `refuses` is what it says to a result that is there."""

    arguments: tuple[str, ...]
    makes: tuple[str, ...] = ()
    needs: Callable[[Path], object] = lambda folder: None
    timed: tuple[str, ...] = ()
    refuses: str = ""


def stages() -> dict[str, Command]:
    """The stages of dvc.yaml in its order, `evaluate` for one model."""

    def of_grpo(text: str) -> str:
        return text.replace("${key}", "grpo")

    return {
        name: Command(tuple(of_grpo(entry_of(name)["cmd"]).split()[3:]), tuple(map(of_grpo, made_by(name))))
        for name in STAGES
    }


def _tables(folder: Path) -> None:
    mmbench(folder / "tables")


def _asked(folder: Path) -> None:
    """A benchmark in the words of the small model."""
    rows = [{"index": i, "image": b64(picture(i)), "question": "which colour ?", "answer": "red"} for i in range(24)]
    write_tsv(folder / "tables/MMVet.tsv", rows)


def _predicted(folder: Path) -> None:
    """The answers of two models to one benchmark, on clean and on degraded pictures."""
    for model, wrong in (("left", 3), ("right", 4)):
        for level in ("", "_dark_HIGH"):
            asked = {"question": "which ?", "A": "red", "B": "blue", "answer": "A", "category": "colour"}
            rows = [asked | {"index": i, "prediction": "B" if i % wrong == 0 else "A"} for i in range(60)]
            write_tsv(folder / f"tables/{model}_MMStar{level}.tsv", rows)
    (folder / "made").mkdir()


def _other_side(folder: Path) -> None:
    """Other results to compare with: those of a folder whose answers are the base's alone."""
    for name in ("predictions", "metrics"):
        shutil.copytree(folder / "data" / name, folder / "other/data" / name)


OTHERS = {
    "mmd-bench": Command(
        ("mmd-bench", "--source", "tables", "--out", "made", "--protocol", "full", "--workers", "2"), ("made",), _tables
    ),
    "answer": Command(
        ("answer", "tables/MMVet.tsv", "--model", "data/models/grpo", "--out", "made", "--prompt", "plain"),
        ("made",),
        _asked,
        (".jsonl", ".parquet"),
    ),
    "export": Command(
        ("export", "data/models/bridge", "made", "--evaluation", "bridge"),
        ("made",),
        refuses="made exists and is not empty",
    ),
    "score": Command(
        (
            *("score", "tables/left_MMStar.tsv", "tables/left_MMStar_dark_HIGH.tsv", "tables/right_MMStar.tsv"),
            *("tables/right_MMStar_dark_HIGH.tsv", "--reference", "left", "--json", "made/score.json"),
            *("--rows", "made/rows.parquet", "--markdown", "made/board.md", "--html", "made/board.html"),
        ),
        ("made",),
        _predicted,
    ),
    "compare": Command(("compare", "other", ".", "--out", "made"), ("made",), _other_side),
    "incoming check": Command(
        ("incoming", "check", "fog", "--json"), (), lambda folder: put(folder / "data/incoming/fog", range(24))
    ),
}
