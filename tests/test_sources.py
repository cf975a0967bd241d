"""Real data as clean samples: each layout is read, every row that is not used has a reason, splits follow content."""

import base64
import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clear.config import compose, from_dict
from clear.errors import ClearError
from clear.records import encode_image, read_samples
from clear.rejects import Reject
from clear.sources import folder, llava_onevision, lmudata
from clear.sources.rows import SPLITS, options_in, pixel_hash, split_of
from clear.stages import source
from tests.conftest import ROOT


def picture(number: int, width: int = 80, height: int = 64) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)


def encoded(number: int, kind: str = "PNG", **size) -> bytes:
    out = BytesIO()
    Image.fromarray(picture(number, **size)).save(out, kind)
    return out.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def config_of(*overrides: str):
    return from_dict(compose(["degrade.workers=2", *overrides]))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty workspace with data/raw."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/raw").mkdir(parents=True)
    return tmp_path


def rejects() -> pd.DataFrame:
    return pd.read_parquet("data/rejects/source.parquet")


def metrics() -> dict:
    return json.loads(Path("data/metrics/source.json").read_text())


def write_jsonl(place, rows) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


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
    assert isinstance(second, Reject) and "gone.png: No such file" in second.detail
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


# --- lmudata ---------------------------------------------------------------------------------------------------------


def tsv(file, rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(file, sep="\t", index=False)


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
    assert list(good) == ["Bench-1000001", "Bench-1", "Bench-2", "Bench-8"]
    assert good["Bench-1000001"].image == good["Bench-1"].image == encoded(0)
    assert good["Bench-8"].image == encoded(2)
    asked = good["Bench-1"].questions[0]
    assert (asked.text, asked.options, asked.answer, asked.task) == ("Which?\nSay.", ("red", "blue"), "B", "Bench")
    assert good["Bench-2"].questions[0].text == "Hint: look\nFree?"
    assert good["Bench-1"].origin == {"subset": "Bench", "index": "1"} | common
    bad = {row.id: (row.reason, row.detail) for row in found if isinstance(row, Reject)}
    for number, said in {
        3: "refers to index 77",
        4: "refers to index 1000001, and no row with this index holds an image",
        5: "not base64",
        6: "option B is empty",
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\tb\n1\t2\n", "no header with 'index'"),
        ("index\tquestion\n1\tx\ty\n", "row 1 has 3 cells, the header 2"),
        ("index\tquestion\n1\tx\n1\ty\n", "index 1 occurs twice"),
        ("index\tquestion\n1\t\udcff\n", "not UTF-8"),
    ],
)
def test_a_damaged_tsv_is_named_with_the_row(tmp_path, text, said):
    (tmp_path / "B.tsv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ClearError, match=rf"B\.tsv: .*{said}"):
        list(lmudata.rows(tmp_path))


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
        [1],
    ]  # fmt: skip
    write_jsonl(tmp_path, lines)
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write("\n{broken\n")
    found = list(folder.rows(tmp_path))
    assert folder.count(tmp_path) == len(found) == 11
    cup, two, *bad = found
    assert cup.id == "cup" and cup.questions[0].id == "cup-0" and cup.questions[0].task == "data"
    assert two.id == "data-000002" and two.questions[0].answer == "1"
    assert two.questions[1].id == "own" and two.questions[1].task == "pick" and two.questions[1].options == ("a", "b")
    assert (two.questions[1].evidence, two.questions[1].pair) == ("seen", "p")
    assert [row.reason for row in bad] == [
        "no image", "no image", "question", "line", "question", "question", "question", "line", "line",
    ]  # fmt: skip
    assert bad[-1].id == "data-000012" and "not JSON" in bad[-1].detail


# --- rules and splits ------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31 - 1), st.binary(min_size=32, max_size=32))
def test_a_split_depends_on_pixels_and_seed_only_and_a_larger_share_keeps_its_images(seed, pixels):
    first = split_of(pixels, seed, [0.1, 0.2, 0.1, 0.1, 0.1, 0.1])
    assert first == split_of(pixels, seed, [0.1, 0.2, 0.1, 0.1, 0.1, 0.1])
    assert split_of(pixels, seed, [1, 0, 0, 0, 0, 0]) == "pretrain" and split_of(pixels, seed, [0] * 6) == ""
    if first == "pretrain":
        assert split_of(pixels, seed, [0.3, 0.2, 0.1, 0.1, 0.1, 0]) == "pretrain"


def test_shares_are_kept_on_many_images():
    found = Counter(split_of(b"%d" % i, 7, [0.0, 0.5, 0.2, 0.05, 0.05, 0.1]) for i in range(4000))
    shares = {"sft": 0.5, "rl": 0.2, "validation": 0.05, "bench": 0.05, "development": 0.1, "": 0.1, "pretrain": 0}
    for split, share in shares.items():
        assert abs(found[split] / 4000 - share) < 0.03, split


def test_the_same_picture_under_other_names_and_encodings_is_in_one_split(here):
    place = here / "data/raw/mine"
    place.mkdir()
    rows = []
    for i in range(40):
        for name, data in {f"a{i}.png": encoded(i), f"z{i}.bmp": encoded(i, "BMP"), f"m{i}.webp": None}.items():
            if data is None:
                out = BytesIO()
                Image.fromarray(picture(i)).save(out, "WEBP", lossless=True)
                data = out.getvalue()
            (place / name).write_bytes(data)
            rows.append({"image": name, "question": f"What is {name}?", "answer": "x", "id": name})
    write_jsonl(place, rows)
    source.run(config_of("source.kind=folder", "source.path=data/raw/mine", "source.shares=[.2,.2,.2,.1,.1,.1]"))
    where = {s.id: split for split in SPLITS for s in read_samples(f"data/samples/{split}")}
    for i in range(40):
        assert len({where.get(name) for name in (f"a{i}.png", f"z{i}.bmp", f"m{i}.webp")}) == 1
    assert set(where.values()) == set(SPLITS)
    assert metrics()["not_sampled"] == 120 - len(where)


def test_shape_is_part_of_the_pixels():
    flat = np.zeros((4, 9, 3), np.uint8)
    assert pixel_hash(flat) != pixel_hash(flat.reshape(9, 4, 3))


def test_a_repeated_id_and_images_of_the_benchmark_are_rejected(here):
    place = here / "data/raw"
    for i in range(4):
        (place / f"{i}.png").write_bytes(encoded(i))
    names = ["0.png", "1.png", "2.png", "3.png"]
    write_jsonl(
        place, [{"image": n, "question": "?", "answer": "x", "id": n if n != "3.png" else "2.png"} for n in names]
    )
    re_encoded = encode_image(picture(1))
    tsv(place / "lmu/MMStar.tsv", [{"index": 0, "image": b64(re_encoded), "question": "看?", "answer": "x"}])
    source.run(
        config_of("source.kind=folder", "source.path=data/raw", "source.bench_path=data/raw/lmu",
                  "source.shares=[0,1,0,0,0,0]", "source.skip_cjk=true")
    )  # fmt: skip
    assert [s.id for s in read_samples("data/samples/bench")] == ["MMStar-0"], "sampling rules do not touch a benchmark"
    assert [s.id for s in read_samples("data/samples/sft")] == ["0.png", "2.png"]
    assert dict(zip(rejects().id, rejects().reason, strict=True)) == {"1.png": "in bench", "2.png": "id"}
    assert metrics()["images"]["bench"] == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["source.kind=folder", "source.path=/somewhere"], "cp -rs /somewhere"),
        (["source.kind=folder", "source.path=data/raw/../x"], "not below data/raw"),
        (["source.kind=folder", "source.path=data/raw/none"], "nothing is there"),
        (["source.kind=folder", "source.path=data/raw"], r"no \*.jsonl file here"),
        (["source.kind=lmudata", "source.path=data/raw"], r"no \*.tsv file here"),
        (["source.kind=llava_onevision", "source.path=data/raw"], r"no \*.parquet or \*.arrow"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused(here, overrides, said):
    with pytest.raises(ClearError, match=said):
        source.run(config_of(*overrides))
    assert not list(here.glob("data/samples/*/*.parquet"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["source.kind=folder"],
        ["source.path=data/raw"],
        ["source.shares=[1,1,0,0,0,0]"],
        ["source.shares=[0,.7,.1,.1,.1]"],  # of before there was a development split
        ["source.shares=[1]"],
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides):
    with pytest.raises(ClearError, match=r"source\.(kind|shares)"):
        config_of(*overrides)


def test_where_nothing_can_be_used_the_rejects_say_why(here):
    write_jsonl(here / "data/raw", [{"image": "gone.png", "question": "?", "answer": "x"}])
    with pytest.raises(ClearError, match=r"data/rejects/source\.parquet says why"):
        source.run(config_of("source.kind=folder", "source.path=data/raw"))
    assert rejects().reason.tolist() == ["no image"]


def test_linked_files_are_read_and_linked_folders_refused(here, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (outside / "a.png").write_bytes(encoded(0))
    write_jsonl(outside, [{"image": "a.png", "question": "?", "answer": "x"}])
    (here / "data/raw/mine").mkdir()
    for file in outside.iterdir():
        (here / "data/raw/mine" / file.name).symlink_to(file)
    settings = ["source.kind=folder", "source.shares=[0,1,0,0,0,0]"]
    source.run(config_of(*settings, "source.path=data/raw/mine"))
    assert metrics()["images"]["sft"] == 1
    (here / "data/raw/link").symlink_to(outside)
    (here / "data/raw/mine/deep").symlink_to(outside)
    for path, link in {
        "data/raw/link": "link",
        "data/raw/link/data.jsonl": "link",
        "data/raw/mine": "mine/deep",
    }.items():
        with pytest.raises(ClearError, match=f"data/raw/{link} is a link to a folder.*cp -rs {outside}"):
            source.run(config_of(*settings, f"source.path={path}"))


PROGRAM = """
import sys
from clear.config import compose, from_dict
from clear.stages import source
source._SHARD = 2**20
sizes = ["source.kind=lmudata", "source.path=data/raw/" + sys.argv[1], "source.shares=[0,0.5,0,0,0,0]"]
source.run(from_dict(compose(["degrade.workers=1", *sizes])))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_whatever_the_size_of_the_input(here):
    """A file ten times as large, with a reference to a picture in every other row, needs hardly more memory."""
    peaks = {}
    for name, count in {"small": 6, "large": 60}.items():
        rows = []
        for i in range(count):
            rows.append(
                {"index": 2 * i, "image": b64(encoded(i, width=560, height=560)), "question": "?", "answer": "x"}
            )
            rows.append({"index": 2 * i + 1, "image": str(2 * (count - 1 - i)), "question": "?", "answer": "x"})
        tsv(here / f"data/raw/{name}/X.tsv", rows)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, name], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks[name] = int(done.stdout) * 1024
    size = (here / "data/raw/large/X.tsv").stat().st_size
    assert size > 50 * 2**20 and peaks["large"] - peaks["small"] < 0.5 * size


# --- data/raw and DVC ------------------------------------------------------------------------------------------------


def test_dvc_notices_changed_data_also_behind_a_link_and_a_scratch_copy_sees_it(project, tmp_path):
    """The stage depends on data/raw, whose content is hashed wherever it lies."""
    from dvc.repo import Repo

    from clear.scratch import refresh

    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert "data/raw" in stages["source"]["deps"]
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.jsonl").write_text("1")
    (project / "data/raw/mine").mkdir(parents=True)
    (project / "data/raw/mine/a.jsonl").symlink_to(outside / "a.jsonl")
    stage = {"cmd": "cat data/raw/mine/a.jsonl > data/seen", "deps": ["data/raw"], "outs": ["data/seen"]}
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"source": stage}}))
    with Repo() as repo:
        repo.reproduce()
        assert repo.status() == {}
    (outside / "a.jsonl").write_text("other")
    with Repo() as repo:
        assert "data/raw" in str(repo.status())
        repo.reproduce()
        assert (project / "data/seen").read_text() == "other" and repo.status() == {}
    refresh(project, tmp_path / "copy")
    assert (tmp_path / "copy/data/raw/mine/a.jsonl").read_text() == "other"
    with Repo(str(tmp_path / "copy")) as repo, contextlib.chdir(tmp_path / "copy"):
        repo.reproduce()
    assert (tmp_path / "copy/data/seen").read_text() == "other"
    refresh(project, tmp_path / "copy")
    assert (outside / "a.jsonl").exists()


def test_real_data_needs_a_pretrained_model(tmp_path, monkeypatch):
    from clear.stages import base

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClearError, match=r"source\.kind = folder needs a pretrained model.*model\.checkpoint"):
        base.run(config_of("source.kind=folder", "source.path=data/raw"))
