"""What the sources of real data share: rows and rejects, the sampling rules, and the split by content (METHOD §6).

A reader (llava_onevision, lmudata, folder, clear_train) yields a `Row` for every row it can read and a `Reject` for
every other one. `examine` decodes the image, applies the rules and makes a `Sample`. Which split a sample belongs to
follows from the hash of its decoded pixels and the seed: the same picture under another name, in another file or
re-encoded without loss is always in the same split. Departures from the published sampling: it draws at random, so
duplicates end up in different splits, and it skips rows silently; here a row is sampled, left out by its hash, or
rejected with a reason.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from clear.data.images import decode_image, stored
from clear.data.pool import threaded
from clear.data.records import CLEAN, INCOMING, Question, Sample, sha256
from clear.data.rejects import Reject
from clear.errors import ClearError, quoted
from clear.schema import Source
from clear.sources.fields import unprintable
from clear.sources.scenes.words import LABELS, option_named

SPLITS = ("pretrain", "sft", "rl", "validation", "bench", "development")
"""In the order of `source.shares`. Recipes are compared on `development`, so that `bench` stays unseen."""
TAUGHT = ("sft", "rl")
"""The splits in which a sample may bring its degraded copy."""

_CJK = re.compile("[\u1100-\u11ff\u2e80-\u2fdf\u3005-\u30ff\u3100-\u318f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
                  "\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc\U00020000-\U0003ffff]")  # fmt: skip
"""Chinese, Japanese and Korean characters; full-width punctuation and Latin letters are not among them."""


@dataclass(frozen=True)
class Row:
    """One readable row: an encoded image with its questions. `origin` is kept as the sample's annotation; `degraded` is
    a degraded copy, if the data bring one."""

    id: str
    subset: str
    image: bytes
    questions: tuple[Question, ...]
    origin: dict
    degraded: bytes = b""


@dataclass(frozen=True)
class Examined:
    """A sample without a split, and the hash of its pixels."""

    sample: Sample
    pixels: bytes


def pixel_hash(array: np.ndarray) -> bytes:
    """SHA-256 over shape and values of a decoded image, uint8 RGB (H, W, 3)."""
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(np.ascontiguousarray(array))
    return digest.digest()


def split_of(pixels: bytes, seed: int, shares: Sequence[float]) -> str:
    """The split of an image by the hash of its pixels, or "" for the part that no share covers."""
    place = int.from_bytes(hashlib.sha256(b"%d/" % seed + pixels).digest()[:8], "big") / 2**64
    for split, bound in zip(SPLITS, np.cumsum(shares), strict=False):  # five shares: nothing for the last split
        if place < bound:
            return split
    return ""


def examine(row: Row | Reject, rules: Source) -> Examined | Reject:
    """Apply the rules to a row and decode its image; a reject passes through.

    PNG and JPEG files are kept byte for byte, any other format becomes a JPEG of quality 95 (as published).
    """
    if isinstance(row, Reject):
        return row

    def reject(reason: str, detail: str) -> Reject:
        return Reject(row.id, row.subset, reason, detail)

    texts = [text for q in row.questions for text in (q.text, q.answer, *q.options)]
    for text in (row.id, row.subset, *texts, *row.origin.values()):
        if isinstance(text, str) and (found := unprintable(text)):
            return reject("question", f"{quoted(text)} contains {found}, which is not valid text; remove it")
    if rules.skip_cjk and any(_CJK.search(text) for text in texts):
        return reject("language", "Chinese, Japanese or Korean characters (source.skip_cjk)")
    try:
        array = decode_image(row.image, row.id)
        copy = decode_image(row.degraded, f"{row.id}, degraded") if row.degraded else None
    except ClearError as error:
        return reject("image", str(error))
    height, width = array.shape[:2]
    if min(height, width) < rules.min_side:
        return reject("size", f"{width} x {height} px, source.min_side = {rules.min_side}")
    if rules.max_aspect and max(height, width) > rules.max_aspect * min(height, width):
        return reject("aspect", f"{width} x {height} px, source.max_aspect = {rules.max_aspect:g}")
    if copy is not None and copy.shape != array.shape:
        return reject("partner", f"clean {width} x {height} px, degraded {copy.shape[1]} x {copy.shape[0]} px")
    if copy is not None and np.array_equal(copy, array):
        return reject("partner", "the degraded picture has the pixels of the clean one")
    image = stored(row.image, array)
    origin = json.dumps(row.origin, sort_keys=True, ensure_ascii=False) if row.origin else ""
    questions = row.questions[: rules.questions_per_image]
    sample = Sample(row.id, rules.kind, "", image, sha256(image), questions, origin)
    if copy is not None:
        copied = stored(row.degraded, copy)
        sample = replace(sample, degraded=copied, corruption=rules.kind, severity=INCOMING)
    return Examined(sample, pixel_hash(array))


def examined(rows: Iterable[Row | Reject], rules: Source, workers: int) -> Iterator[Examined | Reject]:
    """`examine` every row in order on `workers` threads; few rows are in memory at a time."""
    return threaded(partial(examine, rules=rules), rows, workers)


def assigned(
    found: Iterable[Examined | Reject], seed: int, shares: Sequence[float], held_out: set[bytes] = frozenset()
) -> Iterator[Sample | Reject]:
    """Give every sample its split ("" = not sampled) and reject what is in `held_out`, repeats an id, or would be the
    third half of a pair there.

    A degraded copy that came with the data stays with the samples that are trained on; elsewhere the protocol makes the
    copies.
    """
    ids: set[bytes] = set()
    halves: Counter[tuple[str, str]] = Counter()
    for item in found:
        if isinstance(item, Reject):
            yield item
            continue
        sample, subset = item.sample, json.loads(item.sample.annotation or "{}").get("subset", "")
        split = split_of(item.pixels, seed, shares)
        key = hashlib.sha256(sample.id.encode()).digest()[:12]
        pairs = Counter((split, question.pair) for question in sample.questions if question.pair)
        if split and item.pixels in held_out:
            yield Reject(sample.id, subset, "in bench", "its image is in source.bench_path")
        elif split and key in ids:
            yield Reject(sample.id, subset, "id", "another row has this id")
        elif split and (third := next((one for one in pairs if halves[one] + pairs[one] > 2), None)):
            yield Reject(sample.id, subset, "pair", f"it would be the third half of pair {third[1]}; a pair has two")
        else:
            if split:
                ids.add(key)
                halves.update(pairs)
            if sample.degraded is not None and split not in TAUGHT:
                sample = replace(sample, degraded=None, corruption=CLEAN, severity=CLEAN)
            yield replace(sample, split=split)


_CHOICE = re.compile(r"^[^\S\n]*\(?([A-J])[.):]\s*(\S.*)$", re.MULTILINE)
"""A line with an option. No two parts of the pattern can share a run of spaces or line ends, which would be tried at
every length."""


def options_in(text: str) -> tuple[str, ...]:
    """The options of a multiple-choice question that its text lists as lines "A. …", "B. …", …; () if it lists none."""
    found = _CHOICE.findall(text)
    letters = "".join(letter for letter, _ in found)
    return tuple(option.rstrip() for _, option in found) if len(found) > 1 and LABELS.startswith(letters) else ()


def question(
    id: str, task: str, text: str, answer: str, options: Sequence[str] = (), blank: bool = False, **more: str
) -> Question | str:
    """A question, or the reason why it is none: an empty text, answer or (unless `blank`) option, too many options, or
    an answer that names none of them. Of options that differ in punctuation alone ("5" and "5%") scoring cannot tell
    one by its text; an answer that is the text of one becomes its letter."""
    text, answer = text.strip(), answer.strip()
    if not text or not answer:
        return f"the {'question' if not text else 'answer'} is empty"
    if len(options) > len(LABELS):
        return f"{len(options)} options; a question has at most {len(LABELS)}"
    letters = list(LABELS[: len(options)])
    empty = [label for label, option in zip(letters, options, strict=True) if not option.strip()]
    if empty and not blank:
        return f"option {empty[0]} is empty"
    if options and option_named(answer, options) is None:
        meant = [letter for letter, option in zip(letters, options, strict=True) if option.strip() == answer]
        if len(meant) != 1:
            return f"the answer {answer[:80]!r} names none of the options {', '.join(options)[:200]}"
        answer = meant[0]
    return Question(id, task, text, answer, tuple(options), **more)
