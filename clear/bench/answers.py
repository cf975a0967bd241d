"""Answer a benchmark with one model, here or on a Dask cluster, into rows of clear.bench.predictions.

The questions are cut, in their order, into shards of one batch of the engine (`sampling.batch`), independently of where
they are computed: the same questions are batched together everywhere, so every prediction is the same. The starting
noise of a restoration depends on the question's number in the benchmark (clear/reasoning/engine.py), not on its shard.
A process loads the model once; on a cluster each worker reads its folder under the same path and rejects it if the
files differ.
"""

import json
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from clear.bench.models import UnderTest
from clear.bench.scoring import is_correct
from clear.data.images import encode_image
from clear.data.pool import parallel
from clear.data.records import Question, Sample, read_samples
from clear.errors import ClearError

if TYPE_CHECKING:
    from clear.reasoning.answering import Answer, Answerer
    from clear.schema import Config

DEVELOPMENT = Path("data/development")
"""The split on which recipes are compared; the benchmark stays unseen."""

QUALITY = ("psnr_degraded", "psnr_restored", "ssim_degraded", "ssim_restored")
"""Columns of a row that are empty where there is nothing to compare."""

DECODED = 128
"""Restored pictures that the autoencoder decodes at once."""


@dataclass(frozen=True)
class Shard:
    """Questions that are answered together; `first` is the number of the first one in the benchmark."""

    model: UnderTest
    first: int
    asked: tuple[tuple[Sample, Question], ...]


@dataclass(frozen=True)
class Answered:
    """Rows of one shard, and the seconds that answering took (without loading, decoding and comparing pictures)."""

    rows: list[dict]
    seconds: float


def development() -> list[Sample]:
    """The development split, clean and degraded. Raises ClearError where it holds no question."""
    samples = [sample for part in ("clean", "degraded") for sample in read_samples(DEVELOPMENT / part)]
    if not any(sample.questions for sample in samples):
        raise ClearError(f"{DEVELOPMENT} holds no question; raise params: source.development (or its share) and rerun.")
    return samples


def answer(
    model: UnderTest, samples: Sequence[Sample], progress: Callable[[int], None] | None = None
) -> tuple[list[dict], float]:
    """Rows for every question of `samples`, in order, and the seconds of all processes together.

    Of each corruption and severity the first restored picture is kept in its row. `progress` is called with the number
    of questions done. With `evaluate.cluster` the workers there compute. Raises ClearError as clear.data.pool.parallel.
    """
    cluster = model.config.evaluate.cluster
    if cluster:
        model = _shared(model)
    rows, seconds, shown = [], 0.0, set()
    shards = _shards(model, samples)
    for found in parallel(answer_shard, shards, workers=1, cluster=cluster, section="evaluate", chunk=1):
        for row in found.rows:
            cell = row["corruption"], row["severity"]
            if row["restored_png"] is not None and cell in shown:
                row["restored_png"] = None
            shown |= {cell} if row["restored_png"] is not None else set()
        rows += found.rows
        seconds += found.seconds
        if progress:
            progress(len(found.rows))
    return rows, seconds


def _shards(model: UnderTest, samples: Sequence[Sample]) -> Iterator[Shard]:
    asked = [(sample, question) for sample in samples for question in sample.questions]
    size = model.config.sampling.batch
    for first in range(0, len(asked), size):
        yield Shard(model, first, tuple(asked[first : first + size]))


def _shared(model: UnderTest) -> UnderTest:
    """The model as other machines find it: by absolute paths, and only if the files are these."""
    folder, given = model.folder.absolute(), model.config.model
    here = {name: getattr(given, name) for name in ("checkpoint", "base")}
    given = replace(given, **{name: str(Path(path).absolute()) for name, path in here.items() if path})
    config = replace(model.config, model=given)
    return replace(model, folder=folder, config=config, digest=digest_of(folder, config))


def digest_of(folder: Path, config: "Config") -> str:
    """The content of a model folder as one string, with the files that complete weights alone; of weights that an
    adapter names, the names and hashes it has."""
    from clear.data.workspace import completing
    from clear.model.checkpoint import fingerprint
    from clear.model.lora import is_adapter

    files = fingerprint(folder, None if is_adapter(folder) else completing(config))
    return json.dumps({name: file["sha256"] for name, file in files.items()}, sort_keys=True)


def answer_shard(shard: Shard) -> Answered:
    """Answer the questions of one shard. Raises ClearError where the model's folder is missing or another one."""
    from clear.model.images import ImageBank

    model = shard.model
    with loaded(model.folder, model.config, model.digest, 'set evaluate.cluster to ""', model.latents) as answerer:
        samples = list({sample.key: sample for sample, _ in shard.asked}.values())
        place = {sample.key: i for i, sample in enumerate(samples)}
        bank = answerer.bank([s.seen for s in samples], [s.key for s in samples])
        paired = {s.image_sha256: s for s in samples if s.degraded is not None and s.paired}
        bases = ImageBank([s.image for s in paired.values()], model.config.model, [s.key for s in paired.values()])
        clean = {name: bases.uint8(i) for i, name in enumerate(paired)}
        partner = {s.key: clean[s.image_sha256] for s in samples if s.degraded is not None and s.paired}
        degraded = {key: _compared("degraded", to, bank.uint8(place[key])) for key, to in partner.items()}
        asked = [(place[sample.key], question) for sample, question in shard.asked]
        start = perf_counter()
        answers = answerer.answer(bank, asked, model.restore, model.feedback, first=shard.first)
        if (votes := model.config.evaluate.votes) > 1:
            answers = answerer.vote(bank, asked, answers, votes, model.feedback, shard.first)
        seconds = perf_counter() - start
        pictures = _pictures(answerer, answers)
    kept = _kept([sample for sample, _ in shard.asked], pictures)
    rows = []
    for n, ((sample, question), given) in enumerate(zip(shard.asked, answers, strict=True)):
        quality = dict.fromkeys(QUALITY) | degraded.get(sample.key, {})
        if sample.key in partner and n in pictures:
            quality |= _compared("restored", partner[sample.key], pictures[n])
        row = {
            "sample": sample.id,
            "corruption": sample.corruption,
            "severity": sample.severity,
            "question": question.id,
            "task": question.task,
            "pair": question.pair,
            "text": question.text,
            "answer": question.answer,
            "prediction": given.prediction,
            "output": given.trace,
            "restored": given.restored,
            "correct": is_correct(given.prediction, question),
            "tokens": given.tokens,
            "restored_png": encode_image(pictures[n]) if n in kept else None,
        }
        rows.append(row | quality)
    return Answered(rows, seconds)


_one_at_a_time = threading.Lock()
"""A worker with several threads has one model, and torch's threads are for one shard."""
_held: dict[str, "Answerer"] = {}
"""The model that this process has loaded, by what it was loaded from."""


@contextmanager
def loaded(
    folder: Path, config: "Config", digest: str = "", remedy: str = "", latents: Path | None = None
) -> "Iterator[Answerer]":
    """The model of a folder, for the length of a with block in which this process uses no other.

    It stays loaded until another one is asked for. `digest`, if given, is what the files of the folder must be: on a
    Dask worker, whose `remedy` says how to do without. `latents` is the folder in which latents are kept, if any.
    Raises ClearError where the files are others.
    """
    from clear.model.runtime import apply_runtime
    from clear.reasoning.answering import Answerer

    key = repr((folder, config, digest, latents))
    with _one_at_a_time:
        if key not in _held:
            if digest and digest_of(folder, config) != digest:
                raise ClearError(
                    f"{folder}: a Dask worker does not find the model under test there; give the workers this folder "
                    f"under the same path (a shared file system), or {remedy}."
                )
            _held.clear()
            apply_runtime(config)
            _held[key] = Answerer.load(folder, config, latents)
        yield _held[key]


def _pictures(answerer: "Answerer", answers: "Sequence[Answer]") -> dict[int, np.ndarray]:
    """The restored picture of every answer that restored, decoded in batches."""
    import torch

    chosen = [n for n, answer in enumerate(answers) if answer.restored]
    found: dict[int, np.ndarray] = {}
    for grid in sorted({answers[n].grid for n in chosen}):
        same = [n for n in chosen if answers[n].grid == grid]
        for start in range(0, len(same), DECODED):
            part = same[start : start + DECODED]
            decoded = answerer.pictures(torch.stack([answers[n].latent for n in part]), grid)
            found |= dict(zip(part, decoded, strict=True))
    return found


def _kept(samples: Sequence[Sample], restored: Container[int]) -> set[int]:
    """Numbers of the restored pictures that are stored with the predictions: the first of each corruption and level."""
    first: dict[tuple[str, str], int] = {}
    for n, sample in enumerate(samples):
        if n in restored:
            first.setdefault((sample.corruption, sample.severity), n)
    return set(first.values())


def _compared(kind: str, clean: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """PSNR and SSIM of a `degraded` or `restored` picture at the model's own resolution."""
    from clear.validation.metrics import psnr, ssim

    return {f"psnr_{kind}": psnr(clean, other), f"ssim_{kind}": ssim(clean, other)}
