"""What new pictures are compared with: those that a model was trained on, as a table of numbers and a classifier.

Half of the training pictures, clean and degraded, teach the classifier; the other half, which it has not seen, are
what nights are compared with, so that a night of the same kind looks the same to it. Presets that are not in the
training data are applied to some of its clean pictures, so that a kind of damage which could be added is recognised
too.

The table is made once and kept in $CLEAR_HOME/watch under a hash of the pictures and of the code that measures; it may
be deleted. It holds no picture.
"""

import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from io import BytesIO
from itertools import chain
from pathlib import Path

import numpy as np

from clear.data.io import replacing
from clear.data.pool import parallel
from clear.data.records import EXTRA, Sample, drawn, file_sha256, read_samples, shards
from clear.data.workspace import home
from clear.degradation.build import NONE, degraded_samples
from clear.degradation.presets import PRESETS
from clear.degradation.protocol import PROTOCOL_VERSION, SEVERITIES
from clear.degradation.registry import Chosen
from clear.drift import measures, resemblance
from clear.drift.measures import METRICS, Picture, measure
from clear.drift.resemblance import FAR, UNDAMAGED, Cell, Resemblance
from clear.errors import ClearError

VALIDATION = Path("data/samples/validation")
"""Pictures that are neither in a reference nor known to its classifier: simulated nights have copies of them."""

SAMPLES = tuple(Path("data/samples") / split for split in ("sft", "rl"))
DEGRADED = tuple(Path("data/degraded") / split for split in ("sft", "rl"))

CLEAN_PICTURES, COPIES = 6500, 8000
"""At most so many training pictures are measured, drawn by the hashes of their ids."""

IN_MEMORY = 500
"""Clean pictures of which copies are made."""

PRESET_COPIES = 60
"""Copies for each preset and level that training does not have."""

LARGEST_SIDE = 512
"""px at which pictures are measured at most: beyond, a picture costs seconds and says nothing new."""

FEWEST = 100
"""Clean training pictures below which there is nothing to compare with."""


@dataclass(frozen=True)
class Reference:
    """The held-out half as numbers. `cells` are those of the rows of `values` (n, M); `trained` counts the copies in
    the training data by kind and level; `side` is in px. The last two say how good the classifier is, on `values`."""

    origin: str
    digest: str
    side: int
    values: np.ndarray
    cells: tuple[Cell, ...]
    trained: dict[Cell, int]
    model: Resemblance
    confusion: np.ndarray
    calibration_error: float

    def baseline(self, damaged: float) -> np.ndarray:
        """Rows that stand for traffic of which a share `damaged` has the damage of training, the others none."""
        clean = np.flatnonzero([cell == UNDAMAGED for cell in self.cells])
        copies = np.flatnonzero([cell != UNDAMAGED and cell in self.trained for cell in self.cells])
        parts = [(part, share) for part, share in ((clean, 1 - damaged), (copies, damaged)) if share > 0]
        total = min(len(part) / share for part, share in parts)
        rng = np.random.default_rng(0)
        kept = [rng.permutation(part)[: round(total * share)] for part, share in parts]
        return self.values[np.concatenate(kept)]

    def columns(self, values: np.ndarray) -> np.ndarray:
        """What is compared of pictures, (n, C): the metrics, cut off far from everything known, and the likeness to
        each kind of damage."""
        model = self.model
        near = np.clip(values, model.centre - FAR * model.scale, model.centre + FAR * model.scale)
        return np.column_stack([near, model.scores(model.probabilities(values))])

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return (*METRICS, *(f"like {kind_of(name)}" for name in self.model.names))


@dataclass(frozen=True)
class Origin:
    """Where training pictures are: `identity` changes when they do, `bring` gives the folder with data/ in it.

    `scale` is degrade.size_scale of that training.
    """

    name: str
    identity: str
    bring: Callable[[], AbstractContextManager[Path]]
    scale: float


def identity_of(root: Path) -> str:
    """A hash of all training pictures in a folder. Raises ClearError where there are none."""
    files = [file for folder in (*SAMPLES, *DEGRADED) for file in shards(root / folder)]
    return hashlib.sha256("".join(file_sha256(file) for file in files).encode()).hexdigest()


def load(origin: Origin, workers: int) -> Reference:
    """The reference made of `origin`, from the cache where it is there. Raises ClearError for too few pictures."""
    code = [file_sha256(module.__file__) for module in (measures, resemblance)] + [file_sha256(__file__)]
    key = [origin.identity, origin.scale, PROTOCOL_VERSION, *code]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    file = home() / "watch" / f"reference-{digest}.npz"
    if (kept := _read(file, origin, digest)) is not None:
        return kept
    with origin.bring() as root:
        made = _make(root, origin, digest, workers)
    _write(file, made)
    return made


# --- making one -------------------------------------------------------------------------------------------------------


def _make(root: Path, origin: Origin, digest: str, workers: int) -> Reference:
    trained = Counter((s.corruption, s.severity) for folder in DEGRADED for s in read_samples(root / folder, _CELL))
    some = list(_drawn(root, SAMPLES, IN_MEMORY, ["image"]))
    if len(some) < FEWEST:
        raise ClearError(
            f"{root / SAMPLES[0].parent}: {len(some)} training pictures, too few to compare with; at least {FEWEST}."
        )
    side = _side(sample.image for sample in some)
    presets = tuple(name for name in PRESETS if EXTRA + name not in {kind for kind, _ in trained})
    added = [(EXTRA + name, level) for name in presets for level in SEVERITIES]
    pictures = chain(
        ((sample.id, UNDAMAGED, sample.image) for sample in _drawn(root, SAMPLES, CLEAN_PICTURES, ["image"])),
        map(_seen, _drawn(root, DEGRADED, COPIES, ["degraded"])),
        map(_seen, copies_of(some, added, PRESET_COPIES, origin.scale, workers, Chosen(presets=presets))),
    )
    held: list[bool] = []
    cells: list[Cell] = []

    def jobs() -> Iterator[tuple[str, bytes]]:
        for id, cell, data in pictures:
            held.append(is_held(id))
            cells.append(cell)
            yield id, data

    rows = list(measured(jobs(), side, workers, label="reference"))
    usable = np.array([not row.problem for row in rows])
    values = np.array([row.values for row in rows if not row.problem]).reshape(-1, len(METRICS))
    kept = [cell for cell, good in zip(cells, usable, strict=True) if good]
    apart = np.array(held)[usable]
    other, mine = ([cell for cell, out in zip(kept, apart, strict=True) if out == half] for half in (True, False))
    model = resemblance.fit(values[~apart], mine, values[apart], other)
    table = resemblance.confusion(model, values[apart], other)
    error = resemblance.calibration_error(model, values[apart], other)
    return Reference(origin.name, digest, side, values[apart], tuple(other), dict(trained), model, table, error)


def _seen(sample: Sample) -> tuple[str, Cell, bytes]:
    return sample.id, (sample.corruption, sample.severity), sample.seen


def measured(
    pictures: Iterable[tuple[str, bytes]], side: int, workers: int, total: int | None = None, label: str = ""
) -> Iterator[Picture]:
    """Measure (name, bytes) pairs, in order; see `measure`."""
    return parallel(measure, ((name, data, side) for name, data in pictures), workers, total, label)


def is_held(id: str) -> bool:
    """Whether the classifier does not learn from a sample and its copies."""
    return hashlib.sha256(id.encode()).digest()[0] % 2 == 1


def kind_of(corruption: str) -> str:
    """A corruption's name without the mark of those beyond the sixteen."""
    return corruption.removeprefix(EXTRA)


_CELL = ("id", "corruption", "severity")


def _drawn(root: Path, folders: Sequence[Path], limit: int, columns: Sequence[str]) -> Iterator[Sample]:
    """At most `limit` samples of the folders with their cell and `columns`, one at a time."""
    names = [f"{folder}/{s.id}/{s.corruption}" for folder in folders for s in read_samples(root / folder, _CELL)]
    kept = drawn(names, limit)
    samples = chain.from_iterable(read_samples(root / folder, [*_CELL, *columns]) for folder in folders)
    yield from (sample for number, sample in enumerate(samples) if number in kept)


def _side(pictures: Iterable[bytes]) -> int:
    from PIL import Image

    sides = [max(Image.open(BytesIO(data)).size) for data in pictures]
    return min(LARGEST_SIDE, int(np.median(sides)))


def copies_of(
    clean: Sequence[Sample], cells: Sequence[Cell], count: int, scale: float, workers: int, names: Chosen = NONE
) -> Iterator[Sample]:
    """`count` copies for each cell, of different pictures as far as there are enough."""
    variants = [
        (clean[(number * count + copy) % len(clean)], *cell)
        for number, cell in enumerate(cells)
        for copy in range(count)
    ]
    return degraded_samples(variants, scale, workers, len(variants), "copies", names)


# --- the cache --------------------------------------------------------------------------------------------------------


def _write(file: Path, made: Reference) -> None:
    texts = {"cells": made.cells, "classes": made.model.cells, "trained": [[*c, n] for c, n in made.trained.items()]}
    arrays = {field.name: getattr(made.model, field.name) for field in fields(Resemblance) if field.name != "cells"}
    numbers = {"side": made.side, "calibration_error": made.calibration_error}
    with replacing(file, several=True) as partial, partial.open("wb") as stream:
        np.savez_compressed(
            stream, values=made.values, confusion=made.confusion, texts=np.array(json.dumps(texts)), **arrays, **numbers
        )


def _read(file: Path, origin: Origin, digest: str) -> Reference | None:
    """The reference in a file; None where there is none, or it is damaged and has to be made again."""
    try:
        with np.load(file) as kept:
            texts = json.loads(str(kept["texts"]))
            own = {f.name: kept[f.name] for f in fields(Resemblance) if f.name != "cells"}
            own |= {name: float(own[name]) for name in ("temperature", "limit")}
            model = Resemblance(tuple(map(tuple, texts["classes"])), **own)
            trained = {(kind, level): count for kind, level, count in texts["trained"]}
            cells = tuple(map(tuple, texts["cells"]))
            numbers = int(kept["side"]), kept["values"], cells, trained, model, kept["confusion"]
            return Reference(origin.name, digest, *numbers, float(kept["calibration_error"]))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
