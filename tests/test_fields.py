"""What a row may hold is read alike from every layout and format, and everything else is refused by name."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clear.config import compose, from_dict
from clear.data.images import encode_image
from clear.data.rejects import Reject, read_rejects, write_rejects
from clear.errors import ClearError, quoted
from clear.sources import folder, incoming, intake, llava_onevision
from clear.sources.fields import look_through
from clear.sources.rows import examine
from tests.conftest import ROOT

PICTURE = encode_image(np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8))
GOOD = {"image": "a.png", "question": "Which?", "answer": "red"}
RULES = from_dict(compose([])).source


def read_folder(place: Path, rows: list) -> list:
    """What the source `folder` makes of JSON lines: questions, or the reject."""
    (place / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [examine(row, RULES) for row in folder.rows(place)]
    return [row if isinstance(row, Reject) else row.sample.questions[0] for row in found]


def read_incoming(place: Path, rows: list, kind: str = "jsonl") -> list:
    """What data/incoming makes of a table of a kind: questions, or the reject, by row."""
    inside = place / "road"
    inside.mkdir(exist_ok=True)
    (inside / "a.png").write_bytes((place / "a.png").read_bytes())
    if kind == "jsonl":
        (inside / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), inside / "t.parquet")
    seen = [incoming.look(row) for row in incoming.rows_of(inside)]
    return [row.reject or row.questions[0] for row in seen]


def read_parquet(place: Path, rows: list) -> list:
    return read_incoming(place, rows, "parquet")


EVERY = pytest.mark.parametrize("read", [read_folder, read_incoming, read_parquet])
JSON = pytest.mark.parametrize("read", [read_folder, read_incoming])


@pytest.fixture
def place(tmp_path) -> Path:
    (tmp_path / "a.png").write_bytes(PICTURE)
    return tmp_path


@EVERY
def test_options_as_an_object_are_read_in_the_order_of_the_letters(place, read):
    ten = {letter: f"text {letter}" for letter in reversed("ABCDEFGHIJ")}
    rows = [
        GOOD | {"options": {"B": "blue", "A": "red"}},
        GOOD | {"options": ten, "answer": "J"},
        GOOD | {"options": {"A": "red", "B": "blue", "C": None}, "answer": "B"},
    ]
    first, second, third = read(place, rows)
    assert first.options == ("red", "blue") and third.options == ("red", "blue")
    assert second.options == tuple(ten[letter] for letter in "ABCDEFGHIJ") and second.answer == "J"


@pytest.mark.parametrize("letter", "ABCDEFGHIJ")
def test_every_letter_that_the_options_have_names_one_and_no_other_does(place, letter):
    options = [f"text {n}" for n in range("ABCDEFGHIJ".index(letter) + 1)]
    for read in (read_folder, read_incoming):
        if len(options) > 2:
            assert read(place, [GOOD | {"options": options, "answer": letter}])[0].answer == letter
            (reject,) = read(place, [GOOD | {"options": options[:-1], "answer": letter}])
            assert "names none of the options" in reject.detail
    (reject,) = read_incoming(place, [GOOD | {"options": ["x", "y", "z"], "answer": "AB"}])
    assert "names none" in reject.detail, "two letters are not one"


BAD_OPTIONS = {
    "one text": "red, blue",
    "a number": 3,
    "true": True,
    "a gap": {"A": "red", "C": "blue"},
    "other keys": {"1": "red", "2": "blue"},
    "the first is null": {"A": None, "B": "red"},
    "objects": [{"A": "red"}, {"B": "blue"}],
    "a null among them": ["red", None],
    "half an emoji": ["red", "\ud83d"],
    "NUL": ["red", "b\0"],
}


@JSON
@pytest.mark.parametrize("kind", BAD_OPTIONS)
def test_options_that_are_not_certain_are_refused_by_name_and_the_other_row_is_kept(place, read, kind):
    reject, kept = read(place, [GOOD | {"options": BAD_OPTIONS[kind]}, GOOD])
    assert reject.reason == "question" and "`options`" in reject.detail
    assert kept.answer == "red"


@JSON
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", ["question", "answer", "task", "evidence", "options", "id"])
def test_what_is_no_number_is_no_text(place, read, key, value):
    if key == "id" and read is read_incoming:
        pytest.skip("rows of data/incoming have no id")
    reject, kept = read(place, [GOOD | {key: ["red", value] if key == "options" else value}, GOOD])
    assert f"`{key}` is {value!r}, expected a text" in reject.detail and kept.answer == "red"


def test_nan_in_parquet_is_no_text(place):
    reject, kept = read_parquet(place, [GOOD | {"answer": value} for value in (float("nan"), 3.5)])
    assert "`answer` is nan, expected a text" in reject.detail and kept.answer == "3.5"


@JSON
@pytest.mark.parametrize("bad", ["\ud83d", "\udcff", "a\0b", "\x1b[31m", "\x85"])
@pytest.mark.parametrize("key", ["question", "answer", "image", "id", "evidence"])
def test_a_text_that_is_none_is_named_and_the_other_row_is_kept(place, read, key, bad):
    if key == "id" and read is read_incoming:
        pytest.skip("rows of data/incoming have no id")
    reject, kept = read(place, [GOOD | {key: f"x{bad}"}, GOOD])
    assert f"`{key}` = " in reject.detail and "which is not valid text" in reject.detail and reject.detail.isprintable()
    assert kept.answer == "red"
    write_rejects(place / "rejects.parquet", [reject])
    assert read_rejects(place / "rejects.parquet") == [reject]


def test_a_reject_is_written_whatever_it_quotes(tmp_path):
    write_rejects(tmp_path / "r.parquet", [Reject("caf\udce9", "\ud83d", "file", "x")])
    (read,) = read_rejects(tmp_path / "r.parquet")
    assert (read.id, read.subset) == ("caf\\udce9", "\\ud83d")


@EVERY
def test_pictures_in_base64_and_in_data_uris_are_read_and_damage_is_named_in_short(place, read):
    text = base64.b64encode(PICTURE).decode()
    wrapped = "\n".join(text[n : n + 76] for n in range(0, len(text), 76))
    good = [text, wrapped, f"data:image/png;base64,{text}"]
    bad = [text[:-8], text[:100] + "!" + text[100:], f"data:image/png;base64,{text[:99]}", f"data:,{text}", "x" * 9000]
    found = read(place, [GOOD | {"image": image} for image in (*good, *bad)])
    assert [getattr(row, "answer", None) for row in found[:8]] == ["red"] * 3 + [None] * 5
    for reject in found[3:8]:
        assert reject.reason in ("image", "no image") and len(reject.detail) < 250, reject
    assert quoted(text) in found[6].detail or "data: URI" in found[6].detail


@EVERY
@pytest.mark.parametrize("name", ["../a.png", "in/../../a.png", "{place}/a.png", "out/b.png", "https://host/a.png"])
def test_pictures_outside_the_folder_are_not_read(tmp_path, read, name):
    place = tmp_path / "place"
    (tmp_path / "outside").mkdir()
    place.mkdir()
    for file in (tmp_path / "a.png", place / "a.png", tmp_path / "outside/b.png"):
        file.write_bytes(PICTURE)
    for inside in (place, place / "road"):
        inside.mkdir(exist_ok=True)
        if read is not read_folder and inside == place:
            continue
        if name.startswith("out/") and not (inside / "out").exists() and (read is not read_folder or inside == place):
            (inside / "out").symlink_to(tmp_path / "outside")
    if name.startswith("out/"):  # a linked folder: DVC does not look into it
        with pytest.raises(ClearError, match=r"out: a link to a folder; link its files"):
            read(place, [GOOD | {"image": name}])
        return
    (reject,) = (row for row in read(place, [GOOD | {"image": name.format(place=place)}]) if row.reason == "no image")
    assert "lies outside" in reject.detail or "download it" in reject.detail


@EVERY
def test_a_linked_file_is_read(tmp_path, read):
    """As `cp -rs` and DVC's cache make them."""
    (tmp_path / "far.png").write_bytes(PICTURE)
    place = tmp_path / "place"
    (place / "road").mkdir(parents=True)
    for inside in (place, place / "road"):
        (inside / "b.png").symlink_to(tmp_path / "far.png")
    (place / "a.png").write_bytes(PICTURE)
    assert read(place, [GOOD | {"image": "b.png"}])[0].answer == "red"


@JSON
def test_lines_that_are_no_utf8_are_named_with_the_byte_and_a_byte_order_mark_is_fine(place, read):
    kept = read(place, [GOOD])  # makes the folders
    table = (place if read is read_folder else place / "road") / "t.jsonl"
    lines = [GOOD | {"answer": "caf\u00e9"}, GOOD]
    table.write_bytes("\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode("cp1252"))
    read_again = [
        examine(row, RULES) for row in folder.rows(place)
    ] if read is read_folder else [incoming.look(row) for row in incoming.rows_of(place / "road")]  # fmt: skip
    reject, good = read_again[0] if read is read_folder else read_again[0].reject, read_again[1]
    position = json.dumps(lines[0], ensure_ascii=False).index("\u00e9") + 1
    assert reject.reason == "line" and f"byte {position} of the line, 0xe9, is not UTF-8" in reject.detail
    assert not isinstance(good, Reject) and kept
    table.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\n")
    rows = list(folder.rows(place) if read is read_folder else incoming.rows_of(place / "road"))
    assert len(rows) == 1 and rows[0].questions[0].answer == "red"
    table.write_bytes(json.dumps(GOOD).encode("utf-16"))
    with pytest.raises(ClearError, match=r"t\.jsonl: is UTF-16, expected UTF-8; convert it"):
        list(folder.rows(place) if read is read_folder else incoming.rows_of(place / "road"))


@pytest.mark.parametrize("line", ['{"a": 1, "a": 2}', "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "{'a': 1}"])
def test_odd_json_is_one_reject(place, line):
    (place / "t.jsonl").write_text(line + "\n" + json.dumps(GOOD) + "\n")
    reject, kept = folder.rows(place)
    assert reject.reason == "line" and len(reject.detail) < 300 and kept.questions[0].answer == "red"


def parts(*texts: str | None) -> list[dict]:
    return [{"type": "image", "text": None} if text is None else {"type": "text", "text": text} for text in texts]


def turns(question: object, answer: object) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_turns_of_parts_are_read_as_chat_templates_write_them(place):
    talks = [
        turns(parts(None, "Which?"), parts("red")),
        turns(parts("Which?\nA. red\nB. blue", None), parts("A")),
        turns(parts(None, None, "Which?"), parts("red")),
        turns(parts("Which?"), parts(None)),
        turns([{"type": "video", "text": "x"}], parts("red")),
    ]
    rows = [{"image": {"bytes": PICTURE, "path": None}, "conversations": talk} for talk in talks]
    pq.write_table(pa.Table.from_pylist(rows), place / "x.parquet")
    first, second, *bad = llava_onevision.rows(place)
    assert (first.questions[0].text, first.questions[0].answer) == ("Which?", "red")
    assert (second.questions[0].answer, second.questions[0].options) == ("A", ("red", "blue"))
    said = [
        "2 images in the conversation",
        "turn 1 answers with an image",
        "turn 0 holds {'text': 'x', 'type': 'video'}",
    ]
    for reject, word in zip(bad, said, strict=True):
        assert reject.reason == "conversation" and word in reject.detail


@pytest.mark.parametrize("name", ["/etc/hostname", "../a.png"])
def test_llava_reads_nothing_outside_its_folder(tmp_path, name):
    (tmp_path / "set").mkdir()
    (tmp_path / "a.png").write_bytes(PICTURE)
    rows = [{"image": {"bytes": None, "path": name}, "conversations": turns("Which?", "red")}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set/x.parquet")
    (reject,) = llava_onevision.rows(tmp_path / "set")
    assert reject.reason == "no image" and "lies outside" in reject.detail


def test_a_text_in_parquet_that_is_no_utf8_is_one_reject(place):
    texts = pa.array([b"red", b"caf\xe9"], pa.binary()).view(pa.string())
    table = pa.table({"image": ["a.png"] * 2, "question": ["Which?"] * 2, "answer": texts})
    read_parquet(place, [GOOD])
    pq.write_table(table, place / "road/t.parquet")
    kept, reject = incoming.rows_of(place / "road")
    assert kept.questions[0].answer == "red"
    assert reject.where == "t.parquet:2" and "byte 4 of a text is not UTF-8" in reject.reject.detail


# --- files and folders -----------------------------------------------------------------------------------------------


def test_what_file_managers_leave_is_no_part_of_a_set_and_no_table(place):
    plain = read_incoming(place, [GOOD])
    before = incoming.sets(place)[0].fingerprint
    for inside in (place, place / "road"):
        for name in (
            ".DS_Store",
            "._a.png",
            "._t.jsonl",
            "._x.parquet",
            "Thumbs.db",
            "desktop.ini",
            "__MACOSX/x.jsonl",
        ):
            (inside / name).parent.mkdir(exist_ok=True)
            (inside / name).write_bytes(b"\x00\x05\x16\x07")
    assert incoming.sets(place)[0].fingerprint == before and not incoming.sets(place)[0].faults
    assert [incoming.look(row).questions[0] for row in incoming.rows_of(place / "road")] == plain
    assert len(read_folder(place, [GOOD])) == 1
    rows = [{"image": {"bytes": PICTURE, "path": None}, "conversations": turns("Which?", "red")}]
    pq.write_table(pa.Table.from_pylist(rows), place / "x.parquet")
    (place / "road/t.jsonl").unlink()
    assert len(list(llava_onevision.rows(place))) == 1


NOT_UTF8 = os.fsdecode(b"caf\xe9.png")


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def circular(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        (NOT_UTF8, Path.touch, "not UTF-8"),
        ("notes\x07.txt", Path.touch, "control characters"),
        ("b.png", dangling, "a broken link"),
        ("b.png", circular, "a broken link"),
        ("b.png", os.mkfifo, "is not a file"),
    ],
)
def test_a_file_that_cannot_be_read_is_listed_in_its_own_set_and_stops_no_other(place, name, make, said):
    kept = read_incoming(place, [GOOD])
    (place / "other").mkdir()
    make(place / "other" / name)
    road, other = sorted(incoming.sets(place), key=lambda one: one.name != "road")
    assert not road.faults and said in other.faults[0] and other.faults[0].isprintable()
    both = intake.read(place)
    assert both.count(*intake.SLICES) == len(kept) == 1
    (reject,) = both.rejects
    assert (reject.subset, reject.reason) == ("other", "file") and said in reject.detail and reject.id.isprintable()
    assert intake.read(place, "road").rejects == ()


@pytest.mark.parametrize("make", [dangling, circular])
def test_a_set_that_is_a_link_to_nowhere_is_listed_and_stops_no_other(place, make):
    read_incoming(place, [GOOD])
    make(place / "far")
    far, road = incoming.sets(place)
    assert far.faults == ("far: a broken link; correct or remove it",) and not road.faults
    with pytest.raises(ClearError, match="far: a broken link"):
        intake.read(place)
    assert intake.read(place, "road").count(*intake.SLICES) == 1


@pytest.mark.parametrize("make", [dangling, circular])
def test_a_row_that_names_a_link_to_nothing_is_rejected_once(place, make):
    read_incoming(place, [GOOD])
    make(place / "road/b.png")
    (place / "road/t.jsonl").write_text("".join(json.dumps(GOOD | {"image": n}) + "\n" for n in ("a.png", "b.png")))
    (reject,) = intake.read(place).rejects
    assert reject.id == "road/t.jsonl:2" and "a broken link" in reject.detail


@pytest.mark.parametrize("name", ["t.jsonl", "T.PARQUET", NOT_UTF8.replace("png", "jsonl")])
def test_a_table_that_cannot_be_opened_refuses_its_own_set_alone(place, name):
    read_incoming(place, [GOOD])
    (place / "other").mkdir()
    dangling(place / "other" / name)
    with pytest.raises(ClearError, match=r"other/.*(broken link|not UTF-8)"):
        intake.read(place)
    assert intake.read(place, "road").count(*intake.SLICES) == 1
    if name != "T.PARQUET":
        with pytest.raises(ClearError, match=r"broken link|not UTF-8"):
            list(folder.rows(place / "other"))


PERMISSIONS = """
import sys
from pathlib import Path
from clear.errors import ClearError
from clear.sources import folder, incoming, intake
place = Path(sys.argv[1])
for one in incoming.sets(place):
    print(one.name, one.files, *one.faults)
came = intake.read(place, "good")
print(came.count(*intake.SLICES), *(f"{r.id}: {r.reason}: {r.detail}" for r in came.rejects))
for read in (lambda: intake.read(place), lambda: list(folder.rows(place / "shut"))):
    try:
        print("read", read())
    except ClearError as error:
        print("refused", error)
"""


def test_files_and_folders_without_permission_are_named(place):
    """In a process that may not override permissions, as root may."""
    read_incoming(place, [GOOD])
    (place / "road").rename(place / "good")
    (place / "good/b.png").write_bytes(PICTURE)
    (place / "shut/more").mkdir(parents=True)
    (place / "shut/t.jsonl").write_text(json.dumps(GOOD) + "\n")
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.getuid() == 0 else []
    (place / "good/b.png").chmod(0)
    (place / "shut/more").chmod(0)
    try:
        command = [*drop, sys.executable, "-c", PERMISSIONS, str(place)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    finally:
        (place / "shut/more").chmod(0o755)
    assert done.returncode == 0, done.stderr
    good, shut, kept, all_sets, source = done.stdout.splitlines()
    assert good == "good 2 good/b.png: Permission denied; repair or remove it"
    assert shut == "shut 1 shut/more: Permission denied; make the folder readable or remove it"
    assert kept == "1 good/b.png: file: Permission denied; repair or remove it"
    assert "refused" in all_sets and "shut/more: Permission denied" in all_sets
    assert "refused" in source and "shut/more: Permission denied" in source


def test_files_are_found_in_one_order(tmp_path):
    for name in ("b/1.png", "a/2.png", "a.png", "B.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in look_through(tmp_path).files]
    assert found == ["B.png", "a.png", "a/2.png", "b/1.png"]
