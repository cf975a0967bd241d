"""Naturally degraded images on their way through the stages, the commands, the predictions and DVC."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
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
from tests.helpers.incoming_sets import SCENES, lines, picture, put


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A small workspace before degrade, with its configuration."""
    folder = tmp_path_factory.mktemp("workspace")
    plain = configuration.compose(["profile=smoke", "degrade.workers=1", "incoming.limits.bench=1"])
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
    none = runner.invoke(app, ["incoming", "check", ""]).exception  # an unset variable, not all sets
    assert isinstance(none, ClearError) and str(none) == "'' is not an incoming set; there are: road."
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


@pytest.mark.slow
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
