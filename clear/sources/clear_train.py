"""The training set of CLEAR's authors, as it is published (METHOD §3 "Record").

`path` is a folder with their `*.jsonl` tables (or one of them) and, beside the tables, the folders `images` (clean) and
`corruption_images` (degraded) with files of the same names. A line is an object `{id, subset, image, conversations,
split_type, tool_used}`; `conversations` is one question by "human" and one reply by "gpt". The answer block of the
reply is the reference answer; the reply itself is kept word for word in the sample's annotation, from which
`traces.kind: given` takes the demonstration (clear/traces/given.py).

Departure (METHOD §8 items 10, 16, 18): a record without one of its pictures, with a degraded picture that is the clean
one, or with the id of an earlier record of its subset is rejected by name.
"""

from collections.abc import Iterator
from pathlib import Path

from clear.data.records import Question
from clear.data.rejects import Reject
from clear.errors import ClearError, quoted, shown
from clear.sources.fields import Unusable, count_lines, id_of, json_lines, picture_of, tables, text_of
from clear.sources.rows import Row, options_in, question

CLEAN, DEGRADED = "images", "corruption_images"
REPLY = "reply"
"""Key of the annotation with what "gpt" said."""

_IMAGE = "<image>"


def files(path: Path) -> list[Path]:
    """The tables at a path. Raises ClearError if there are none, or a folder of pictures is missing beside them."""
    found = tables(path, ".jsonl")
    if not found:
        raise ClearError(f"{shown(path)}: no *.jsonl file here; put the tables of the training set there.")
    for name in (CLEAN, DEGRADED):
        if not (found[0].parent / name).is_dir():
            raise ClearError(f"{shown(found[0].parent / name)}: no such folder beside {shown(found[0].name)}; put the "
                             f"{'clean' if name == CLEAN else 'degraded'} pictures there.")  # fmt: skip
    return found


def count(path: Path) -> int | None:
    """Number of records."""
    return sum(map(count_lines, files(path)))


def rows(path: Path) -> Iterator[Row | Reject]:
    """Every record of the tables at `path`, or why it cannot be used."""
    for file in files(path):
        for number, record in json_lines(file):
            yield _row(file, f"{file.stem}-{number:06d}", record)


def _row(file: Path, name: str, record: object) -> Row | Reject:
    subset = file.stem
    try:
        if isinstance(record, Unusable):
            raise record
        if not isinstance(record, dict):
            raise Unusable("line", f"the line is {quoted(record)}, expected an object")
        own, subset = id_of(record.get("id")), _subset(record.get("subset"))
        name = f"{subset}:{own}"  # an id may occur in several subsets
        asked, reply = _conversation(name, subset, record.get("conversations"))
        pictures = [_picture(record.get("image"), side, file) for side in (CLEAN, DEGRADED)]
    except Unusable as error:
        return Reject(name, subset, error.reason, f"{file.name}: {error}")
    said = {key: record[key] for key in ("split_type", "tool_used") if isinstance(record.get(key), str | bool | int)}
    origin = {"id": own, "subset": subset, "image": record["image"], REPLY: reply} | said
    return Row(name, subset, pictures[0], (asked,), origin, degraded=pictures[1])


def _subset(value: object) -> str:
    text = text_of(value, "subset", "line").strip()
    if not text or len(text.splitlines()) > 1:
        raise Unusable("line", f"`subset` is {quoted(value)}, expected a text of one line")
    return text


def _conversation(name: str, subset: str, turns: object) -> tuple[Question, str]:
    """The question with its reference answer, and the reply. Raises Unusable saying what is wrong."""
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, dict) for turn in turns):
        raise Unusable("conversation", f"`conversations` is {quoted(turns)}, expected a question and a reply")
    roles = [turn.get("from") for turn in turns]
    if roles != ["human", "gpt"]:
        raise Unusable("conversation", f"the turns are by {quoted(roles)}, expected human and gpt")
    text, reply = (text_of(turn.get("value"), "value", "conversation") for turn in turns)
    if text.count(_IMAGE) > 1:
        raise Unusable("conversation", f"{text.count(_IMAGE)} images in the question, expected one")
    text = text.replace(_IMAGE, "").strip()
    # What stands before each end, from the first beginning in it on: a pattern would look for the end of every tag.
    blocks = [part.partition("<answer>") for part in reply.split("</answer>")[:-1]]
    answers = [answer.strip() for _, begun, answer in blocks if begun]
    if not answers:
        raise Unusable("conversation", f"no answer block in the reply {quoted(reply)}")
    made = question(f"{name}-0", subset, text, answers[-1], options_in(text))
    if isinstance(made, str) and "options" in made:  # a list that only looks like options
        made = question(f"{name}-0", subset, text, answers[-1])
    if isinstance(made, str):
        raise Unusable("conversation", made)
    return made, reply


def _picture(value: object, side: str, file: Path) -> bytes:
    """The bytes of the picture of this name in the folder `side`, which it must not leave. Raises Unusable."""
    folder = file.parent / side
    if not isinstance(value, str) or not value:
        raise Unusable("no image", f"`image` is {quoted(value)}, expected a file's name")
    try:
        return picture_of({"path": value}, "image", folder / "*", folder)
    except Unusable as error:
        reason = error.reason if side == CLEAN else "partner"
        raise Unusable(reason, f"{side}: {error}") from error
