"""Real data as clean samples: each layout is read, every row that is not used has a reason, splits follow content."""

import json
import os
from collections import Counter

import datasets
import pandas as pd
import pytest
from PIL import Image

from clear.bench.scoring import is_correct
from clear.data.records import read_samples
from clear.data.rejects import Reject
from clear.errors import ClearError
from clear.sources import folder, llava_onevision, lmudata
from clear.sources.rows import SPLITS, options_in
from clear.stages import source
from tests.helpers.sources import config_of, encoded, metrics, picture, rejects, tsv, write_jsonl
from tests.helpers.tables import b64


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty workspace with data/raw."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/raw").mkdir(parents=True)
    return tmp_path


# --- llava_onevision -------------------------------------------------------------------------------------------------


def talk(*pairs: tuple[str, str]) -> list[dict]:
    return [turn for q, a in pairs for turn in ({"from": "human", "value": q}, {"from": "gpt", "value": a})]


def llava_rows() -> list[dict]:
    return [
        {"id": "a", "image": {"bytes": encoded(0), "path": None}, "conversations": talk(("<image>\nWhat?", "A cup."))},
        {
            "id": "b",
            "image": {"bytes": encoded(1), "path": None},
            "conversations": talk(("Which?\nA. red\nB. blue\n<image>", "B"), ("Why?", "It is.")),
        },
        {"id": "c", "image": None, "conversations": talk(("No picture?", "No."))},
        {"id": "d", "image": {"bytes": encoded(2), "path": None}, "conversations": talk(("What?", ""))},
        {"id": "e", "image": {"bytes": encoded(3)[:500], "path": None}, "conversations": talk(("What?", "Cut."))},
        {"id": "f", "image": {"bytes": encoded(4), "path": None}, "conversations": talk(("这是什么?", "A cup."))},
        {"id": "g", "image": {"bytes": encoded(5, height=20), "path": None}, "conversations": talk(("What?", "Flat."))},
        {"id": "h", "image": {"bytes": encoded(6, width=400), "path": None}, "conversations": talk(("What?", "Wide."))},
        {"id": "i", "image": {"bytes": encoded(7), "path": None}, "conversations": talk(("What?", "x"))[:1]},
        {"id": "j", "image": {"bytes": encoded(8, "BMP"), "path": None}, "conversations": talk(("What?", "A map."))},
        {"id": "k", "image": {"bytes": encoded(9, "JPEG"), "path": None}, "conversations": talk(("What?", "A jar."))},
    ]


def test_llava_onevision_end_to_end_every_row_is_used_or_has_a_reason(here):
    place = here / "data/raw/llava/chart(qa)"
    place.mkdir(parents=True)
    pd.DataFrame(llava_rows()).to_parquet(place / "train-00000-of-00001.parquet", row_group_size=4)
    rules = ["source.min_side=64", "source.max_aspect=5", "source.skip_cjk=true", "source.questions_per_image=1"]
    shares = "source.shares=[0,1,0,0,0,0]"
    source.run(config_of("source.kind=llava_onevision", "source.path=data/raw/llava", shares, *rules))
    kept = list(read_samples("data/samples/sft"))
    assert [json.loads(s.annotation)["id"] for s in kept] == ["a", "b", "j", "k"]
    assert all(s.source == "llava_onevision" and s.split == "sft" for s in kept)
    assert [(q.text, q.answer, q.options, q.task) for s in kept[:2] for q in s.questions] == [
        ("What?", "A cup.", (), "chart(qa)"),
        ("Which?\nA. red\nB. blue", "B", ("red", "blue"), "chart(qa)"),
    ]
    assert kept[0].image == encoded(0) and kept[3].image == encoded(9, "JPEG"), "PNG and JPEG stay as they are"
    assert kept[2].image[:3] == b"\xff\xd8\xff", "anything else becomes a JPEG"
    found = rejects()
    assert dict(zip(found.id.str[-1], found.reason, strict=True)) == {
        "2": "no image", "3": "conversation", "4": "image", "5": "language", "6": "size", "7": "aspect",
        "8": "conversation",
    }  # fmt: skip
    assert "80 x 20 px, source.min_side = 64" in set(found.detail) and (found.detail != "").all()
    assert metrics() == {
        "kind": "llava_onevision",
        "images": {split: 4 * (split == "sft") for split in SPLITS},
        "questions": {"sft": 4},
        "rejects": {"no image": 1, "conversation": 2, "image": 1, "language": 1, "size": 1, "aspect": 1},
        "not_sampled": 0,
    }


def test_without_rules_nothing_is_refused_for_size_aspect_or_language(here):
    place = here / "data/raw/llava"
    place.mkdir()
    pd.DataFrame(llava_rows()).to_parquet(place / "one.parquet")
    source.run(config_of("source.kind=llava_onevision", "source.path=data/raw/llava", "source.shares=[0,1,0,0,0,0]"))
    assert Counter(rejects().reason) == {"no image": 1, "conversation": 2, "image": 1}
    assert len(list(read_samples("data/samples/sft"))) == 7


def test_a_saved_hugging_face_data_set_is_read(tmp_path):
    rows = [{"image": picture(i), "conversations": talk((f"What {i}?", f"It {i}."))} for i in range(70)]
    rows = [row | {"image": Image.fromarray(row["image"])} for row in rows]
    saved = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    saved.save_to_disk(tmp_path / "set", num_shards=2)
    found = list(llava_onevision.rows(tmp_path / "set"))
    assert [row.questions[0].answer for row in found] == [f"It {i}." for i in range(70)]
    assert len({row.id for row in found}) == 70
    assert llava_onevision.count(tmp_path / "set") is None
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "dict")
    assert len(list(llava_onevision.rows(tmp_path / "dict"))) == 70
    saved.to_parquet(tmp_path / "p" / "x.parquet")
    assert llava_onevision.count(tmp_path / "p") == 70


def test_files_whose_names_differ_outside_ascii_alone_have_ids_of_their_own(tmp_path):
    for name in ("训练", "测试", "plain"):
        (tmp_path / name).mkdir()
        pd.DataFrame(llava_rows()[:1]).to_parquet(tmp_path / name / "data-0.parquet")
    found = {row.id for row in llava_onevision.rows(tmp_path)}
    assert len(found) == 3 and "llava-plain_data-0-000000" in found, "and others keep theirs, which seeds depend on"


def test_images_that_lie_beside_the_file_and_lists_of_one_are_read(tmp_path):
    (tmp_path / "cup.png").write_bytes(encoded(0))
    rows = [
        {"image": [{"bytes": None, "path": "cup.png"}], "conversations": talk(("What?", "A cup."))},
        {"image": [{"bytes": None, "path": "gone.png"}], "conversations": talk(("What?", "A cup."))},
        {"image": [{"bytes": b"1", "path": None}] * 2, "conversations": talk(("What?", "Two cups."))},
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "x.parquet")
    first, second, third = llava_onevision.rows(tmp_path)
    assert first.image == encoded(0)
    assert isinstance(second, Reject) and "gone.png': no such file beside x.parquet" in second.detail
    assert isinstance(third, Reject) and "2 images" in third.detail


@pytest.mark.parametrize("column", ["image", "conversations"])
def test_a_parquet_file_of_another_layout_is_named(tmp_path, column):
    pd.DataFrame(llava_rows()).drop(columns=column).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ClearError, match=rf"x\.parquet: no column '{column}'"):
        list(llava_onevision.rows(tmp_path))
    (tmp_path / "x.parquet").write_bytes(b"nothing")
    with pytest.raises(ClearError, match=r"x\.parquet: not a readable parquet file"):
        list(llava_onevision.rows(tmp_path))


def test_options_are_found_where_lines_list_them():
    assert options_in("Which?\nA. red one\nB) blue\n(C) green\nAnswer with the letter.") == ("red one", "blue", "green")
    assert options_in("A. Einstein was born when?") == ()
    assert options_in("Which?\nB. red\nC. blue") == ()


@pytest.mark.parametrize(
    ("gold", "answer", "listed"),
    [
        ("Answer: B", "B", True),
        ("answer : (B).", "(B).", True),
        ("Answer: blue", "blue", True),
        ("B", "B", True),
        ("Answer: green", "Answer: green", False),
        ("Answer:", "Answer:", False),
        ("It is blue, the answer: B", "It is blue, the answer: B", False),
    ],
)
def test_an_answer_that_names_an_option_after_the_word_answer_is_multiple_choice(gold, answer, listed):
    """Asked with its options, it was free: the letter alone, as every other question asks for, was wrong."""
    turns = [{"from": "human", "value": "<image>\nWhich?\nA. red\nB. blue"}, {"from": "gpt", "value": gold}]
    (asked,) = llava_onevision._questions("i", "s", turns)
    assert (asked.answer, asked.options) == (answer, ("red", "blue") if listed else ())
    assert is_correct("B", asked) is is_correct("blue", asked) is listed
    (free,) = llava_onevision._questions("i", "s", [turns[0] | {"value": "What does the sign say?"}, turns[1]])
    assert (free.answer, free.options) == (gold, ()), "nothing is taken from a free answer"


def test_lmudata_reads_every_kind_of_row_as_vlmevalkit_does(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/x.png").write_bytes(encoded(2))
    first, second = b64(encoded(0)), b64(encoded(1))
    common = {"category": "colour", "l2-category": "fine", "split": "dev", "comment": 'a "quoted"\tthing'}
    rows = [
        {"index": 1000001, "image": "1", "question": "Which?", "A": "red", "B": "blue", "answer": "A", **common},
        {"index": 1, "image": first, "question": "Which?\nSay.", "A": "red", "B": "blue", "answer": "B", **common},
        {"index": 2, "image": second, "question": "Free?", "answer": "it <AND> that", "hint": "look", **common},
        {"index": 3, "image": "77", "question": "Lost?", "answer": "x"},
        {"index": 4, "image": "1000001", "question": "Chained?", "answer": "x"},
        {"index": 5, "image": "!" * 100, "question": "Odd?", "answer": "x"},
        {"index": 6, "image": second, "question": "Gap?", "A": "red", "C": "blue", "answer": "A"},
        {"index": 7, "image": second, "question": "None of them?", "A": "red", "B": "blue", "answer": "D"},
        {"index": 8, "image_path": "images/x.png", "question": "Beside?", "answer": "x"},
        {"index": 9, "image_path": "../secret.png", "question": "Outside?", "answer": "x"},
        {"index": 10, "image": second, "question": "Nothing?", "answer": ""},
        {"index": 11, "image": "", "question": "No picture?", "answer": "x"},
    ]
    tsv(tmp_path / "Bench.tsv", rows)
    found = list(lmudata.rows(tmp_path))
    assert lmudata.count(tmp_path) == len(found) == 12
    good = {row.id: row for row in found if not isinstance(row, Reject)}
    assert list(good) == ["Bench-1000001", "Bench-1", "Bench-2", "Bench-4", "Bench-6", "Bench-8"]
    assert good["Bench-1000001"].image == good["Bench-1"].image == good["Bench-4"].image == encoded(0)
    assert good["Bench-6"].questions[0].options == ("red", "", "blue"), "an empty option keeps the letters behind it"
    assert good["Bench-8"].image == encoded(2)
    asked = good["Bench-1"].questions[0]
    assert (asked.text, asked.options, asked.answer, asked.task) == ("Which?\nSay.", ("red", "blue"), "B", "Bench")
    assert good["Bench-2"].questions[0].text == "Hint: look\nFree?"
    assert good["Bench-1"].origin == {"subset": "Bench", "index": "1"} | common
    bad = {row.id: (row.reason, row.detail) for row in found if isinstance(row, Reject)}
    for number, said in {
        3: "refers to index 77",
        5: "not base64",
        7: "'D' names none of the options red, blue",
        9: "leads out of the folder",
        10: "the answer is empty",
        11: "no image",
    }.items():
        assert said in bad[f"Bench-{number}"][1], number
    assert {reason for reason, _ in bad.values()} == {"no image", "question"}


def test_cv_bench_asks_its_prompt_and_mmvp_rows_are_pairs(tmp_path):
    image = b64(encoded(0))
    tsv(
        tmp_path / "CV-Bench-2D.tsv",
        [{"index": 0, "image": image, "prompt": "How many?", "A": 1, "B": 2, "answer": "A"}],
    )
    rows = [{"index": i + 1, "image": image, "question": "Q?", "A": "l", "B": "r", "answer": "A"} for i in range(4)]
    tsv(tmp_path / "MMVP.tsv", rows)
    cv, *mmvp = [row.questions[0] for row in lmudata.rows(tmp_path)]
    assert cv.text == "How many?" and cv.options == ("1", "2") and cv.pair == ""
    assert [q.pair for q in mmvp] == ["MMVP-pair-0", "MMVP-pair-0", "MMVP-pair-1", "MMVP-pair-1"]


def test_halves_of_an_mmvp_pair_are_found_by_their_index_whatever_rows_are_left_out(tmp_path):
    image = b64(encoded(0))
    whole = [{"index": i, "image": image, "question": f"Q{(i - 1) // 2}?", "answer": "x"} for i in range(1, 9)]
    pairs = {row["index"]: f"MMVP-pair-{(row['index'] - 1) // 2}" for row in whole}
    for gone in ({}, {1}, {2}, {4}, {1, 4, 5}):
        tsv(tmp_path / "MMVP.tsv", [row for row in whole if row["index"] not in gone])
        found = {int(row.origin["index"]): row.questions[0].pair for row in lmudata.rows(tmp_path)}
        assert found == {index: pair for index, pair in pairs.items() if index not in gone}, gone


def test_text_of_a_tsv_stays_text_and_every_letter_names_an_option(tmp_path):
    options = ["None", "NA", "null", "nan", "007", "1e5", "True", "1.0", " x ", "12345678901234567890"]
    lines = ["\t".join(("index", "image", "question", *"ABCDEFGHIJ", "answer"))]
    lines += ["\t".join((str(n), b64(encoded(0)), "NA", *options, "ABCDEFGHIJ"[n])) for n in range(10)]
    lines.append("\t".join(("10", b64(encoded(0)), "NA", *options, "K")))
    (tmp_path / "X.tsv").write_text("\n".join(lines) + "\n")
    *good, last = lmudata.rows(tmp_path)
    assert [(row.questions[0].answer, row.questions[0].text) for row in good] == [(c, "NA") for c in "ABCDEFGHIJ"]
    assert {row.questions[0].options for row in good} == {tuple(options)}
    assert isinstance(last, Reject) and "'K' names none of the options" in last.detail


def test_images_in_every_form_that_vlmevalkit_reads_and_none_from_outside(tmp_path):
    (tmp_path / "secret.png").write_bytes(encoded(3))
    lmu = tmp_path / "lmu"
    (lmu / "images").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (lmu / "link").symlink_to(tmp_path / "other")
    (lmu / "images/x.png").symlink_to(tmp_path / "secret.png")  # as by cp -rs in docs/DATA.md
    text = b64(encoded(1))
    wrapped = "\n".join(text[n : n + 76] for n in range(0, len(text), 76))
    images = {
        "wrapped": {"image": wrapped},
        "uri": {"image": f"data:image/png;base64,{text}"},
        "chain": {"image": "step"},
        "step": {"image": "uri"},
        "linked": {"image_path": "images/x.png"},
        "circle": {"image": "circle2"},
        "circle2": {"image": "circle"},
        "list": {"image": f"['{text}', '{text}']"},
        "to a list": {"image": "list"},
        "paths": {"image_path": "['images/x.png']"},
        "absolute": {"image_path": str(tmp_path / "secret.png")},
        "climbing": {"image_path": "images/../../secret.png"},
        "by a link": {"image_path": "link/../secret.png"},
        "folder": {"image_path": "images"},
        "nul": {"image_path": "a\0b"},
        "plain uri": {"image": "data:,abc"},
    }
    tsv(lmu / "X.tsv", [{"index": name, "question": "?", "answer": "x"} | cell for name, cell in images.items()])
    found = {row.id.removeprefix("X-"): row for row in lmudata.rows(lmu)}
    assert list(found) == list(images)
    assert {found[name].image for name in ("wrapped", "uri", "chain", "step")} == {encoded(1)}
    assert found["linked"].image == encoded(3)
    for name, said in {
        "circle": "image refers in a circle: circle2 → circle → circle2",
        "circle2": "image refers in a circle: circle → circle2 → circle",
        "list": "the row has a list of images, expected one",
        "to a list": "the row has a list of images, expected one",
        "paths": "the row has a list of images, expected one",
        "absolute": "leads out of the folder",
        "climbing": "leads out of the folder",
        "by a link": "leads out of the folder",
        "folder": "image_path images: Is a directory",
        "nul": "embedded null byte",
        "plain uri": "a data: URI, but not in base64 (data:)",
    }.items():
        assert found[name].reason == "no image" and said in found[name].detail, name


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a\tb\n1\t2\n", "no header with 'index'"),
        (b"index\tquestion\n1\tx\ty\n", "row 1 has 3 cells, the header 2"),
        (b"index\tquestion\n1\tx\n1\ty\n", "index '1' occurs twice"),
        (b"index\tquestion\n1\t\xff\n", "byte 17 is not UTF-8"),
        ("index\tquestion\n1\tx\n".encode("utf-16"), "is UTF-16"),
        (b"index\tquestion\n", "has a header and no row"),
        (b"", "is empty"),
        (None, "cannot be read"),  # a link that leads nowhere
    ],
)
def test_a_tsv_that_cannot_be_read_is_one_reject_and_the_others_are_read(tmp_path, content, said):
    for name in ("A.tsv", "Z.tsv"):
        tsv(tmp_path / name, [{"index": 1, "image": b64(encoded(0)), "question": "Q?", "answer": "x"}])
    (tmp_path / "B.tsv").symlink_to("nowhere") if content is None else (tmp_path / "B.tsv").write_bytes(content)
    first, bad, last = lmudata.rows(tmp_path)
    assert (first.id, last.id) == ("A-1", "Z-1") and lmudata.count(tmp_path) >= 2
    assert (bad.id, bad.subset, bad.reason) == ("B.tsv", "B", "file") and f"B.tsv: {said}" in bad.detail


def test_byte_order_mark_and_windows_line_ends_change_nothing_and_odd_names_are_named(tmp_path):
    text = f"index\timage\tquestion\tanswer\n1\t{b64(encoded(0))}\tQ é?\tx\n"
    for name, data in {
        "A": text.encode(),
        "B": text.encode("utf-8-sig"),
        "C": text.replace("\n", "\r\n").encode(),
    }.items():
        (tmp_path / f"{name}.tsv").write_bytes(data)
    (tmp_path / os.fsdecode(b"D\xff.tsv")).write_bytes(text.encode())
    *good, bad = lmudata.rows(tmp_path)
    assert [row.questions[0].text for row in good] == ["Q é?"] * 3
    assert [(row.questions[0].answer, row.image) for row in good] == [("x", encoded(0))] * 3
    assert bad.id == "D\\xff.tsv" and "the name is not UTF-8" in bad.detail and bad.detail.isprintable()


# --- folder ----------------------------------------------------------------------------------------------------------


def test_a_folder_with_json_lines_is_read_and_odd_lines_are_rejected(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(encoded(0))
    lines = [
        {"image": "in/a.png", "question": "What?", "answer": "A cup", "id": "cup"},
        {"image": "in/a.png", "questions": [{"question": "1?", "answer": 1}, {"question": "2?", "answer": "b",
         "options": ["a", "b"], "task": "pick", "id": "own", "evidence": "seen", "pair": "p"}]},
        {"image": "gone.png", "question": "What?", "answer": "x"},
        {"image": "../a.png", "question": "What?", "answer": "x"},
        {"image": "in/a.png", "question": "What?"},
        {"question": "What?", "answer": "x"},
        {"image": "in/a.png", "question": ["What?"], "answer": "x"},
        {"image": "in/a.png", "questions": []},
        {"image": "in/a.png", "question": "Which?", "answer": "z", "options": ["a", "b"]},
        {"image": "in/a.png", "questions": [{"question": f"{n}?", "answer": n, "id": "same"} for n in range(2)]},
        [1],
    ]  # fmt: skip
    write_jsonl(tmp_path, lines)
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write("\n{broken\n")
    found = list(folder.rows(tmp_path))
    assert folder.count(tmp_path) == len(found) == 12
    cup, two, *bad = found
    assert cup.id == "cup" and cup.questions[0].id == "cup-0" and cup.questions[0].task == "data"
    assert two.id == "data-000002" and two.questions[0].answer == "1"
    assert two.questions[1].id == "own" and two.questions[1].task == "pick" and two.questions[1].options == ("a", "b")
    assert (two.questions[1].evidence, two.questions[1].pair) == ("seen", "p")
    assert [row.reason for row in bad] == [
        "no image", "no image", "question", "line", "question", "question", "question", "question", "line", "line",
    ]  # fmt: skip
    assert bad[-1].id == "data-000013" and "not a JSON object" in bad[-1].detail
