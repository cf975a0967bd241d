"""What a row may hold is read alike from every layout and format, and everything else is refused by name."""

import base64
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clear.data.rejects import Reject, read_rejects, write_rejects
from clear.errors import ClearError, quoted
from clear.sources import folder, incoming, llava_onevision
from clear.sources.rows import examine
from tests.helpers.rows import GOOD, PICTURE, RULES, parts, read_folder, read_incoming, read_parquet, turns

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


def test_an_integer_that_pandas_has_made_a_float_is_an_integer(place):
    seven, three = read_parquet(place, [GOOD | {"answer": value} for value in (7.0, 3.5)])
    assert (seven.answer, three.answer) == ("7", "3.5")


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
