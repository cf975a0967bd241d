"""The JSON files that a comparison reads: metrics of the stages (data/metrics) and run records, refused where damaged.

`clear gate` answers by its exit status, so a file that holds something else than its stage writes must end it with one
line here, and not somewhere in a report. Only what is read is checked: a revision may have figures of its own.
"""

import json
from pathlib import Path
from types import NoneType
from typing import Any

from clear.bench.models import MODELS
from clear.errors import ClearError

REWARDS = {
    "last_reward": "reward at the last step",
    "last_reward_accuracy": "rewarded accuracy at the last step",
    "holdout_before": "held-out accuracy before",
    "holdout_after": "held-out accuracy after",
    "first_call_rate": "call rate at the first step",
    "last_call_rate": "call rate at the last step",
    "last_kl": "KL at the last step",
    "last_ratio_error": "largest |ratio − 1| at the last step",
}
"""What is compared of GRPO's metrics, in words."""

_NUMBER = (int, float, NoneType)
_CHECKED = {"failed": [{}], "images_shared_with_training": _NUMBER, "samples_looking_like_training": _NUMBER}
METRICS = {
    "validate": {"datasets": {...: _CHECKED}},
    "source": {"images": {}},
    "degrade": {"images": {...: {...: {...: int}}}},
    "grpo": dict.fromkeys(REWARDS, _NUMBER),
} | {f"evaluate_{model}": {"accuracy": {...: _NUMBER}} for model in MODELS}
RECORDS = {...: {"seconds": _NUMBER, "milliseconds_per_question": _NUMBER}}
"""What is read of metrics and of run records: shapes (`misfit`) by the file's name."""


def read(folder: Path, shapes: dict, name: str = "") -> dict[str, dict]:
    """{stem: content} of the JSON files of a folder, {} if there is none; `name` is what errors call the folder.

    Raises ClearError for a file that is not JSON or not of its shape (METRICS or RECORDS).
    """
    contents = {}
    for file in sorted(folder.glob("*.json")):
        where = f"{name or folder}/{file.name}"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ClearError(f"{where}: not valid JSON ({error}); make it again with its stage.") from error
        odd = misfit(content, shapes.get(file.stem, shapes.get(..., {})))
        if odd is not None:
            raise ClearError(f"{where}: {odd or 'all of it'} is not what its stage writes; make it again with it.")
        contents[file.stem] = content
    return contents


def misfit(value: Any, shape: Any, name: str = "") -> str | None:
    """The dotted name of the first part of `value` that has not its shape; None where all fits.

    A shape is a type, [the shape of every item] or {key: shape}, where `...` stands for all other keys; a key may be
    absent, and one that the shape does not name may hold anything.
    """
    if not isinstance(value, type(shape) if isinstance(shape, dict | list) else shape):
        return name
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(shape, dict):
        others = shape.get(..., object)
        parts = [(item, shape.get(key, others), f"{name}.{key}".lstrip(".")) for key, item in value.items()]
    elif isinstance(shape, list):
        parts = [(item, shape[0], f"{name}[{n}]") for n, item in enumerate(value)]
    return next((odd for part in parts if (odd := misfit(*part)) is not None), None)
