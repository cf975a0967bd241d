"""`clear compare` and `clear gate`: verdicts on real revisions, honest statistics, and the workflows that use them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from clear.bench import predictions
from clear.bench.models import MODELS
from clear.data.images import encode_image
from clear.data.io import write_json
from clear.data.records import Question, Sample, sha256, write_samples
from clear.errors import ClearError
from clear.project.compare import changes, render
from clear.project.compare import verdict as verdicts
from clear.project.compare.differences import compare, join
from clear.project.compare.load import merge_base, read_sides, resolve
from clear.report.claims import Bootstrap
from tests.conftest import ROOT, git
from tests.revisions import CORRUPTIONS, GATE, IMAGES, LEVELS, RIGHT, commit, fill, lock_of, rows_of


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


def test_predictions_under_dvc_are_fetched_or_said_to_be_missing(project):
    from dvc.repo import Repo

    source = fill(project / "made", models=("grpo",), images=8) / "data/predictions/grpo.parquet"
    source.rename(project / "grpo.bin")
    stages = yaml.safe_load((project / "dvc.yaml").read_text())
    copy = "mkdir -p data/predictions && cp grpo.bin data/predictions/grpo.parquet"
    stages["stages"]["copy"] = {"cmd": copy, "deps": ["grpo.bin"], "outs": ["data/predictions/grpo.parquet"]}
    (project / "dvc.yaml").write_text(yaml.safe_dump(stages))
    with Repo() as repo:
        repo.reproduce(targets=["copy"])
    with (project / ".gitignore").open("a") as file:
        file.write("/data/predictions/\n/made/\n")
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "under DVC")
    assert "grpo.parquet" not in git(project, "ls-files")
    (project / "data/predictions/grpo.parquet").unlink()
    base, _ = read_sides(Path(), "HEAD", "HEAD")
    assert len(base.frames["grpo"]) == 8 * 8
    assert base.missing["bridge"] == "neither in git nor in dvc.lock"
    for file in (project / ".dvc/cache").rglob("*"):
        if file.is_file():
            file.chmod(0o600)
            file.unlink()
    base, _ = read_sides(Path(), "HEAD", "HEAD")
    assert "grpo" not in base.frames and "dvc pull" in base.missing["grpo"]


def test_a_damaged_file_is_named_by_its_revision(tmp_path):
    git(tmp_path, "init", "-q", "-b", "main")
    fill(tmp_path, models=("grpo",), images=4)
    (tmp_path / "data/predictions/grpo.parquet").write_text("nonsense")
    commit(tmp_path, "damaged")
    name = git(tmp_path, "rev-parse", "HEAD")[:10]
    with pytest.raises(ClearError, match=f"{name}/data/predictions/grpo.parquet: not a readable Parquet file"):
        read_sides(tmp_path, "HEAD", "HEAD")


def test_a_changed_benchmark_restricts_the_comparison_and_says_so(tmp_path):
    fill(tmp_path / "base")
    head = fill(tmp_path / "head")
    rows = [row for row in rows_of() if row["sample"] < "bench-0110"]
    for row in rows:
        if row["sample"] < "bench-0010" and row["psnr_degraded"] is not None:
            row["psnr_degraded"] += 0.5  # the id is the same, the picture is not
        if "bench-0010" <= row["sample"] < "bench-0015" and row["question"] == "q1":
            row["answer"] = "blue"
    for model in MODELS:
        predictions.write(head / f"data/predictions/{model}.parquet", rows)
    (head / "dvc.lock").write_text(yaml.safe_dump(lock_of(bench="b")))
    found, verdict = verdicts.decide(*read_sides(tmp_path, "base", "head"))
    kept = set(found.joined["grpo"].rows["sample"])
    assert kept == {f"bench-{image:04d}" for image in range(15, 110)}
    first = render.markdown(found, verdict).splitlines()
    assert first[0].startswith("**not distinguishable**")
    assert "The benchmark changed (dvc.lock: data/bench/clean, data/bench/degraded)" in first[2]
    assert "760 of 960 (base) and 880 (head), about 95 images" in first[2]
    assert all(d.estimate == 0 for d in found.levels)


def test_another_seed_reuses_ids_and_shares_nothing(tmp_path):
    fill(tmp_path / "base", images=20)
    fill(tmp_path / "head", images=20, damage=1.0)
    (tmp_path / "head/dvc.lock").write_text(yaml.safe_dump(lock_of(bench="b")))
    found, verdict = verdicts.decide(*read_sides(tmp_path, "base", "head"), detail=False)
    assert verdict.status == 2 and "share no benchmark images" in verdict.sentence
    assert found.joined == {}
    write_json(tmp_path / "head/data/metrics/evaluate_grpo.json", {"accuracy": {"clean": 0.9, "high": 0.655}})
    text = render.markdown(*verdicts.decide(*read_sides(tmp_path, "base", "head")))
    assert "| CLEAR | head | 90.0 | – | – | 65.5 |" in text and "says nothing about the models" in text
    # The same hash on both sides is proof enough, whatever another machine measured.
    (tmp_path / "head/dvc.lock").write_text(yaml.safe_dump(lock_of()))
    found, verdict = verdicts.decide(*read_sides(tmp_path, "base", "head"), detail=False)
    assert verdict.status == 0 and not found.joined["grpo"].restricted


def test_without_a_lock_pictures_are_matched_by_what_was_measured(tmp_path):
    for name in ("base", "head"):
        (fill(tmp_path / name, images=20) / "dvc.lock").unlink()
    found, verdict = verdicts.decide(*read_sides(tmp_path, "base", "head"), detail=False)
    assert verdict.status == 0
    assert "dvc.lock does not say on both sides" in found.notes[0]


def bench_of(folder: Path, images: int) -> None:
    def samples():
        for image in range(images):
            clean = encode_image(np.full((60, 60, 3), 40 + image, np.uint8))
            for severity in LEVELS[1:]:
                yield Sample(
                    id=f"bench-{image:04d}",
                    source="scenes",
                    split="bench",
                    image=clean,
                    image_sha256=sha256(clean),
                    questions=(Question("q0", "reading", "?", "red"),),
                    degraded=clean,
                    corruption=CORRUPTIONS[image // 2 % len(CORRUPTIONS)],
                    severity=severity,
                )

    write_samples(folder / "data/bench/degraded", samples())


def test_changed_answers_are_shown_with_pictures_and_both_traces(tmp_path):
    fill(tmp_path / "base", models=("grpo",), gate=GATE | {"pictures": 3})
    fill(tmp_path / "head", models=("grpo",), right=RIGHT | {"high": 0.4})
    bench_of(tmp_path / "head", IMAGES)
    records = {"milliseconds_per_question": 3.25, "seconds": 41.0}
    write_json(tmp_path / "head/.clear/runs/tiny/evaluate_grpo.json", records)
    found, verdict = verdicts.decide(*read_sides(tmp_path, "base", "head"))
    rows = found.joined["grpo"].rows
    lost = int((rows.correct_base & ~rows.correct_head).sum())
    page = render.html(found, verdict)
    assert f"0 became right, {lost} became wrong, 0 stayed wrong" in page
    assert page.count("data:image/png;base64,") == 2 + 3
    for text in ("CLEAR, base: “red”, right", "CLEAR, head: “blue”, wrong", "&lt;answer&gt;blue&lt;/answer&gt;"):
        assert text in page
    text = render.markdown(found, verdict)
    assert "| CLEAR | not recorded | 3.25 | 12.00 | 12.00 |" in text
    assert "| evaluate_grpo | not recorded | 41.0 |" in text
    assert "<think>look | at it</think><answer>blue</answer>" in text, "traces are quoted as they are"


def test_run_records_belong_to_a_revision_only_if_its_stage_is_locked_alike(repository, monkeypatch, tmp_path):
    monkeypatch.chdir(repository)
    monkeypatch.setenv("CLEAR_HOME", str(tmp_path))
    for stage in ("evaluate_grpo", "grpo", "mmd_bench"):
        write_json(tmp_path / f"runs/tiny/{stage}.json", {"seconds": 9.0})
    base, head = read_sides(Path(), "main", "better")
    assert set(base.records) == {"evaluate_grpo", "grpo", "mmd_bench"}
    assert set(head.records) == {"mmd_bench"}


def test_a_reward_that_rises_alone_is_pointed_out(tmp_path):
    base, head = fill(tmp_path / "base", images=8), fill(tmp_path / "head", images=8)
    write_json(head / "data/metrics/grpo.json", {"last_reward": 0.9, "holdout_after": 0.65})
    table, warning = changes.rewards(*read_sides(tmp_path, base.name, head.name))
    assert "rose by 0.100 while accuracy on held-out images fell by 5.0 points" in warning
    assert ["reward at the last step", "0.8", "0.9", "+0.1"] in table.rows


def test_data_changes_are_counted(tmp_path):
    base, head = fill(tmp_path / "base", images=8), fill(tmp_path / "head", images=8)
    more = {"sft": {name: {"low": 2, "mid": 3, "high": 5 + (name == "jpeg")} for name in CORRUPTIONS}}
    write_json(head / "data/metrics/degrade.json", {"images": more})
    sides = read_sides(tmp_path, base.name, head.name)
    rows = {row[0]: row[1:] for row in changes.samples(*sides).rows}
    assert rows["jpeg"] == ["2", "3", "6 (+1)", "11 (+1)"]
    assert rows["dark"] == ["2", "3", "5", "10"]
    assert rows["all"] == ["8", "12", "21 (+1)", "41 (+1)"]
    write_json(head / "data/metrics/traces.json", {"traces": 90})
    assert changes.data_figures(*read_sides(tmp_path, base.name, head.name)).rows == [
        ["traces: traces", "absent", "90"]
    ]


nested = st.recursive(
    st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
    max_leaves=8,
)
trees = st.dictionaries(st.text("abc", min_size=1, max_size=2), nested, max_size=4)


@given(trees, trees)
@settings(max_examples=60, deadline=None)
def test_differing_leaves_are_symmetric_and_absent_between_equals(a, b):
    there, back = changes.differing(a, b), changes.differing(b, a)
    assert {(key, new, old) for key, old, new in map(_texts, there)} == set(map(_texts, back))
    assert changes.differing(a, a) == []
    assert bool(there) == (dict(changes.leaves(a)) != dict(changes.leaves(b)))


def _texts(item):
    return tuple(map(repr, item))


def test_a_difference_is_the_mean_of_the_shared_rows_and_changes_sign_with_the_sides(tmp_path):
    fill(tmp_path / "base", models=("grpo",), images=30)
    fill(tmp_path / "head", models=("grpo",), images=30, seed=3)
    base, head = read_sides(tmp_path, "base", "head")
    there = compare(base, head, "grpo", Bootstrap(resamples=100))
    back = compare(head, base, "grpo", Bootstrap(resamples=100))
    for one, other in zip(there.levels + there.tasks + there.calls, back.levels + back.tasks + back.calls, strict=True):
        assert one.estimate == -other.estimate and one.p == other.p
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    rows = join(base, head, "grpo").rows
    hard = rows[rows.severity == "high"]
    found = there.level("grpo", "high")
    assert found.estimate == pytest.approx(hard.correct_head.mean() - hard.correct_base.mean())
    assert (found.n, found.clusters) == (60, 15), "the two images of a minimal pair are one cluster"
    sides = there.robustness("grpo")
    assert sides["head"]["relative"] == pytest.approx(found.head / there.level("grpo", "clean").head)
    one, other = there.relative["grpo"], back.relative["grpo"]
    assert one.estimate == pytest.approx(sides["head"]["relative"] - sides["base"]["relative"])
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low)) and one.low < one.estimate < one.high


def test_a_model_that_is_hardly_ever_right_on_clean_images_has_no_relative_robustness_to_compare(tmp_path):
    for side, seed in (("base", 0), ("head", 3)):
        fill(tmp_path / side, models=("grpo",), images=30, right=RIGHT | {"clean": 0.05}, seed=seed)
    sides = read_sides(tmp_path, "base", "head")
    found = compare(*sides, "grpo", Bootstrap(resamples=500))
    assert found.level("grpo", "clean").base > 0 and found.level("grpo", "clean").head > 0
    assert found.relative == {} and found.level("grpo", "high").low is not None
    assert "robustness" in render.markdown(found, verdicts.judge(found, verdicts.policy_of(*sides)[0], []))


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


def test_text_from_the_data_cannot_break_out_of_its_place():
    assert render._block("a <b> & c") == "a &lt;b&gt; &amp; c"
    quoted = render._block(render.Quote("trace", "```\n</details>"))
    assert quoted.splitlines()[2] == "````text" and quoted.endswith("\n````")


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
