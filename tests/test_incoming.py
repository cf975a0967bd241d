"""Naturally degraded images: bad rows are named, slices never share an image, MMD-Bench's figures do not change."""

import hashlib
import json
import os
import unicodedata
from collections import Counter
from dataclasses import replace
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clear.data.images import decode_image, encode_image
from clear.data.records import INCOMING, write_samples
from clear.errors import ClearError
from clear.sources import incoming, intake
from tests.helpers.incoming_sets import SCENES, lines, picture, put


def test_rows_about_one_picture_become_one_sample(tmp_path):
    put(tmp_path / "road", range(4))
    put(tmp_path / "ward", range(4, 6), paired=False)
    came = intake.read(tmp_path)
    samples = list(came.samples(*intake.SLICES))
    assert not came.rejects
    assert [s.corruption for s in samples] == ["road"] * 4 + ["ward"] * 2
    assert {(s.severity, s.intensity, s.seed) for s in samples} == {(INCOMING, 0.0, 0)}
    for n, sample in enumerate(samples):
        degraded, clean, questions = picture(n)
        assert sample.degraded == degraded
        assert sample.image == (clean if n < 4 else degraded)
        assert sample.paired == (n < 4)
        assert [(q.text, q.answer, q.task) for q in sample.questions] == [(q.text, q.answer, q.task) for q in questions]
        assert len({q.id for q in sample.questions}) == len(questions)
    assert came.summary()["road"]["paired"] == 4 and came.summary()["ward"]["paired"] == 0


def test_parquet_holds_pictures_names_or_samples(tmp_path):
    put(tmp_path / "files", range(3))
    degraded, clean, questions = picture(0)
    rows = [
        {"image": {"bytes": picture(n)[0], "path": None}, "clean": {"bytes": picture(n)[1], "path": None}}
        | {"questions": [{"question": q.text, "answer": q.answer, "task": q.task} for q in picture(n)[2]]}
        for n in range(3)
    ]
    (tmp_path / "bytes").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "bytes" / "a.parquet")
    shards = [
        replace(SCENES[n], degraded=picture(n)[0], corruption="dark", severity="high", intensity=0.6) for n in range(3)
    ]
    (tmp_path / "shards").mkdir()
    write_samples(tmp_path / "shards" / "part", shards)
    came = intake.read(tmp_path)
    assert not came.rejects
    found = {}
    for s in came.samples(*intake.SLICES):
        texts = tuple((q.text, q.answer, q.task) for q in s.questions)
        found.setdefault(s.corruption, []).append((s.split, s.image, s.degraded, texts))
    assert len(found["files"]) == 3
    assert found["files"] == found["bytes"] == found["shards"]


BAD = {
    "not json": ("{", "not a JSON object"),
    "a list": ([1], "expected an object"),
    "no picture": ({"question": "is there a ring ?", "answer": "yes"}, "expected a file name or the bytes"),
    "missing file": ({"image": "absent.jpg", "question": "q", "answer": "a"}, "no such file beside rows.jsonl"),
    "outside": ({"image": "../x.jpg", "question": "q", "answer": "a"}, "lies outside"),
    "truncated": ({"image": "cut.jpg", "question": "q", "answer": "yes"}, "not a complete image"),
    "small": ({"image": "small.png", "question": "q", "answer": "yes"}, "at least 32 px"),
    "other size": ({"image": "0.jpg", "clean": "wide.png", "question": "q", "answer": "yes"}, "resize the degraded"),
    "no partner": ({"image": "0.jpg", "clean": "0.jpg", "question": "q", "answer": "yes"}, "the picture itself"),
    "no question": ({"image": "0.jpg"}, "there is no question"),
    "no answer": ({"image": "0.jpg", "question": "q"}, "`answer` is None"),
    "empty answer": ({"image": "0.jpg", "question": "q", "answer": " "}, "`answer` is ' '"),
    "tag": ({"image": "0.jpg", "question": "q", "answer": "</answer> yes"}, "a word of the trace grammar"),
    "option": (
        {"image": "0.jpg", "question": "q", "answer": "blue", "options": ["red", "green"]},
        "none of the options",
    ),
    "one option": ({"image": "0.jpg", "question": "q", "answer": "red", "options": ["red"]}, "two to 10"),
    "other answer": ({"image": "0.jpg", "question": "FIRST", "answer": "zebra"}, "has another answer in rows.jsonl:1"),
    "other partner": ({"image": "0.jpg", "clean": "1_clean.png", "question": "q", "answer": "yes"}, "another clean"),
}

REASONS = {
    **dict.fromkeys(("not json", "a list"), "line"),
    **dict.fromkeys(("no picture", "missing file", "outside"), "no image"),
    "truncated": "image",
    **dict.fromkeys(("small", "other size"), "size"),
    **dict.fromkeys(("no partner", "other partner"), "partner"),
    **dict.fromkeys(("no question", "no answer", "empty answer", "tag", "option", "one option"), "question"),
    "other answer": "answer",
}


@pytest.mark.parametrize(("written", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_in_another_unicode_form_is_the_same_name(tmp_path, written, stored):
    """A Mac's zip has é as e and an accent, the table as one character: both lines would look the same."""
    road, name = tmp_path / "road", "straße/caf\u00e9 \u00c5.jpg"
    put(road, range(2))
    file = road / unicodedata.normalize(stored, name)
    file.parent.mkdir()
    (road / "0.jpg").rename(file)
    row = {"image": unicodedata.normalize(written, name), "question": "is there a ring ?", "answer": "yes"}
    (road / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    came = intake.read(tmp_path)
    assert [sample.degraded for sample in came.samples(*intake.SLICES)] == [picture(0)[0]]
    assert not [reject for reject in came.rejects if "caf" in reject.id], "it is not unused either"


def test_a_row_gets_the_picture_of_its_own_form_and_of_no_other_name(tmp_path):
    road, name = tmp_path / "road", "caf\u00e9.jpg"
    put(road, range(2))
    files = {form: unicodedata.normalize(form, name) for form in ("NFC", "NFD")}
    for n, file in enumerate(files.values()):
        (road / f"{n}.jpg").rename(road / file)
    ask = {"question": "is there a ring ?", "answer": "yes"}
    names = [files["NFD"], files["NFC"], "cafe.jpg", "CAF\u00c9.jpg", "\uff43afe\u0301.jpg"]
    (road / "rows.jsonl").write_text("".join(json.dumps(ask | {"image": name}) + "\n" for name in names))
    rows = list(incoming.rows_of(road))[:5]
    assert [row.image for row in rows[:2]] == [picture(1)[0], picture(0)[0]]
    assert all("no such file beside" in row.reject.detail for row in rows[2:])


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_row_is_named_with_its_reason_and_the_others_are_kept(tmp_path, fault):
    folder = tmp_path / "road"
    put(folder, range(2))
    (folder / "cut.jpg").write_bytes(picture(0)[0][:2000])
    (folder / "small.png").write_bytes(encode_image(np.zeros((31, 64, 3), np.uint8)))
    (folder / "wide.png").write_bytes(encode_image(np.zeros((256, 300, 3), np.uint8)))
    bad, detail, word = *BAD[fault], REASONS[fault]
    if isinstance(bad, dict) and bad.get("question") == "FIRST":
        bad = bad | {"question": picture(0)[2][0].text}
    lines(folder, bad)
    number = sum(len(picture(n)[2]) for n in range(2)) + 1
    came = intake.read(tmp_path)
    (reject,) = (one for one in came.rejects if one.id.startswith("road/rows.jsonl"))
    assert (reject.id, reject.subset, reject.reason) == (f"road/rows.jsonl:{number}", "road", word)
    assert detail in reject.detail
    assert came.count(*intake.SLICES) == 2


def test_a_picture_without_a_row_is_named(tmp_path):
    put(tmp_path / "road", range(1))
    (tmp_path / "road" / "forgotten.png").write_bytes(picture(1)[1])
    (reject,) = intake.read(tmp_path).rejects
    assert (reject.id, reject.subset, reject.reason) == ("road/forgotten.png", "road", "no row")
    assert reject.detail.startswith("no table names this picture")


@pytest.mark.parametrize("others", [["t.csv"], ["0.json", "1.json", "t.csv"]])
def test_a_table_that_is_not_read_is_named_once_where_it_is_missed(tmp_path, others):
    put(tmp_path / "road", range(1))
    for name in others:
        (tmp_path / "road" / name).write_text("image,question,answer\n")
    assert not intake.read(tmp_path).rejects, "every picture has its row: it may be anything"
    (tmp_path / "road/rows.jsonl").rename(tmp_path / "road/rows.txt")
    table, *pictures = intake.read(tmp_path).rejects
    assert (table.id, table.reason) == (f"road/{others[0]}", "file")
    more = f", nor are {len(others) - 1} more like it" if len(others) > 1 else ""
    assert table.detail == f"is not read as a table{more}; write it as .jsonl or .parquet"
    assert [reject.reason for reject in pictures] == ["no row"] * 2
    for picture_file in (tmp_path / "road").glob("0*"):
        picture_file.unlink()
    (tmp_path / "road/t.csv").write_text("image,question,answer\n")
    (alone,) = intake.read(tmp_path).rejects
    assert alone.reason == "file", "also where the pictures are in the table"


def test_a_closed_vocabulary_refuses_other_words_by_name(tmp_path):
    put(tmp_path / "road", range(1))
    lines(tmp_path / "road", {"image": "0.jpg", "question": "is there a zebra ?", "answer": "no"})
    assert intake.read(tmp_path).rejects == ()
    from clear.sources.scenes.words import VOCABULARY

    (reject,) = intake.read(tmp_path, words=VOCABULARY).rejects
    assert reject.id.startswith("road/rows.jsonl") and reject.reason == "words"
    assert "'zebra'" in reject.detail and "model.checkpoint" in reject.detail


@pytest.mark.parametrize(
    ("question", "taken"),
    [("which colour is the ring ? A red B blue", True), ("is the ring red or blue ?", False)],
)
def test_a_closed_vocabulary_takes_options_only_where_the_question_lists_them(tmp_path, question, taken):
    """A list would be appended in words that such a model does not know ("A." and "B.")."""
    from clear.sources.scenes.words import VOCABULARY

    put(tmp_path / "road", range(1))
    row = {"image": "0.jpg", "question": question, "answer": "A", "options": ["red", "blue"]}
    lines(tmp_path / "road", row)
    rejects = intake.read(tmp_path, words=VOCABULARY).rejects
    remedy = [] if taken else [" end the question with them, as in 'A red B blue'"]
    assert [r.detail.split(";")[1] for r in rejects] == remedy


def test_slices_follow_the_pixels_and_never_share_a_picture(tmp_path):
    """The same pictures under other names, encodings, sets and orders go to the same slice."""
    put(tmp_path / "a", range(24))
    first = {s.degraded: s.split for s in intake.read(tmp_path).samples(*intake.SLICES)}
    parts = Counter(first.values())
    assert set(parts) == set(intake.SLICES), parts
    put(tmp_path / "b", reversed(range(24)), paired=False, table="z.jsonl")
    for n in range(24):  # the same pixels in another file
        pixels = decode_image(picture(n)[0])
        (tmp_path / "b" / f"{n}.jpg").write_bytes(encode_image(pixels))
    put(tmp_path / "c", range(24), kind="hsv_saturation")  # other copies of the same clean images
    came = intake.read(tmp_path)
    again = {}
    for sample in came.samples(*intake.SLICES):
        again.setdefault(sample.corruption, []).append(sample.split)
    assert again["a"] == list(first.values())
    assert again["b"] == list(first.values())[::-1]
    assert again["c"] == again["a"]


def test_the_shares_are_those_asked_for(tmp_path):
    digests = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(4000)]
    rows = [incoming.Seen("x", str(n), image=digest) for n, digest in enumerate(digests)]
    parts = Counter(intake._slice([row], set(), 0.2, 0.25) for row in rows)
    assert abs(parts["bench"] / 4000 - 0.2) < 0.02
    assert abs(parts["rl"] / 4000 - 0.8 * 0.25) < 0.02


@pytest.mark.parametrize("split", ["bench", "development", "sft"])
def test_a_picture_of_data_samples_stays_on_its_side(tmp_path, split):
    put(tmp_path / "road", range(12))
    known = {SCENES[n].image_sha256: split for n in range(12)}
    parts = {s.split for s in intake.read(tmp_path, known=known).samples(*intake.SLICES)}
    assert (parts == {"bench"}) == (split != "sft")
    assert ("bench" in parts) == (split != "sft")


def test_a_picture_that_a_source_stores_as_jpeg_is_the_same_picture(tmp_path):
    """A source keeps a WebP as a JPEG; the WebP itself, as clean partner of a set, is still the benchmark's."""
    (tmp_path / "road").mkdir()
    pixels = decode_image(picture(0)[1])
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "WEBP", lossless=True)
    (tmp_path / "road/a.webp").write_bytes(stream.getvalue())
    (tmp_path / "road/b.jpg").write_bytes(encode_image(255 - pixels, "jpeg"))
    row = {"image": "b.jpg", "clean": "a.webp", "question": "what letter is there?", "answer": "a"}
    lines(tmp_path / "road", row)
    known = {incoming.sha256(encode_image(pixels, "jpeg")): "bench"}
    (alone,), (one,) = (intake.read(tmp_path, known=k).samples(*intake.SLICES) for k in ({}, known))
    assert alone.split != "bench" and one.split == "bench"


def test_a_clean_partner_takes_all_its_copies_to_one_side(tmp_path):
    """Only the dark copy is known to the benchmark; the noisy one shows the same scene and must not be trained on."""
    put(tmp_path / "dusk", range(12))
    put(tmp_path / "grain", range(12), kind="gaussian_noise")
    known = {incoming.sha256(picture(n)[0]): "bench" for n in range(12)}
    samples = intake.read(tmp_path, known=known).samples(*intake.SLICES)
    assert Counter((s.corruption, s.split) for s in samples) == {("dusk", "bench"): 12, ("grain", "bench"): 12}


def test_a_chain_of_copies_and_partners_is_one_group(tmp_path):
    """Copy a has partners 1 and 2 (in two sets), copy b has partner 2 alone: all three rows go to one slice."""
    for first, second in zip(range(0, 24, 2), range(1, 24, 2), strict=True):
        folder = tmp_path / str(first)
        put(folder / "one", [first])
        put(folder / "two", [second], kind="gaussian_noise")
        (folder / "three").mkdir()
        shared, partner = (folder / "one" / f"{first}.jpg").read_bytes(), picture(second)[1]
        (folder / "three" / "a.jpg").write_bytes(shared)
        (folder / "three" / "c.png").write_bytes(partner)
        lines(folder / "three", {"image": "a.jpg", "clean": "c.png", "question": "is there a ring ?", "answer": "yes"})
        slices = {s.split for s in intake.read(folder, bench_share=0.5).samples(*intake.SLICES)}
        assert len(slices) == 1


def test_one_picture_of_both_sides_is_refused(tmp_path):
    put(tmp_path / "road", range(1))
    degraded, clean, _ = picture(0)
    known = {incoming.sha256(degraded): "bench", SCENES[0].image_sha256: "sft"}
    came = intake.read(tmp_path, known=known)
    assert came.count(*intake.SLICES) == 0
    assert {reject.reason for reject in came.rejects} == {"in bench"}
    assert all("joins a picture of the training data" in reject.detail for reject in came.rejects)


def test_fingerprints_follow_the_content_alone(tmp_path):
    put(tmp_path / "a", range(2))
    put(tmp_path / "b", range(2))
    (tmp_path / "b" / ".DS_Store").write_text("x")
    for file in (tmp_path / "b").iterdir():
        os.utime(file, (1, 1))
    one, two = incoming.sets(tmp_path)
    assert one.fingerprint == two.fingerprint and one.files == two.files == 5
    (tmp_path / "b" / "0.jpg").write_bytes(b"other")
    assert incoming.sets(tmp_path)[1].fingerprint != one.fingerprint
    (tmp_path / "b" / "0.jpg").rename(tmp_path / "b" / "9.jpg")
    assert incoming.sets(tmp_path)[1].fingerprint != two.fingerprint


@pytest.mark.parametrize("make", [lambda path: path.touch(), lambda path: path.symlink_to("nowhere")])
def test_what_is_no_folder_is_no_folder_without_sets(tmp_path, make):
    make(tmp_path / "incoming")
    for read in (incoming.sets, intake.read):
        with pytest.raises(ClearError, match=r"incoming is not a folder; move it away"):
            read(tmp_path / "incoming")


def test_sets_that_cannot_be_read_are_refused(tmp_path):
    assert incoming.sets(tmp_path / "absent") == []
    put(tmp_path / "road", range(1))
    (tmp_path / "far.dvc").write_text("outs: []")
    assert [(one.name, one.present) for one in incoming.sets(tmp_path)] == [("far", False), ("road", True)]
    with pytest.raises(ClearError, match=r"far is not here; run `dvc pull"):
        intake.read(tmp_path)
    assert intake.read(tmp_path, "road").count(*intake.SLICES) == 1
    with pytest.raises(ClearError, match="not an incoming set; there are: far, road"):
        intake.read(tmp_path, "near")
    (tmp_path / "far.dvc").unlink()
    (tmp_path / "road" / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(ClearError, match=r"b\.parquet: not a readable Parquet file"):
        intake.read(tmp_path)
    (tmp_path / "road" / "b.parquet").unlink()
    (tmp_path / "Bad Name").mkdir()
    with pytest.raises(ClearError, match="Bad Name: no name for a set"):
        intake.read(tmp_path)
    assert ["no name for a set" in "".join(one.faults) for one in incoming.sets(tmp_path)] == [True, False]
    assert intake.read(tmp_path, "road").count(*intake.SLICES) == 1
