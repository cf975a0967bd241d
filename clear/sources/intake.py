"""From the images under data/incoming to samples of three slices, and rejected rows (docs/DEGRADATIONS.md).

Each image is assigned to fine-tuning (`sft`), reinforcement learning (`rl`) or the benchmark (`bench`) by a hash of its
pixels, never by order, file name or set, so a repeated image goes to the same slice. Rows that share an image, clean or
degraded, stay together, and an image already in data/samples stays in the same split. Rows about one image become one
sample; a row that cannot be used is listed with its reason, and the others are kept.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from clear.data.groups import connected
from clear.data.records import INCOMING, Question, Sample, open_shard, sha256
from clear.data.rejects import Reject
from clear.errors import quoted
from clear.sources.incoming import FOLDER, IncomingSet, Row, Seen, look, present, rejected, rows_of
from clear.sources.scenes.words import LABELS, lists_options, normalise

SLICES = ("sft", "rl", "bench")

Over = Callable[[Callable, Iterable], Iterator]
"""`map`, or one that uses several processes."""


@dataclass(frozen=True)
class _Planned:
    """What a row becomes: a sample of one slice, with the questions of all rows about its picture."""

    part: str
    id: str
    paired: bool
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Intake:
    """All sets, judged: which row becomes which sample of which slice. The subset of a reject is its set."""

    folder: Path
    sets: tuple[IncomingSet, ...]
    rejects: tuple[Reject, ...]
    rows: Mapping[str, int]
    planned: Mapping[tuple[str, str], _Planned]  # by (set, row)

    def samples(self, *slices: str) -> Iterator[Sample]:
        """The samples of some slices, by set and row. Their `split` is the slice, their corruption the set."""
        wanted = {key for key, plan in self.planned.items() if plan.part in slices}
        for one in self.sets:
            if not any(name == one.name for name, _ in wanted):
                continue
            for row in rows_of(self.folder / one.name):
                if (row.set, row.where) in wanted:
                    yield _sample(row, self.planned[row.set, row.where])

    def count(self, *slices: str) -> int:
        """How many samples `samples` yields."""
        return sum(plan.part in slices for plan in self.planned.values())

    def summary(self) -> dict[str, dict]:
        """Counts and fingerprint of every set, for the metrics."""
        refused = Counter(reject.subset for reject in self.rejects)
        found = {}
        for one in self.sets:
            mine = [plan for (name, _), plan in self.planned.items() if name == one.name]
            parts = Counter(plan.part for plan in mine)
            found[one.name] = {
                "fingerprint": one.fingerprint,
                "rows": self.rows[one.name],
                "rejected": refused[one.name],
                "paired": sum(plan.paired for plan in mine),
                "questions": sum(len(plan.questions) for plan in mine),
                **{part: parts[part] for part in SLICES},
            }
        return found


def _sample(row: Row, plan: _Planned) -> Sample:
    clean = row.clean if plan.paired else row.image
    return Sample(
        id=plan.id,
        source=f"{INCOMING}/{row.set}",
        split=plan.part,
        image=clean,
        image_sha256=sha256(clean),
        questions=plan.questions,
        annotation=json.dumps({"row": row.where}),
        degraded=row.image,
        corruption=row.set,
        severity=INCOMING,
        paired=plan.paired,
    )


def read(
    folder: Path = FOLDER,
    only: str = "",
    bench_share: float = 0.2,
    rl_share: float = 0.25,
    known: Mapping[str, str] | None = None,
    words: Iterable[str] | None = None,
    over: Over = map,
) -> Intake:
    """Judge every row of the sets of `folder` (of one set with `only`) and plan their slices.

    `bench_share` of the pictures go to the benchmark and `rl_share` of the others to `rl`. `known` maps byte digests of
    clean images in use to their split (see `known_images`): a copy of an image of `bench` or `development` is never
    taught. With `words`, texts must be made of them.
    Raises ClearError for a set that is absent or not pulled, a name no set can have, and an unreadable table.
    """
    found = present(folder, only)
    rows = chain.from_iterable(rows_of(folder / one.name) for one in found)
    seen = list(over(look, rows))
    known, rejects, kept = known or {}, [], []
    vocabulary = None if words is None else frozenset(words)
    for row in seen:
        if row.reject:
            rejects.append(row.reject)
        elif foreign := _foreign_word(row, vocabulary):
            rejects.append(rejected(row.set, row.where, "words", foreign))
        else:
            kept.append(row)
    planned: dict[tuple[str, str], _Planned] = {}
    for group in _connected(kept):
        homes = {known[file] for row in group for file in row.files if file in known}
        sides = {"bench" if split in ("bench", "development") else "train" for split in homes}
        if len(sides) > 1:
            detail = "joins a picture of the training data with one of the benchmark; remove one of them"
            rejects += [rejected(row.set, row.where, "in bench", detail) for row in group]
            continue
        part = _slice(group, sides, bench_share, rl_share)
        for same in _by_picture(group):
            planned |= _merged(same, part, rejects)
    order = {f"{row.set}/{row.where}": n for n, row in enumerate(seen)}
    rejects.sort(key=lambda reject: order[reject.id])
    counts = Counter(row.set for row in seen)
    return Intake(folder, tuple(found), tuple(rejects), {one.name: counts[one.name] for one in found}, planned)


def _foreign_word(row: Seen, vocabulary: frozenset[str] | None) -> str:
    """What a closed vocabulary (a model trained from scratch) cannot say of this row; "" if nothing."""
    if vocabulary is None:
        return ""
    for question in row.questions:
        texts = question.text, question.answer, question.evidence, *question.options
        for word in " ".join(texts).split():
            if word not in vocabulary:
                return (
                    f"{quoted(word)} is not in the closed vocabulary of a model trained from scratch; "
                    "name a checkpoint (model.checkpoint), or use the words of clear/sources/scenes/words.py"
                )
        if question.options and not lists_options(question.text, question.options):
            listed = " ".join(f"{label} {option}" for label, option in zip(LABELS, question.options, strict=False))
            return f"a closed vocabulary has no list of options; end the question with them, as in {listed!r}"
    return ""


def _connected(rows: Sequence[Seen]) -> list[list[Seen]]:
    """Rows in groups that share no picture, each in the order of the rows."""
    numbers: dict[str, int] = {}  # of the pictures
    links = [[numbers.setdefault(file, len(numbers)) for file in (row.image, row.clean or row.image)] for row in rows]
    of_picture = connected(len(numbers), links)
    groups: dict[int, list[Seen]] = {}
    for row, (image, _) in zip(rows, links, strict=True):
        groups.setdefault(int(of_picture[image]), []).append(row)
    return list(groups.values())


def _slice(group: Sequence[Seen], sides: set[str], bench_share: float, rl_share: float) -> str:
    """The slice of a group: by its clean image where there is one, so that another copy of it changes nothing."""
    digest = min({row.clean for row in group if row.clean} or {row.image for row in group})
    if "bench" in sides or (not sides and _fraction(digest, "bench") < bench_share):
        return "bench"
    return "rl" if _fraction(digest, "rl") < rl_share else "sft"


def _fraction(digest: str, salt: str) -> float:
    hashed = hashlib.blake2b(f"{digest}|{INCOMING}|{salt}".encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") / 2**64


def _by_picture(group: Iterable[Seen]) -> list[list[Seen]]:
    """Rows of one set about one picture."""
    same: dict[tuple[str, str], list[Seen]] = {}
    for row in group:
        same.setdefault((row.set, row.image), []).append(row)
    return list(same.values())


def _merged(rows: Sequence[Seen], part: str, rejects: list[Reject]) -> dict[tuple[str, str], _Planned]:
    """One sample from rows about one picture; a row at odds with an earlier one is rejected."""
    first = next((row for row in rows if row.clean), rows[0])
    questions: dict[tuple[str, tuple[str, ...]], tuple[Question, str]] = {}
    for row in rows:
        if row.clean and row.clean != first.clean:
            detail = f"the picture has another clean partner in {first.where}"
            rejects.append(rejected(row.set, row.where, "partner", detail))
            continue
        for question in row.questions:
            before, where = questions.setdefault((question.text, question.options), (question, row.where))
            if normalise(before.answer) != normalise(question.answer):
                detail = f"the same question has another answer in {where}"
                rejects.append(rejected(row.set, row.where, "answer", detail))
                break
    name = f"{first.set}-{first.image[:16]}"
    numbered = tuple(replace(q, id=f"{name}-q{n}") for n, (q, _) in enumerate(questions.values()))
    return {(first.set, first.where): _Planned(part, name, bool(first.clean), numbered)}


def known_images(samples: Path) -> dict[str, str]:
    """Byte digest of every clean image below data/samples to its split; splits that are not here are left out."""
    found = {}
    for folder in sorted(path for path in samples.glob("*") if path.is_dir()):
        for file in sorted(folder.glob("*.parquet")):
            for digest in open_shard(file).read(["image_sha256"]).column(0).to_pylist():
                found[digest] = folder.name
    return found
