"""`clear compare` and `clear gate`: verdicts on real revisions, honest statistics, and the workflows that use them."""

import json
import re
from pathlib import Path

import pytest
import yaml

from clear.bench.models import MODELS
from clear.data.io import write_json
from clear.errors import ClearError
from clear.project.compare import render
from clear.project.compare import verdict as verdicts
from clear.project.compare.differences import compare
from clear.project.compare.load import merge_base, read_sides, resolve
from clear.report.claims import Bootstrap
from tests.conftest import ROOT, git
from tests.revisions import GATE, LEVELS, RIGHT, commit, fill


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """main with branches `better`, `noise` and `worse`; main itself has become much worse since they parted."""
    folder = tmp_path_factory.mktemp("repository")
    git(folder, "init", "-q", "-b", "main")
    fill(folder)
    commit(folder, "start")
    for name, change in {
        "better": {"right": RIGHT | {"high": 0.85}, "grpo": "2"},
        "noise": {"seed": 5},
        "worse": {"right": RIGHT | {"high": 0.5}, "gate": GATE | {"hard_margin": 1.0}},
        "smoke": {"profile": "smoke"},
        "missing": {"models": ("base", "bridge")},
    }.items():
        git(folder, "checkout", "-q", "-b", name, "main")
        fill(folder, **change)
        commit(folder, name)
    git(folder, "checkout", "-q", "main")
    fill(folder, right=dict.fromkeys(LEVELS, 0.2))
    commit(folder, "main goes on")
    return folder


@pytest.fixture
def clear(clear, repository, monkeypatch):
    """Run `clear …` in the repository; gives (exit status, stdout, stderr)."""
    monkeypatch.chdir(repository)
    return clear


@pytest.mark.parametrize(
    ("branch", "verdict", "status"),
    [
        ("better", "better", 0),
        ("noise", "not distinguishable", 0),
        ("worse", "worse", 1),
        ("smoke", "not comparable", 2),
        ("missing", "not comparable", 2),
    ],
)
def test_verdict_and_gate_of_real_branches(clear, branch, verdict, status):
    code, text, _ = clear("compare", "main", branch)
    assert code == 0
    assert text.startswith(f"**{verdict}** – ")
    assert text.endswith(f"{render.MARKER}\n")
    code, told, _ = clear("gate", "main", branch)
    assert code == status
    assert {0: "gate passed", 1: "gate FAILED", 2: "gate cannot decide"}[status] in told
    assert f": {verdict} – " in told


def test_the_first_line_gives_model_level_and_interval(clear):
    first = clear("compare", "main", "worse")[1].splitlines()[0]
    assert re.match(
        r"\*\*worse\*\* – CLEAR at hard: [\d.]+ → [\d.]+ %, -[\d.]+ points \[-[\d.]+, -[\d.]+\]; on clean images: ",
        first,
    )
    assert "95 % intervals; 240 questions about 60 image groups at hard" in first


def test_a_branch_is_compared_with_what_it_started_from(clear, repository):
    # The tip of main answers a fifth of the questions; against it every branch would be better.
    text = clear("compare", "main", "noise")[1]
    start = git(repository, "rev-parse", "main~1").strip()
    assert f"Base: commit {start[:10]}, the merge base of main and noise" in text
    assert f"main itself is at {git(repository, 'rev-parse', 'main')[:10]}" in text
    assert clear("compare", "noise", "main")[1].startswith("**worse**")


def test_a_loosened_gate_does_not_count_for_the_change_that_loosens_it(clear):
    code, told, _ = clear("gate", "main", "worse")
    assert code == 1
    assert "alters the gate itself" in told
    assert re.search(r"^FAIL  hard accuracy of CLEAR: may not fall; .*: broken with confidence$", told, re.MULTILINE)


def test_what_cannot_be_compared_is_said_in_the_first_line_and_not_averaged(clear):
    smoke = clear("compare", "main", "smoke")[1]
    assert "the profiles differ: base has tiny, head has smoke" in smoke.splitlines()[0]
    assert "### Accuracy" not in smoke
    missing = clear("compare", "main", "missing")[1]
    assert (
        "head has no predictions of “direct fine-tuning”, “SFT, restoring”, “SFT + bridge, re-encoded”, “CLEAR”"
        in missing.splitlines()[0]
    )
    (table,) = re.findall(r"### Accuracy\n\n(.*?)\n\n", missing, re.DOTALL)
    assert [line.split(" |")[0] for line in table.splitlines()[2:]] == ["| base model", "| SFT + bridge"]


def test_reasons_for_failing_are_given_for_every_rule(tmp_path):
    fill(tmp_path / "base")
    head = fill(tmp_path / "head")
    failed = {"bench_clean": {"failed": [{"expectation": "no twins", "count": 2, "ids": []}]}}
    write_json(head / "data/metrics/validate.json", {"success": False, "rejected": 2, "datasets": failed})
    _, found = verdicts.decide(*read_sides(tmp_path, "base", "head"), detail=False)
    assert (found.kind, found.status) == ("not distinguishable", 1)
    assert {rule.name: rule.kept for rule in found.rules} == {
        "same profile": True,
        "predictions present": True,
        "validation passed": False,
        "clean accuracy of CLEAR": True,
        "hard accuracy of CLEAR": True,
    }
    assert "FAIL  validation passed: bench_clean: no twins" in verdicts.report_lines(found)
    (head / "data/metrics/validate.json").unlink()
    _, found = verdicts.decide(*read_sides(tmp_path, "base", "head"), detail=False)
    assert found.status == 1 and "no data/metrics/validate.json" in found.rules[2].reason


def test_all_formats_are_written_and_the_page_needs_nothing_else(clear, tmp_path):
    code, told, _ = clear("compare", "main", "better", "--out", tmp_path, "--format", "all")
    assert code == 0
    assert told.split() == [str(tmp_path / f"compare.{kind}") for kind in ("md", "html", "json")]
    page = (tmp_path / "compare.html").read_text()
    assert page.count("data:image/png;base64,") >= 2
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "data/bench of these sides is not on this machine" in page
    found = json.loads((tmp_path / "compare.json").read_text())
    assert (found["verdict"], found["gate"]["status"]) == ("better", 0)
    assert found["params"] == {"grpo.lr": [1.0, 2.0]}
    assert len(found["accuracy"]) == len(found["call_rate"]) == len(MODELS) * 4
    assert len(found["tasks"]) == len(MODELS) * 8 and len(found["corruptions"]) == len(MODELS) * 12
    hard = next(d for d in found["accuracy"] if (d["model"], d["severity"]) == ("grpo", "high"))
    assert hard["certain"] == 1 and hard["low"] > 0 and hard["p"] <= hard["holm"] < 0.05
    text = (tmp_path / "compare.md").read_text()
    assert re.search(r"\| grpo \| clear/training/rl/grpo\.py \| grpo\.lr \| data/models/grpo \|", text)
    assert re.search(r"\| evaluate@grpo \| its data \| – \| none \|", text)


def test_wrong_names_and_formats_are_one_line(clear, tmp_path):
    code, _, told = clear("compare", "main", "nonsense")
    assert code == 2 and "'nonsense' is neither a git revision here nor a folder" in told
    code, _, told = clear("compare", "main", "better", "--format", "pdf")
    assert code == 1 and "md, html, json or all" in told
    with pytest.raises(ClearError, match="neither a git revision"):
        resolve(ROOT, "--help")


def test_a_shallow_clone_says_what_it_needs(repository, tmp_path):
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--depth", "1", "--no-single-branch", f"file://{repository}", str(clone))
    ids = [git(clone, "rev-parse", f"origin/{name}").strip() for name in ("main", "worse")]
    with pytest.raises(ClearError, match="fetch-depth: 0"):
        merge_base(clone, *ids)


@pytest.mark.parametrize("command", ["gate", "compare"])
def test_what_cannot_be_decided_has_a_status_of_its_own(clear, repository, tmp_path, monkeypatch, command):
    """Status 1 means "worse"; a mistyped branch, or one that a shallow clone lacks, is not that."""
    code, stdout, told = clear(command, "no-such-branch")
    assert (code, stdout) == (2, "") and "'no-such-branch' is neither a git revision" in told
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repository}", str(clone))
    monkeypatch.chdir(clone)
    for base in ("better", "HEAD~1"):
        code, stdout, told = clear(command, base)
        assert (code, stdout) == (2, "") and "this clone is shallow" in told and "git fetch --unshallow" in told
    fill(tmp_path / "damaged")
    (tmp_path / "damaged/data/predictions/grpo.parquet").write_bytes(b"no table")
    code, stdout, told = clear(command, "HEAD", str(tmp_path / "damaged"))
    assert (code, stdout) == (2, "") and told.startswith("error: ") and "grpo.parquet" in told


def test_a_revision_beside_a_folder_is_taken_as_it_is_named(repository, monkeypatch):
    monkeypatch.chdir(repository)
    base, head = read_sides(Path(), "main~1", ".")
    assert base.origin.startswith("commit ") and "merge base" not in base.origin
    assert head.origin == "folder ." and head.commit == ""
    assert compare(base, head, "grpo", Bootstrap(resamples=50), detail=False).level("grpo", "high").estimate < -0.2


def test_run_records_belong_to_a_revision_only_if_its_stage_is_locked_alike(repository, monkeypatch, tmp_path):
    monkeypatch.chdir(repository)
    monkeypatch.setenv("CLEAR_HOME", str(tmp_path))
    for stage in ("evaluate_grpo", "grpo", "mmd_bench"):
        write_json(tmp_path / f"runs/tiny/{stage}.json", {"seconds": 9.0})
    base, head = read_sides(Path(), "main", "better")
    assert set(base.records) == {"evaluate_grpo", "grpo", "mmd_bench"}
    assert set(head.records) == {"mmd_bench"}


def test_the_committed_predictions_against_themselves_differ_by_nothing(monkeypatch):
    monkeypatch.chdir(ROOT)
    base, head = read_sides(Path(), "HEAD", "HEAD")
    assert base.commit == head.commit and set(base.frames) == set(MODELS)
    policy, notes = verdicts.policy_of(base, head)
    found = compare(base, head, policy.model, Bootstrap(policy.confidence, 60))
    every = [*found.levels, *found.tasks, *found.corruptions, *found.calls]
    assert len(every) == 6 * (4 + 24 + 48 + 4)
    assert {(one.estimate, one.low, one.high, one.p, one.holm) for one in every} == {(0, 0, 0, 1, 1)}
    assert {(one.estimate, one.low, one.high) for one in found.relative.values()} == {(0, 0, 0)}
    verdict = verdicts.judge(found, policy, notes)
    assert (verdict.kind, verdict.status) == ("not distinguishable", 0)
    assert "both sides gave every question the same output" in verdict.sentence
    text = render.markdown(found, verdict)
    assert 5_000 < len(text.encode()) <= render.LIMIT
    assert "Left out here" not in text


def test_a_comment_that_would_be_too_long_names_what_it_leaves_out(clear, tmp_path):
    sides = read_sides(Path(), "main", "better")
    found, verdict = verdicts.decide(*sides)
    text = render.markdown(found, verdict, limit=6_000)
    assert len(text.encode()) <= 6_000
    assert text.startswith("**better**") and text.endswith(f"{render.MARKER}\n")
    left_out = re.search(r"Left out here for length: (.*)\.", text)[1].split(", ")
    assert left_out and all(f"<summary>{title}</summary>" not in text for title in left_out)
    assert "### The gate" in text


def test_the_commands_of_the_workflow_exist(clear, tmp_path):
    (job,) = yaml.safe_load((ROOT / ".github/workflows/report.yml").read_text())["jobs"].values()
    lines = "\n".join(step["run"] for step in job["steps"] if "run" in step).splitlines()
    commands = [line.partition("-m clear ")[2] for line in lines if "-m clear " in line]
    assert [command.split()[0] for command in commands] == ["compare", "gate"]
    for command in commands:
        arguments = command.replace('"$BASE"', "main").replace('"$HEAD"', "better").split()
        assert clear(*(str(tmp_path / "report") if part == "report" else part for part in arguments))[0] == 0
    assert (tmp_path / "report/compare.md").exists()


def test_every_key_of_the_gate_is_explained():
    text = (ROOT / "docs/REVIEW.md").read_text()
    for key in GATE:
        assert f"`{key}`" in text or f"`gate.{key}`" in text, key
