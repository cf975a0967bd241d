"""Retraining on new data: what is trained, refused and proposed, that nothing is done twice, and kills at any point."""

import json
import os
import signal
import subprocess
import sys

import pytest

from clear.bench import predictions
from clear.errors import ClearError
from clear.project.compare.load import read_sides
from clear.project.compare.verdict import decide
from clear.project.retrain import intake, run
from clear.project.retrain import request as pull_request
from clear.project.retrain.reproduce import reproduce
from clear.project.retrain.run import retrain
from clear.sources.incoming import sets
from tests.conftest import ROOT, git
from tests.helpers.processes import run_dvc
from tests.helpers.retraining import incoming_rows, look, tools, trees, untouched
from tests.revisions import rows_of

pytest_plugins = ["tests.helpers.retraining"]


def test_without_news_it_ends_at_once_and_news_without_a_remote_asks_for_one(trained):
    run_dvc(trained, "remote", "default", "--local", "--unset", "-q")
    with pytest.raises(ClearError, match=r"fog: new, but there is no default DVC remote.*make remote BUCKET="):
        look(trained)
    subprocess.run(["rm", "-r", "data/incoming/fog"], check=True)
    outcome, said = look(trained)
    assert outcome.message.startswith("nothing new in data/incoming") and outcome.state == "NothingNew" and not said
    assert not (trained / ".clear/scratch").exists()
    with pytest.raises(ClearError, match="s3://bucket: name a prefix too"):
        look(trained, incoming="s3://bucket")


def test_a_set_that_may_still_be_copied_waits(trained, monkeypatch):
    outcome, said = look(trained, rest=600)
    assert outcome.state == "NothingNew" and outcome.message.endswith("; fog may still be copied.")
    assert said == ["fog changed less than 600 s ago; left for another run, it may still be copied."]
    brought = run.bring

    def grows(folder, copy):
        brought(folder, copy)
        (copy / "data/incoming/fog/late.txt").write_text("one more file")

    monkeypatch.setattr(run, "bring", grows)
    outcome, said = look(trained)
    assert outcome.state == "NothingNew" and outcome.message.endswith("what is new in data/incoming still changes.")
    assert said[-1] == "fog changes while it is looked at; left for another run."


def test_a_workspace_that_is_behind_starts_from_the_newest_commit_at_origin(trained):
    """A colleague has trained on the set and the branch was merged: nothing is left to do."""
    run_dvc(trained, "remote", "default", "--local", "--unset", "-q")
    git(trained.parent, "clone", "-q", str(trained.parent / "origin.git"), "colleague")
    colleague = trained.parent / "colleague"
    file = colleague / "data/metrics/degrade.json"
    (new,) = sets(trained / "data/incoming")
    file.write_text(json.dumps({"incoming": {"sets": {"fog": {"fingerprint": new.fingerprint}}}}))
    git(colleague, "add", "-f", str(file))
    git(colleague, "commit", "-q", "-m", "trained on fog")
    git(colleague, "push", "-q", "origin", "main")
    with pytest.raises(ClearError, match="fog: new"):
        look(trained)
    outcome, _ = look(trained, revision="")
    head = git(colleague, "rev-parse", "HEAD")[:10]
    assert outcome.message == f"nothing new in data/incoming: 1 sets are in the training of {head}."


@pytest.mark.slow
def test_a_new_set_becomes_a_branch_with_both_models_on_the_new_benchmark_and_one_pull_request(trained, forge):
    outcome, said = look(trained)
    branch = outcome.branch
    assert branch.startswith("retrain/fog-") and "the gate passes" in outcome.message
    assert [one for one in said if "repro" in one] == [
        "dvc repro --single-item degrade mmd_bench evaluate@grpo",
        "dvc repro --single-item degrade mmd_bench grpo evaluate@grpo",
    ]
    steps = [line.split(" ", 1)[1] for line in trees(trained, branch)]
    assert steps == [
        "New degradation data: fog",
        "The model so far (grpo) on the benchmark with the new data",
        "Retrained on fog",
    ]
    first, last = f"{branch}~1", branch
    for commit, right in ((first, 20), (last, 50)):
        found = pull_request.incoming_rows(trained, commit, "grpo")
        assert len(found) == 60 and found.correct.sum() == right
    _, verdict = decide(*read_sides(trained, first, last), detail=False)
    assert verdict.status == 0
    trained_on = [git(trained, "show", f"{commit}:dvc.lock") for commit in ("main", first, last)]
    models = [lock[lock.index("data/models/grpo") :].split("md5: ")[1][:20] for lock in trained_on]
    assert models[0] == models[1] != models[2]
    assert "| fog | 60 about 30 images | 33.3 → 83.3 %, +50.0 points" in outcome.body
    assert (trained / f"data/report/{branch}/pull_request.md").read_text().endswith(outcome.body)
    untouched(trained)

    (request,) = forge.requests
    assert (request["head"], request["base"], request["draft"]) == (branch, "main", False)
    assert request["body"] == outcome.body and outcome.url == request["html_url"]

    git(trained.parent, "clone", "-q", "-b", branch, str(trained.parent / "origin.git"), "reviewer")
    reviewer = trained.parent / "reviewer"
    run_dvc(reviewer, "remote", "add", "-q", "--local", "--default", "storage", str(trained.parent / "remote"))
    run_dvc(reviewer, "pull", "-q")
    assert (reviewer / "data/incoming/fog/0.jpg").read_bytes() == (trained / "data/incoming/fog/0.jpg").read_bytes()
    assert "Running stage" not in run_dvc(reviewer, "repro")

    again, said = look(trained)
    assert again.url == outcome.url and len(forge.requests) == 1
    assert (outcome.state, again.state) == ("Proposed", "WaitsForReview")
    assert not [one for one in said if one.startswith("proposed")], said
    assert again.message == f"{branch} waits for review (Retrained on fog: the gate passes)"
    assert not [one for one in said if one.startswith("dvc")], said
    git(trained, "branch", "-q", "-D", branch)
    look(trained)
    assert len(forge.requests) == 1, "another machine learns of the branch from the git remote"
    git(trained, "merge", "-q", f"origin/{branch}")
    assert look(trained)[0].message.startswith("nothing new in data/incoming: 1 sets")


@pytest.mark.slow
def test_a_bad_set_goes_to_quarantine_and_a_good_one_beside_it_is_trained(trained):
    bad = trained / "data/incoming/mist"
    bad.mkdir()
    (bad / "rows.jsonl").write_text('{"image": "no.png", "question": "what letter is there?", "answer": "a"}\n')
    outcome, said = look(trained)
    problem = "no row of it can be used, 1 are rejected"
    assert outcome.quarantined == {"mist": problem} and outcome.branch.startswith("retrain/fog-")
    assert any("mist is not good" in one and "data/quarantine/mist" in one for one in said)
    told = said.index(f"refused: mist: {problem}")
    assert told < next(number for number, one in enumerate(said) if "grpo" in one), "before hours of training"
    assert not bad.exists() and (trained / "data/quarantine/mist/rows.jsonl").exists()
    report = trained / "data/quarantine/mist.report"
    assert json.loads((report / "refused.json").read_text())["problem"] == problem
    assert "no such file" in json.loads((report / "verdict.json").read_text())["rejects"][0]["detail"]
    assert "mist" not in git(trained, "ls-tree", "-r", "--name-only", outcome.branch)

    (trained / "data/incoming/mist").mkdir()
    (trained / "data/incoming/mist/rows.parquet").write_text("no Parquet file")
    outcome, said = look(trained)
    assert "not a readable Parquet file" in outcome.quarantined["mist"] and outcome.state == "Quarantined"
    assert not [one for one in said if "repro" in one]
    assert len(list((trained / "data/quarantine").glob("mist-*.report"))) == 1, "beside the first one"


@pytest.mark.slow
def test_a_gate_that_fails_makes_a_draft_and_a_forge_that_refuses_is_one_line(trained, forge, monkeypatch):
    forge.refuse = 403
    worse = rows_of({"clean": 0.5, "low": 0.5, "mid": 0.5, "high": 0.3})
    predictions.write(trained / "code/after.parquet", worse + incoming_rows(50))
    git(trained, "commit", "-q", "-a", "-m", "a recipe that does harm")
    with pytest.raises(ClearError, match=r"answers 403 .*right to write pull requests and run again: the branch is"):
        look(trained)
    monkeypatch.setenv("GITHUB_TOKEN", "wrong")
    said: list[str] = []
    with pytest.raises(ClearError, match=r"answers 401 .*check GITHUB_TOKEN"):
        retrain(trained, tools(said))
    assert not [one for one in said if one.startswith("proposed")], said
    monkeypatch.setenv("GITHUB_TOKEN", "t0ken")
    forge.refuse = 0
    outcome, said = look(trained)
    assert "the gate FAILS" in outcome.message and forge.requests[0]["draft"] is True
    assert "dvc push" not in said
    assert outcome.state == "WaitsForReview" and said[-1] == f"proposed: {outcome.branch}", "the first to open it"
    assert not [one for one in look(trained)[1] if one.startswith("proposed")]


@pytest.mark.slow
def test_what_is_out_of_date_at_origin_is_reproduced_aside_and_proposed_once(trained, forge):
    """The workspace is dirty and behind: neither matters, and nothing in it changes."""
    git(trained.parent, "clone", "-q", str(trained.parent / "origin.git"), "colleague")
    colleague = trained.parent / "colleague"
    predictions.write(colleague / "code/plain.parquet", rows_of({"clean": 0.9, "low": 0.9, "mid": 0.9, "high": 0.9}))
    (colleague / "code/evaluate.py").write_text((colleague / "code/evaluate.py").read_text() + "# another recipe\n")
    git(colleague, "commit", "-q", "-a", "-m", "another recipe")
    git(colleague, "push", "-q", "origin", "main")
    (trained / "code/evaluate.py").write_text("an edit that is not committed")
    before, lock = git(trained, "status", "--porcelain"), (trained / "dvc.lock").read_bytes()
    said: list[str] = []
    outcome = reproduce(trained, tools(said))
    head = git(colleague, "rev-parse", "HEAD").strip()
    assert (outcome.state, outcome.branch) == ("Proposed", f"reproduce/{head[:10]}")
    assert git(trained, "log", "--format=%s", "-2", outcome.branch).splitlines() == [
        f"Reproduced what was out of date in {head[:10]}",
        "another recipe",
    ]
    changed = git(trained, "diff", "--name-only", f"{outcome.branch}~", outcome.branch).splitlines()
    assert changed == ["data/predictions/grpo.parquet", "dvc.lock"]
    (request,) = forge.requests
    assert (request["head"], request["base"]) == (outcome.branch, "main") and "Reproduced main" in request["title"]
    assert git(trained.parent / "origin.git", "rev-parse", outcome.branch) == git(trained, "rev-parse", outcome.branch)
    assert "dvc push" in said
    assert (git(trained, "status", "--porcelain"), (trained / "dvc.lock").read_bytes()) == (before, lock)
    assert not (trained / ".clear/scratch/reproduce/copy").exists()

    said.clear()
    again = reproduce(trained, tools(said))
    assert (again.state, again.url) == ("WaitsForReview", outcome.url) and len(forge.requests) == 1
    assert not [one for one in said if one.startswith("dvc")], said
    git(colleague, "fetch", "-q")
    git(colleague, "merge", "-q", f"origin/{outcome.branch}")
    git(colleague, "push", "-q", "origin", "main")
    assert reproduce(trained, tools(said)).state == "NothingNew"
    with pytest.raises(ClearError, match="git fetch"):
        reproduce(trained, tools(said), "no-such-branch")


POINTS = ("clear incoming check", "dvc add", "git commit 1", "git commit 3", "dvc push", "git push 2", "in training")


def die_at(point: str) -> None:
    """Make this process kill itself just before the command that `point` names."""
    start, counts = subprocess.run, {"commit": 0, "push": 0}

    def run(command, *arguments, **options):
        words = [str(one) for one in command]
        text = " ".join(words[2:] if words[0] == sys.executable else words)
        for name in counts:
            if words[0] == "git" and name in words:
                counts[name] += 1
                text = f"git {name} {counts[name]}"
        if text.startswith(point):
            os.kill(os.getpid(), signal.SIGKILL)
        return start(command, *arguments, **options)

    subprocess.run = run


@pytest.mark.slow
def test_a_kill_at_any_point_and_then_again_ends_like_an_uninterrupted_run(trained, forge, monkeypatch):
    space = trained.parent.parent
    reference = space / "reference"
    subprocess.run(["cp", "-r", str(trained.parent), str(reference)], check=True)
    expected = trees(trained, look(trained)[0].branch)
    for point in POINTS:
        case = space / point.replace(" ", "-")
        subprocess.run(["cp", "-r", str(reference), str(case)], check=True)
        project = case / "project"
        git(project, "remote", "set-url", "origin", str(case / "origin.git"))
        run_dvc(project, "remote", "modify", "-q", "--local", "storage", "url", str(case / "remote"))
        monkeypatch.chdir(project)
        forge.requests.clear()
        child = os.fork()
        if not child:
            try:
                if point == "in training":
                    home = project / ".clear/scratch/retrain"
                    home.mkdir(parents=True)
                    (home / "kill").write_text(str(os.getpid()))
                else:
                    die_at(point)
                look(project)
            finally:  # never back into the test's own frames
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, point
        outcome, _ = look(project)
        assert trees(project, outcome.branch) == expected, point
        assert git(case / "origin.git", "rev-parse", outcome.branch) == git(project, "rev-parse", outcome.branch)
        assert len(forge.requests) == 1
        untouched(project)


@pytest.mark.slow
def test_the_flow_does_the_same_on_the_command_line(trained, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "flows.retrain", str(trained)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("Retrained on fog: the gate passes (retrain/fog-")
    (branch,) = git(trained, "for-each-ref", "--format=%(refname:short)", "refs/heads/retrain").split()
    assert len(trees(trained, branch)) == 3
    assert "no GITHUB_TOKEN is set" in done.stdout + done.stderr
    untouched(trained)
    for name, said in (("nothing", "neither a folder of"), ("s3://data", "name a prefix too")):
        done = subprocess.run([*command, "--incoming", name], cwd=ROOT, env=environment, capture_output=True, text=True)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 1 and said in line and "Traceback" not in done.stderr, done.stderr


def test_a_url_of_a_forge_is_read_from_origin(trained, monkeypatch):
    for url, expected in {
        "git@github.com:team/clear.git": ("https://api.github.com", "team/clear"),
        "https://github.com/team/clear": ("https://api.github.com", "team/clear"),
        "ssh://git@git.firm.example:2222/team/clear.git": ("https://git.firm.example/api/v3", "team/clear"),
    }.items():
        git(trained, "remote", "set-url", "origin", url)
        assert pull_request.repository(trained) == expected
    git(trained, "remote", "set-url", "origin", "/somewhere/origin.git")
    with pytest.raises(ClearError, match="set GITHUB_REPOSITORY to owner/name"):
        pull_request.repository(trained)
    monkeypatch.delenv("GITHUB_TOKEN", raising=False)
    assert pull_request.propose(trained, "b", "main", "t", "x") == ("", False)
    assert intake.default_remote(trained) == "storage"
