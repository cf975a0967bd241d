"""The flow `promote` on a real Prefect server with a real worker: a person is asked, and the answer counts."""

import json

import pytest
from prefect.logging import disable_run_logger

from clear.errors import ClearError
from clear.project.release import publish, registry
from flows import promote as flow
from flows.benchmark import benchmark
from flows.service import alerts
from flows.service.alerts import ensure_alerts
from tests.conftest import ROOT, git
from tests.helpers.prefect_server import PATIENCE
from tests.helpers.processes import wait_until
from tests.helpers.receivers import web_hook
from tests.helpers.registry_project import another, make

pytest_plugins = ["tests.helpers.prefect_server"]


@pytest.mark.slow
def test_a_version_goes_into_production_if_a_person_agrees(server, worker, tmp_path, monkeypatch):
    project = make(tmp_path / "all")
    monkeypatch.chdir(project)
    monkeypatch.setenv("CLEAR_HOME", str(tmp_path / "home"))
    publish.release(project, "grpo", "v1.0.0", push=True)
    another(project, "as good", seed=1)
    publish.release(project, "grpo", "v1.1.0", push=True)

    def promote(version: str):
        return server.start("promote/prod", workspace=str(project), version=version)

    def answered(run, **given):
        wait_until(lambda: server.state(run).is_paused(), PATIENCE, f"a question; the run is {server.state(run)}")
        return server.client.resume_flow_run(run, run_input=given)

    with web_hook() as hook:
        monkeypatch.setenv(alerts.VARIABLE, hook.address)
        ensure_alerts(server.client, ROOT)
        hook.messages.clear()
        run = promote("v1.0.0")
        wait_until(lambda: hook.messages, PATIENCE, "a message")
        assert hook.titles() == ["CLEAR: promote/prod waits for a decision"]
        assert "v1.0.0 to prod: " in hook.messages[0][1] and f"/runs/flow-run/{run}" in hook.messages[0][1]
        nobody = answered(run, approve=True, name="")
        assert nobody.status.value == "REJECT" and server.state(run).is_paused()
        assert registry.in_stage(project, "grpo", "prod") == ""
        assert answered(run, approve=True, name="the owner").status.value == "ACCEPT"
        assert server.ended(run).name == "Promoted", server.state(run)
        assert registry.in_stage(project, "grpo", "prod") == "v1.0.0"
        (tag,) = git(tmp_path / "all/origin.git", "tag", "--list", "grpo#prod*", "--format=%(contents)").split("\n\n")
        assert "Approved by the owner." in tag and "The gate passes" in tag
        wait_until(lambda: "CLEAR: grpo v1.0.0 is in prod" in hook.titles(), PATIENCE, "a message")
        said = ["CLEAR: promote/prod waits for a decision", "CLEAR: grpo v1.0.0 is in prod"]
        assert hook.titles() == said, "going on is no second question"
    declined = promote("v1.1.0")
    answered(declined, approve=False, name="the owner", because="not on a Friday")
    assert (
        server.ended(declined).name == "Declined" and "by the owner: not on a Friday" in server.state(declined).message
    )
    assert registry.in_stage(project, "grpo", "prod") == "v1.0.0"
    for version, said in (("v1.0.0", "is in prod already"), ("v9.0.0", "is no release here")):
        refused = promote(version)
        assert server.ended(refused).is_failed() and said in server.state(refused).message


@pytest.mark.slow
def test_the_benchmark_takes_a_release_for_a_folder(server, tmp_path, monkeypatch):
    project = make(tmp_path / "all")
    monkeypatch.chdir(project)
    monkeypatch.setenv("CLEAR_HOME", str(tmp_path / "home"))
    publish.release(project, "grpo", "v1.0.0", push=True)
    with pytest.raises(ClearError, match="grpo@prod: no version and no stage with one in it"):
        benchmark(str(project), models=["grpo"], folder="@prod")
    publish.assign(project, "grpo", "prod", "v1.0.0")
    another(project, "a later model", seed=1)
    measured = benchmark(str(project), models=["grpo"], folder="@prod")
    assert measured["grpo"] == json.loads((project / "code/evaluate_grpo.json").read_text())
    copy = project / ".clear/scratch/benchmark/data/models/grpo"
    assert not (copy / "note.txt").exists() and (project / "data/models/grpo/note.txt").exists(), "the released model"


def test_a_tag_that_is_another_at_the_remote_is_named(tmp_path):
    project = make(tmp_path / "all")
    git(project, "tag", "-m", "theirs", "grpo#prod#1")
    git(project, "push", "-q", "origin", "grpo#prod#1")
    git(project, "tag", "-f", "-m", "ours", "grpo#prod#1")
    with disable_run_logger(), pytest.raises(ClearError, match="different tags named 'grpo#prod#1'"):
        flow.promote.fn("v1.0.0", str(project))
