"""Input that is merely large, or made to be read in the square of its size: read in steps that grow with it, or
refused.

Where a text is searched, a pattern that tries every length would take hours over the one here: such a test ends, or it
does not. The others count steps, bytes or characters.
"""

import json
import re
import tracemalloc

import numpy as np
import pytest
import yaml

from clear import config
from clear.bench.vlmeval import names, options, scores
from clear.bench.vlmeval.answering import _Journal
from clear.data import images, tables
from clear.errors import LONGEST, ClearError
from clear.model import tokenizer
from clear.project.compare import load
from clear.sources import clear_train, fields, folder, lmudata
from clear.sources.rows import options_in
from clear.sources.scenes.words import lists_options, normalise
from flows.batch import notes
from tests.helpers.tables import write_tsv

MANY = 10**6


@pytest.mark.parametrize("text", ["\n" * MANY, "A. x" + " " * MANY + "y", "A.\n" + " \n" * MANY])
def test_options_are_looked_for_in_a_text_once(text):
    assert options_in(text) == ()
    listed = options_in(f"{text}\nB) red \t\n  (C) two words")
    assert listed[-2:] == (("red", "two words") if "x" in text else ())


def test_a_list_of_options_is_compared_without_a_pattern_of_them(monkeypatch):
    long = " ".join(["word"] * 10**4)
    made = []
    monkeypatch.setattr(re, "escape", lambda text: made.append(text) or text)
    assert lists_options(f"Which?\nA. {long}\n(B)  {long}, or C: a\nD red!", [long, long, "a", "red"])
    assert not lists_options(f"Which? A. {long}", [long, long]) and not made
    assert not lists_options("A.x." * (MANY // 4), ["x", "y"])


def test_words_are_compared_whatever_is_heaped_on_them():
    heaped = "a" + "\u0301\u0327" * MANY
    assert normalise(heaped) == normalise("a" + "\u0301\u0327" * 15) == names.tidy(heaped)
    assert normalise("e\u0301") == "é" and normalise("x" + "—" * 40 + "e\u0301") == "x é"


def test_the_end_of_a_block_is_not_looked_for_from_every_beginning():
    def reply(text: str) -> str:
        turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}]
        return clear_train._conversation("a", "b", turns)[0].answer

    assert reply("<answer>" * MANY + " red </answer> <answer> blue </answer><answer>").strip() == "blue"
    with pytest.raises(fields.Unusable, match="no answer block"):
        reply("<answer>" * MANY + " " * MANY)


def test_a_letter_is_looked_for_behind_signs_once():
    assert options.chosen("answer is A" + "," * MANY + "1 2 3 4 5", ["red", "blue"]) == "A"
    assert [options.chosen(f"the answer is A{more} 1 2 3 4", ["x", "y"]) for more in (" or B", ", / B", "")] == [
        "",
        "",
        "A",
    ]


def test_a_picture_in_base64_may_have_spaces():
    assert fields._BASE64.fullmatch("/9j/" + " " * MANY + "!") is None
    assert all(fields._BASE64.fullmatch(f"/9j/ab\ncd{end}") for end in ("", "=", "== ", "\n"))


def test_the_questions_of_a_line_are_compared_with_no_other(tmp_path, monkeypatch):
    """An id is hashed once; the old code compared each with all before it."""

    class Id(str):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Id.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    asked = [{"question": "q", "answer": "a"}] * 300
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "questions": asked}))
    original = folder._question
    monkeypatch.setattr(folder, "_question", lambda id, *rest: original(Id(id), *rest))
    (tmp_path / "a.png").write_bytes(b"x")
    (row,) = folder.rows(tmp_path)
    assert len(row.questions) == 300 and Id.compared < 300


def test_a_row_is_asked_once_for_the_one_that_holds_its_picture(tmp_path):
    """Of rows that each name the next one, and of a circle of them, which every one of its rejects would have named."""

    class Counted(dict):
        asked = 0

        def __getitem__(self, key: str) -> str:
            Counted.asked += 1
            return dict.__getitem__(self, key)

    count = 300
    circle = "image refers in a circle: 298 → 299 → 0 → 1 → 2 → … → 298"
    for last, of_298 in (("=" * 80, ("299", "")), ("0", ("", circle)), ("x", ("", "image refers to index x, .*"))):
        rows = [{"index": n, "image": n + 1, "question": "q", "answer": "a"} for n in range(count)]
        rows[-1]["image"] = last
        table = lmudata.Table(write_tsv(tmp_path / "a.tsv", rows))
        table._references, Counted.asked = Counted(table._references), 0
        found = [table.holder(str(n)) for n in range(count)]
        assert found[298][0] == of_298[0] and re.match(of_298[1], found[298][1])
        assert Counted.asked <= count and max(len(wrong) for _, wrong in found) < 80


@pytest.mark.parametrize("rows", [[{f"k{n}": 1} for n in range(200)], [{f"k{n}": 1 for n in range(100)}, *[{}] * 399]])
def test_a_table_of_rows_that_state_next_to_nothing_is_refused(tmp_path, monkeypatch, rows):
    (tmp_path / "a.json").write_text(json.dumps(rows))
    monkeypatch.setattr(tables, "CELLS", 20_000)
    with pytest.raises(ClearError, match=r"more than 20,000 cells in \d+ columns; leave columns out"):
        list(tables.read(tmp_path / "a.json")[1])


def test_a_table_whose_every_row_is_another_benchmark_is_refused(tmp_path, monkeypatch):
    row = {"question": "q", "answer": "A", "prediction": "A", "corruption": "clean", "severity": "clean"}
    file = write_tsv(tmp_path / "m_MMStar.tsv", [row | {"index": n, "bench": f"b{n}"} for n in range(21)])
    assert len(scores.read_file(file)) == 21
    monkeypatch.setattr(scores, "MOST_PARTS", 20)
    with pytest.raises(ClearError, match="21 different bench, corruption, severity, and at most 20 are scored"):
        scores.read_file(file)


@pytest.mark.parametrize("long", ["a" * MANY, "\x01" * MANY, "a\n" * MANY])
def test_a_refusal_is_short_and_keeps_its_place_and_its_remedy(long):
    said = str(ClearError(f"a.tsv: {long}; repair the cell."))
    assert said.startswith("a.tsv: ") and said.endswith("; repair the cell.") and len(said) < 5 * LONGEST
    assert f"… ({len(long) + 25 - LONGEST:,} characters) …" in said and "\n" not in said


def test_a_secret_is_hidden_before_the_middle_is_left_out(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "s3cr3t-s3cr3t")
    around = "x" * (LONGEST // 2 - 6)
    assert "s3cr" not in str(ClearError(f"{around}s3cr3t-s3cr3t{'y' * MANY}"))


def test_added_tokens_are_added_in_one_call(tmp_path):
    """The library makes its search for added tokens anew in each call."""
    from tokenizers import AddedToken

    class Counted:
        calls = ()

        def __init__(self) -> None:
            self.real = tokenizer.word_tokenizer(["red"])
            self.token_to_id = self.real.token_to_id

        def add_tokens(self, new: list) -> None:
            self.calls += (len(new),)
            self.real.add_tokens(new)

        def add_special_tokens(self, new: list) -> None:
            self.calls += (len(new),)
            self.real.add_special_tokens(new)

    made, known = Counted(), len(tokenizer.MARKERS) + 2
    plain = {AddedToken("plain", special=False): known + 50}
    tokenizer._append(made, {f"<{n}>": known + n for n in range(50)} | {"red": None} | plain, tmp_path)
    kinds = made.real.get_added_tokens_decoder()
    assert made.calls == (51,) and kinds[known].special and not kinds[known + 50].special
    with pytest.raises(ClearError, match="token other is stated as id 7, but the vocabulary gives it 57"):
        tokenizer._append(made, {"other": 7}, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# a\n" * 2**17, "524,288 bytes, and at most 262,144 are read"),
        ("a: [" + "1," * config.MOST_VALUES + "1]", "more than 10,000 values or 100 levels"),
    ],
)
def test_parameters_of_more_than_anybody_writes_are_refused_before_they_are_read(tmp_path, monkeypatch, text, said):
    from omegaconf import OmegaConf

    monkeypatch.setattr(OmegaConf, "load", None)
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ClearError, match=said):
        config.load(tmp_path / "params.yaml")


@pytest.mark.parametrize("name", [load.LOCK, load.PARAMS])
def test_aliases_of_a_strangers_file_are_counted_out_before_they_are_followed(tmp_path, monkeypatch, name):
    """Nine lines stand for a billion parameters, and a comparison goes through all of them."""
    monkeypatch.setattr("dvc.utils.serialize.parse_yaml", None)
    lines = [
        "a0: &a0 {x: 1}",
        *(f"a{n + 1}: &a{n + 1} {{{', '.join(f'k{m}: *a{n}' for m in range(10))}}}" for n in range(9)),
    ]
    (tmp_path / name).write_text("\n".join(lines))
    with pytest.raises(ClearError, match=rf"{name}: more than 100,000 values or 100 levels, its aliases counted out"):
        load._yaml(tmp_path / name, "there")


def test_what_dvc_reads_is_counted_without_being_refused(tmp_path):
    content = {"stages": {f"s{n}": {"cmd": "c", "outs": [{"path": f"o{n}", "md5": "m"}]} for n in range(500)}}
    (tmp_path / load.LOCK).write_text(yaml.safe_dump(content))
    assert load.outputs(load.read_lock(tmp_path / load.LOCK)) == {f"o{n}": "m" for n in range(500)}
    (tmp_path / load.LOCK).write_text("a: [")
    with pytest.raises(ClearError, match="not valid YAML"):
        load.read_lock(tmp_path / load.LOCK)


@pytest.mark.parametrize("one", [b"1,", b'"a",', b"[],", b"{},"])
def test_a_note_of_millions_of_values_is_refused_before_it_is_parsed(monkeypatch, one):
    monkeypatch.setattr(notes.json, "loads", None)
    with pytest.raises(notes.Damaged, match=r"about [0-9,]+ values, and a note has 65,536 at most; delete it"):
        notes.parse("results/k.json", b'{"lock":{"deps":[%s1]}}' % (one * notes.MOST_VALUES))


def test_a_picture_is_laid_over_white_a_strip_at_a_time():
    rng = np.random.default_rng(0)
    for array in (rng.integers(0, 256, (1000, 1000, 4), np.uint8), rng.integers(0, 2**16, (700, 900, 1), np.uint16)):
        tracemalloc.start()
        made = images._over_white(array)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        whole = array[:, :, :3] / np.iinfo(array.dtype).max
        if array.shape[2] == 4:
            opacity = array[:, :, 3:] / 255
            whole = whole * opacity + (1 - opacity)
        assert np.array_equal(made, np.broadcast_to(np.rint(whole * 255), made.shape)) and made.dtype == np.uint8
        assert peak < made.nbytes + 100 * images._STRIP


def test_a_damaged_line_of_a_journal_is_named(tmp_path):
    first = json.dumps({"state": {}}) + "\n"
    (tmp_path / "a.jsonl").write_text(first + "[" * 10**5 + "\n")
    with pytest.raises(ClearError, match="line 2 is damaged"):
        _Journal(tmp_path / "a.jsonl", {})
