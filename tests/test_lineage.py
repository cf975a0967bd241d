"""`clear lineage`: an output's data, code, parameters, parents and commit from dvc.lock and git, and what stands in the
way of making it again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from clear.data.workspace import record_run, stage_run
from clear.errors import ClearError
from clear.project.lineage import lineage
from tests.conftest import git

OUTPUT = "data/metrics/evaluate_base.json"


def test_data_code_parameters_parents_and_commit_are_those_of_the_lock(project, clear, monkeypatch):
    monkeypatch.setenv("CLEAR_HOME", str(project / ".clear"))
    with stage_run("evaluate"):
        record_run("evaluate", milliseconds_per_question=1.0)
    lock = yaml.safe_load((project / "dvc.lock").read_text())["stages"]
    found = lineage(Path(), OUTPUT)
    own = found.steps[0]
    assert own.stage == "evaluate" and own.command == lock["evaluate"]["cmd"]
    assert own.outputs == {out["path"]: out["md5"] for out in lock["evaluate"]["outs"]}
    assert {*own.code, *own.inputs} == {dep["path"] for dep in lock["evaluate"]["deps"]} == {"code/lib", "data/samples"}
    assert own.inputs == {"data/samples": "source"} and own.parameters == {"seed": 20260421}
    assert own.commit.id == git(project, "rev-parse", "--short", "HEAD").strip()
    instructions = torch.backends.cpu.get_cpu_capability()
    assert "Python" in own.machine and f"torch {torch.__version__} with {instructions}" in own.machine
    names = [step.stage for step in found.steps]
    for step in found.steps:
        assert all(names.index(parent) > names.index(step.stage) for parent in step.parents)
    assert "source" in names
    status, out, _ = clear("lineage", project / OUTPUT, "--json")
    assert status == 0 and json.loads(out)["steps"][0]["outputs"] == own.outputs
    assert own.command in clear("lineage", OUTPUT, "--full")[1]


def test_it_can_be_made_again_only_where_everything_is_as_it_was(project, monkeypatch):
    assert lineage(Path(), OUTPUT).obstacles == []
    assert "It can be made again here" in lineage(Path(), OUTPUT).text()
    (project / "code/source.txt").write_text("other")
    (obstacle,) = lineage(Path(), OUTPUT).obstacles
    assert "code/source.txt" in obstacle and "(stage source)" in obstacle
    git(project, "checkout", "-q", "--", "code/source.txt")
    monkeypatch.setattr("clear.project.lineage.read_pins", lambda file: {"numpy": "0.0.1"})
    found = lineage(Path(), OUTPUT)
    assert found.obstacles == [] and "instead of 0.0.1" in found.cautions[0] and "bytes may differ" in found.text()


def test_an_output_lies_where_it_is_said_to(project):
    sample = "data/samples"
    assert lineage(Path(), sample).places == ["the workspace", "the cache"]
    (project / sample).unlink()
    assert lineage(Path(), sample).places == ["the cache"]
    shutil.rmtree(project / ".dvc/cache")
    found = lineage(Path(), sample)
    assert found.places == [] and "`dvc pull` may have it" in found.text()


def test_an_older_commit_has_its_own_lineage(project):
    before = lineage(Path(), "data/samples")
    lock = project / "dvc.lock"
    value = before.steps[0].outputs["data/samples"]
    lock.write_text(lock.read_text().replace(value, "a" * 32))
    assert lineage(Path(), "data/samples").steps[0].commit is None
    git(project, "commit", "-qam", "another one")
    after = lineage(Path(), "data/samples")
    assert after.steps[0].commit.subject == "another one"
    then = lineage(Path(), "data/samples", "HEAD~1")
    assert then.steps[0].outputs == before.steps[0].outputs and then.steps[0].commit == before.steps[0].commit
    assert f"git worktree add ../then {git(project, 'rev-parse', 'HEAD~1')[:10]}" in then.obstacles[0]


def test_outputs_that_a_merge_made_anew_are_recorded_in_that_merge(project):
    """Two branches changed the stage; the conflict in dvc.lock was resolved by a run on both."""
    lock = project / "dvc.lock"
    value = lineage(Path(), "data/samples").steps[0].outputs["data/samples"]
    text = lock.read_text()
    git(project, "checkout", "-qb", "side")
    lock.write_text(text.replace(value, "a" * 32))
    git(project, "commit", "-qam", "on the side")
    git(project, "checkout", "-q", "-")
    lock.write_text(text.replace(value, "b" * 32))
    git(project, "commit", "-qam", "here")
    git(project, "merge", "-q", "--no-commit", "-s", "ours", "side")
    lock.write_text(text.replace(value, "c" * 32))
    git(project, "commit", "-qam", "both")
    git(project, "config", "log.diffMerges", "off")
    assert lineage(Path(), "data/samples").steps[0].commit.subject == "both"
    assert lineage(Path(), "data/samples", "HEAD^2").steps[0].commit.subject == "on the side"


@pytest.mark.parametrize("setting", [("core.attributesFile", "attributes"), ("log.showRoot", "false")])
def test_the_settings_of_git_hide_no_commit(project, setting):
    """A lock file is binary to some, and a history is read differently by others."""
    Path("attributes").write_text("*.lock binary\n")
    git(project, "config", *setting)
    assert lineage(Path(), "data/samples").steps[0].commit.id == git(project, "rev-parse", "--short", "HEAD").strip()
    git(project, "checkout", "-q", "--orphan", "unborn")
    assert lineage(Path(), "data/samples").steps[0].commit is None


def test_a_history_that_cannot_be_read_is_said(project):
    commit = git(project, "rev-parse", "HEAD:dvc.lock").strip()
    (project / ".git/objects" / commit[:2] / commit[2:]).unlink()
    with pytest.raises(ClearError, match=r"the history of dvc\.lock cannot be read: "):
        lineage(Path(), "data/samples")


def test_what_no_stage_makes_is_said_to_be_what_it_is(project, clear):
    def said(*arguments):
        status, out, error = clear("lineage", *arguments)
        assert status == 1 and out == "" and error.count("\n") == 1
        return error

    assert "it is kept in git, last changed in" in said("params.yaml")
    assert "not in git; the outputs are" in said("nowhere")
    assert "holds outputs of several stages" in said("data")
    assert "neither a git revision" in said("data/samples", "--rev", "no-such")
    assert "neither a git revision" in said("data/samples", "--rev=--output=x") and not Path("x").exists()
    Path("dvc.lock").write_text("stages: [1]\n")
    assert "not a lock file of DVC" in said("data/samples")


@pytest.mark.parametrize("path", ["data/samples", "nowhere"])
def test_outside_a_project_it_is_said_where_to_ask(tmp_path, clear, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    status, _, error = clear("lineage", path)
    assert status == 1
    assert error.endswith(f"{tmp_path} has no dvc.lock with outputs; run this in the project's folder.\n")
