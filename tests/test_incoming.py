"""Naturally degraded images: bad rows are named, slices never share an image, MMD-Bench's figures do not change."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from typer.testing import CliRunner

from clear import config as configuration
from clear.bench import predictions
from clear.cli import app
from clear.data.images import decode_image, encode_image
from clear.data.records import INCOMING, read_samples, write_samples
from clear.data.rejects import read_rejects
from clear.errors import ClearError
from clear.project.check import drifts
from clear.project.scratch import run
from clear.report import tables
from clear.sources import incoming, intake
from clear.sources.scenes.render import scenes
from clear.stages import degrade, mmd_bench, validate
from clear.stages.report import read_beyond
from clear.validation.incoming import check
from clear.validation.incoming import lines as words
from tests.conftest import ROOT, git
from tests.helpers.incoming_sets import SCENES, picture, put


def lines(folder: Path, *rows, table: str = "rows.jsonl") -> None:
    with (folder / table).open("a") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


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


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A small workspace before degrade, with its configuration."""
    folder = tmp_path_factory.mktemp("workspace")
    plain = configuration.compose(["profile=smoke", "degrade.workers=1"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        OmegaConf.save(OmegaConf.create(plain), "params.yaml")
        for split, count in {
            "pretrain": 16,
            "sft": 32,
            "rl": 16,
            "validation": 16,
            "bench": 16,
            "development": 16,
        }.items():
            write_samples(f"data/samples/{split}", scenes(split, count, 5, 256, 4))
    return folder, configuration.from_dict(plain)


@pytest.fixture
def inside(workspace, tmp_path, monkeypatch):
    """Working directory with the samples of `workspace` and data of its own."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "samples").symlink_to(workspace[0] / "data" / "samples")
    (tmp_path / "params.yaml").write_bytes((workspace[0] / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    return workspace[1]


def digests(*folders: str) -> dict[str, str]:
    files = sorted(file for folder in folders for file in Path(folder).glob("*.parquet"))
    return {file.as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_stages_take_a_set_in_and_leave_the_rest_alone(inside):
    degrade.run(inside)
    mmd_bench.run(inside)
    sixteen = "data/bench/clean", "data/bench/degraded", "data/degraded/validation"
    before = digests(*sixteen)
    plain = {split: list(read_samples(f"data/degraded/{split}")) for split in ("sft", "rl")}
    assert list(read_samples("data/bench/incoming")) == []
    assert len(pd.read_parquet(degrade.REJECTS)) == 0
    assert "incoming" not in json.loads(degrade.METRICS.read_text())

    put(Path("data/incoming/road"), range(12))
    put(Path("data/incoming/ward"), range(12, 24), paired=False)
    lines(Path("data/incoming/ward"), {"image": "12.jpg"}, "no json")
    degrade.run(inside)
    mmd_bench.run(inside)
    assert digests(*sixteen) == before
    for split, samples in plain.items():
        found = list(read_samples(f"data/degraded/{split}"))
        assert found[: len(samples)] == samples
        assert {s.severity for s in found[len(samples) :]} == {INCOMING}
        assert {s.split for s in found[len(samples) :]} == {split}
    told = json.loads(degrade.METRICS.read_text())["incoming"]["sets"]
    bench = Counter(s.corruption for s in read_samples("data/bench/incoming"))
    assert Counter({name: row["bench"] for name, row in told.items()}) == bench
    assert json.loads(mmd_bench.METRICS.read_text())["incoming"]["road"]["images"] == bench["road"] > 0
    assert all(sum(row[part] for part in intake.SLICES) == 12 for row in told.values())
    assert told["road"]["fingerprint"] == incoming.sets()[0].fingerprint
    refused = [(one.subset, one.reason) for one in read_rejects(degrade.REJECTS)]
    assert refused == [("ward", "question"), ("ward", "line")]

    validate.run(inside)
    found = json.loads(validate.METRICS.read_text())
    assert found["success"]
    assert found["datasets"]["incoming_road"]["images"] == found["datasets"]["incoming_ward"]["images"] == 12
    assert found["datasets"]["degraded_sft"]["images"] == 32


def test_the_name_of_a_corruption_is_refused(inside):
    put(Path("data/incoming/jpeg"), range(1))
    with pytest.raises(ClearError, match="'jpeg' is the name of a corruption; rename"):
        degrade.run(inside)


@pytest.mark.slow
def test_check_gives_a_verdict_and_a_report(inside):
    put(Path("data/incoming/road"), range(10))
    lines(Path("data/incoming/road"), {"image": "absent.jpg", "question": "q", "answer": "a"})
    command = [sys.executable, "-m", "clear", "incoming"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "check", "road", "--json"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["success"], said["accepted"], said["rejected"], said["paired"]) == (True, 10, 1, 10)
    assert sum(said["slices"].values()) == 10
    report = Path(said["report"])
    assert json.loads(report.read_text())["fingerprint"] == said["fingerprint"]
    assert len(pd.read_parquet(report.with_name("metrics.parquet"))) == 10
    (reject,) = read_rejects(report.with_name("rejects.parquet"))
    assert (reject.subset, reject.reason) == ("road", "no image") and said["rejects"] == [asdict(reject)]
    assert incoming.sets()[0].fingerprint == said["fingerprint"]
    for n in range(10):  # every clean partner shows another scene
        Path(f"data/incoming/road/{n}_clean.png").write_bytes(encode_image(255 - decode_image(SCENES[n].image)))
    verdict = check("road", inside)
    assert not verdict.success and [failed["expectation"] for failed in verdict.failed] == ["partner"]
    assert "road: NOT good" in "\n".join(words(verdict)) and "fails 'partner'" in "\n".join(words(verdict))


def test_the_commands_list_and_refuse(inside):
    runner = CliRunner()
    assert "no set in data/incoming" in runner.invoke(app, ["incoming", "list"]).stdout
    put(Path("data/incoming/road"), range(1))
    (listed,) = json.loads(runner.invoke(app, ["incoming", "list", "--json"]).stdout)["sets"]
    assert (listed["name"], listed["files"], listed["present"]) == ("road", 3, True)
    assert "road: 3 files" in runner.invoke(app, ["incoming", "list"]).stdout
    assert isinstance(runner.invoke(app, ["incoming", "check", "far"]).exception, ClearError)
    Path("data/incoming/other").mkdir()
    Path("data/incoming/other", os.fsdecode(b"caf\xe9.txt")).touch()
    said = runner.invoke(app, ["incoming", "list"]).stdout
    assert "road: 3 files" in said and r"cannot be read: other/caf\xe9.txt: its name is not UTF-8" in said
    assert json.loads(runner.invoke(app, ["incoming", "list", "--json"]).stdout)["sets"][1]["faults"] == []


def test_a_set_without_a_usable_row_is_not_good(inside):
    Path("data/incoming/road").mkdir(parents=True)
    lines(Path("data/incoming/road"), "nothing")
    verdict = check("road", inside)
    assert not verdict.success and verdict.accepted == 0 and verdict.rejected == 1


def test_a_leak_between_the_slices_is_caught_by_name(inside):
    put(Path("data/incoming/road"), range(24))
    degrade.run(inside)
    mmd_bench.run(inside)
    taught = next(s for s in read_samples("data/degraded/sft") if s.severity == INCOMING)
    came = list(read_samples("data/bench/incoming"))
    moved = replace(taught, id="moved", split="bench", degraded=encode_image(decode_image(taught.degraded)))
    write_samples("data/bench/incoming", [*came, moved])
    with pytest.raises(ClearError, match="incoming_road fails 'shared_images'"):
        validate.run(inside)


def test_predictions_keep_incoming_rows_apart(tmp_path):
    def row(sample, corruption, severity, correct):
        base = dict.fromkeys(predictions.SCHEMA.names, "") | dict.fromkeys(predictions.NULLABLE)
        labels = {"sample": sample, "corruption": corruption, "severity": severity, "question": f"{sample}-q"}
        said = {"prediction": "yes", "restored": False, "correct": correct, "tokens": 1}
        return base | labels | said

    rows = [row("a", "clean", "clean", True), row("b", "clean", "clean", False)]
    file = tmp_path / "predictions" / "base.parquet"
    predictions.write(file, rows)
    plain = predictions.read(file)
    came = [row("c", "road", INCOMING, True), row("d", "road", INCOMING, True)]
    predictions.write(file, [*rows, *came, row("a", "+rain", "low", True), row("a", "+rain", "high", False)])
    pd.testing.assert_frame_equal(predictions.read(file), plain)
    assert predictions.incoming_metrics(predictions.read_incoming(file)) == {
        "road": {"accuracy": 1.0, "call_rate": 0.0, "images": 2, "questions": 2, "no_answer": 0}
    }
    further = predictions.extra_metrics(predictions.read_extra(file))["rain"]
    assert [further[level]["accuracy"] for level in ("low", "high")] == [1.0, 0.0]
    table = tables.beyond(read_beyond(tmp_path, ["base"]))
    assert table.rows == [
        ["road", "2", "100.0"],
        ["rain, low", "1", "100.0"],
        ["rain, hard", "1", "0.0"],
    ]


DVC_STAGES = """
stages:
  degrade:
    cmd: mkdir -p data/metrics && find data/incoming -type f | sort | grep -v gitignore > data/metrics/degrade.json
    params: [seed]
    deps: [data/incoming]
    metrics:
      - data/metrics/degrade.json: {cache: false}
"""


def test_a_set_that_dvc_tracks_is_a_dependency_here_in_a_scratch_copy_and_in_a_clone(project, tmp_path):
    dvc = [sys.executable, "-m", "dvc"]
    (project / "dvc.yaml").write_text(DVC_STAGES)
    (project / "dvc.lock").unlink()
    put(project / "data/incoming/road", range(1))
    (project / "data/incoming/README.md").write_text("kept by git")
    subprocess.run([*dvc, "add", "-q", "data/incoming/road"], cwd=project, check=True)
    subprocess.run([*dvc, "repro", "-q"], cwd=project, check=True)
    listed = (project / "data/metrics/degrade.json").read_text()
    assert "data/incoming/road/0.jpg" in listed
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "a set")
    assert drifts(project) == []

    copy = run(Path(), "smoke")
    assert (copy / "data/metrics/degrade.json").read_text() == listed

    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(project), str(clone))
    assert not (clone / "data/incoming/road").exists()
    assert drifts(clone) == []
    assert [(one.name, one.present) for one in incoming.sets(clone / "data/incoming")] == [("road", False)]

    (project / "data/incoming/road/0.jpg").write_bytes(picture(1)[0])
    assert "data/incoming" in "".join(drifts(project))
