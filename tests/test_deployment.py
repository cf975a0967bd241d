"""Flows on a real Prefect server with a real worker: scheduled, cancelled, killed, orphaned, twice at once, aside."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psutil
import pytest
from prefect.automations import Automation
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.states import Cancelling

from clear.data.lock import holder, lock_file
from clear.project.scratch import refresh, write_params
from flows import dvc_commands, pipeline
from flows.service.deploy import POOL
from tests.conftest import ROOT, git
from tests.helpers.prefect_server import PATIENCE, Server, running
from tests.helpers.processes import GONE_WITHIN, alive, free_port, run_dvc, wait_until

pytest_plugins = ["tests.helpers.prefect_server"]

DEPLOYED = {
    "propose/weekly": "0 3 * * 6",
    "benchmark/nightly": "0 1 * * *",
    "retrain/check": "30 4 * * *",
    "sweep/orphans": "*/15 * * * *",
    "tidy/monthly": "0 5 1 * *",
}


LONG = """
import os, pathlib, subprocess, sys, time
steps, finish = pathlib.Path(".clear/steps"), pathlib.Path(".clear/finish")
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(90)"
child = subprocess.Popen([sys.executable, "-c", deaf])
pathlib.Path(".clear/child").write_text(str(child.pid))
done = int(steps.read_text()) if steps.exists() else 0
print("resumed at", done, flush=True)
while not finish.exists():
    done += 1
    pathlib.Path(".clear/next").write_text(str(done))
    os.replace(".clear/next", steps)
    time.sleep(0.1)
child.kill()
pathlib.Path("data/long").write_text("done")
"""


@pytest.fixture
def long(project):
    """The small project with one more stage that keeps a checkpoint, has a deaf child, and ends when it is told to."""
    stages = (project / "dvc.yaml").read_text()
    stages += textwrap.dedent("""
        long:
          cmd: python code/long.py
          deps: [code/long.py, data/samples]
          outs: [data/long]
    """).replace("\n", "\n  ")
    (project / "dvc.yaml").write_text(stages.rstrip() + "\n")
    (project / "code/long.py").write_text(LONG)
    return project


def in_progress(project: Path) -> tuple[int, int]:
    """Wait until the long stage works; returns the ids of the flow's process and of the stage's deaf child."""
    wait_until((project / ".clear/steps").exists, PATIENCE, "the long stage")
    before = int((project / ".clear/steps").read_text())
    wait_until(lambda: int((project / ".clear/steps").read_text()) > before, 10, "its progress")
    return json.loads(lock_file(project).read_text())["pid"], int((project / ".clear/child").read_text())


def family(pid: int) -> list[int]:
    return [pid, *(one.pid for one in psutil.Process(pid).children(recursive=True))]


def all_gone(pids: list[int], seconds: float = GONE_WITHIN) -> None:
    wait_until(lambda: not any(alive(pid) for pid in pids), seconds, f"the end of {[p for p in pids if alive(p)]}")


def resume(server: Server, project: Path) -> None:
    """The same run again continues at the checkpoint and completes."""
    reached = int((project / ".clear/steps").read_text())
    (project / ".clear/finish").write_text("")
    run = server.start("pipeline/here", workspace=str(project))
    assert server.ended(run).is_completed(), server.state(run)
    said = f"resumed at {reached}"
    wait_until(lambda: said in [one["message"] for one in server.logs(run)], 20, "its log")
    assert (project / "data/long").read_text() == "done"


# In this process, on the server


@pytest.mark.slow
def test_a_second_run_is_cached(server, project):
    (project / "code/source.txt").write_text("changed")
    assert pipeline.pipeline(str(project)) == {"source": "Ran", "evaluate": "Ran"}
    assert pipeline.pipeline(str(project)) == {"source": "Cached", "evaluate": "Cached"}
    assert lock_file(project).read_text() == ""


@pytest.mark.slow
def test_a_failing_stage_ends_the_flow_and_names_itself(server, project, capsys):
    (project / "code/source.txt").unlink()
    assert pipeline.main([str(project)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: stage source failed: ") and "code/source.txt" in line


@pytest.mark.slow
def test_a_stage_waits_for_another_dvc_process_and_a_full_run_says_it_has_no_remote(
    server, project, monkeypatch, caplog
):
    from dvc.repo import Repo

    monkeypatch.setattr(pipeline, "reproduce", pipeline.reproduce.with_options(retry_delay_seconds=2))

    def said(text: str) -> bool:
        return any(text in record.getMessage() for record in caplog.records)

    def unlock_when_told() -> None:
        wait_until(lambda: said("Unable to acquire lock"), PATIENCE, "a refused stage")
        repo.lock.unlock()

    with Repo(str(project)) as repo:
        repo.lock.lock()
        waiting = threading.Thread(target=unlock_when_told)
        waiting.start()
        both = ["source", "evaluate"]
        assert pipeline.pipeline(str(project), both) == {"source": "Cached", "evaluate": "Cached"}
        waiting.join()
    assert said("no default DVC remote")


# Deployed


@pytest.mark.slow
def test_what_is_deployed_runs_one_at_a_time_on_schedule_in_this_folder(server):
    for name, cron in DEPLOYED.items():
        deployment = server.deployment(name)
        assert [(one.schedule.cron, one.active) for one in deployment.schedules] == [(cron, True)]
        assert deployment.work_pool_name == POOL
        assert deployment.global_concurrency_limit.limit == 1
        assert deployment.concurrency_options.collision_strategy.value == "CANCEL_NEW"
        (step,) = deployment.pull_steps
        assert next(iter(step.values()))["directory"] == str(ROOT)
    assert server.client.read_work_pool(POOL).type == "process"
    by_hand = server.deployment("pipeline/here")
    assert by_hand.schedules == [] and by_hand.global_concurrency_limit.limit == 1
    (automation,) = server.client.read_automations_by_name("clear-zombies")
    assert automation.enabled and automation.trigger.within == timedelta(seconds=90)


@pytest.mark.slow
def test_a_schedule_fires_and_its_run_completes_with_logs_states_and_artifacts(server, worker, project):
    (project / "code/source.txt").write_text("more than before")
    plot = project / "data/report/tiny/plots/accuracy.png"
    plot.parent.mkdir(parents=True)
    plot.write_bytes(b"\x89PNG")
    deployment = server.deployment("pipeline/here")
    # Short, since a busy scheduler may see the first date only when it is over; what comes too early is cancelled.
    soon = IntervalSchedule(interval=timedelta(seconds=30), anchor_date=datetime.now(UTC) + timedelta(seconds=3))
    schedule = DeploymentScheduleCreate(schedule=soon, parameters={"workspace": str(project)}, slug="soon")
    (created,) = server.client.create_deployment_schedules(deployment.id, [schedule])

    def fired():
        # A schedule that is deleted takes its runs along until they have begun.
        runs = server.runs("pipeline/here")
        ours = [one for one in runs if one["parameters"].get("workspace") == str(project)]
        return [one for one in ours if one["state_type"] not in ("SCHEDULED", "PENDING", "CANCELLED")]

    try:
        scheduled = wait_until(fired, PATIENCE, "a scheduled run; the server's log says why")[0]
    finally:
        server.client.delete_deployment_schedule(deployment.id, created.id)
    run = scheduled["id"]
    assert scheduled["auto_scheduled"]
    assert server.ended(run).is_completed(), server.state(run)
    expected = {"pull": "Skipped", "source": "Ran", "evaluate": "Ran"}
    wait_until(lambda: server.tasks(run) == expected, 20, f"{expected}")
    # Lines come in batches, the last of them after the state.
    wait_until(
        lambda: "Running stage 'source':" in [one["message"] for one in server.logs(run)], 20, "the stage's line"
    )
    said = [one["message"] for one in server.logs(run)]
    assert not [line for line in said if line.startswith(dvc_commands.ADVICE)], said
    assert server.client.read_flow_run(run).name.endswith("+"), "the workspace has an edit"
    shown = server.artifacts(run)
    assert "| source | Ran |" in shown["metrics"] and shown["picture"].startswith("![accuracy](data:image/png;base64,")
    assert (project / "data/samples").read_text() == "more than before"


@pytest.mark.slow
def test_the_deployed_sweeper_ends_at_once_where_nothing_is_in_the_cloud(server, worker, project):
    run = server.start("sweep/orphans", workspace=str(project))
    assert server.ended(run).is_completed(), server.state(run)
    said = "no stage is placed on AWS Batch and compute.budget_usd is 0: nothing to sweep."
    wait_until(lambda: said in [one["message"] for one in server.logs(run)], 20, "its log")


@pytest.mark.slow
def test_deploying_again_doubles_nothing(server):
    before = [server.deployment(name).id for name in DEPLOYED]
    command = [sys.executable, "-m", "flows.service.deploy"]
    assert subprocess.run(command, cwd=ROOT, env=server.environment, capture_output=True).returncode == 0
    for name, known in zip(DEPLOYED, before, strict=True):
        assert server.deployment(name).id == known and len(server.deployment(name).schedules) == 1
    assert len(server.client.read_automations_by_name("clear-zombies")) == 1
    for url, said in (("http://127.0.0.1:1/api", "does not answer"), ("", "PREFECT_API_URL is not set")):
        done = subprocess.run(
            command, cwd=ROOT, env=server.environment | {"PREFECT_API_URL": url}, capture_output=True, text=True
        )
        assert done.returncode == 1 and said in done.stderr and done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_a_cancelled_run_takes_its_processes_along_and_a_second_one_meanwhile_is_cancelled(server, worker, long):
    run = server.start("pipeline/here", workspace=str(long))
    flow, child = in_progress(long)
    processes = [*family(flow), child]
    assert len(processes) > 4  # flow, supervisor, DVC, stage, its child
    second = server.start("pipeline/here", workspace=str(long))
    assert server.ended(second).is_cancelled()
    server.client.set_flow_run_state(run, Cancelling())
    all_gone(processes)
    assert server.ended(run).is_cancelled()
    resume(server, long)


@pytest.mark.slow
def test_a_killed_run_is_crashed_leaves_no_process_and_the_next_one_resumes(server, worker, long):
    run = server.start("pipeline/here", workspace=str(long))
    flow, child = in_progress(long)
    processes = [*family(flow), child]
    os.killpg(os.getpgid(flow), signal.SIGKILL)
    all_gone(processes)
    assert server.ended(run, 30).is_crashed()
    resume(server, long)


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_still_holds_the_workspace(server, worker, long, tmp_path):
    run = server.start("pipeline/here", workspace=str(long))
    flow, child = in_progress(long)
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
    assert alive(flow) and alive(child)

    command = [sys.executable, "-m", "flows.pipeline", str(long), "--when-busy"]
    left = subprocess.run([*command, "leave"], cwd=ROOT, env=server.environment, capture_output=True, text=True)
    assert left.returncode == 3
    assert f"process {flow} since " in left.stderr.splitlines()[-1]
    with running([*command, "wait"], server.environment, tmp_path / "waiting.log") as waiting:
        wait_until(lambda: "waiting until it ends" in (tmp_path / "waiting.log").read_text(), PATIENCE, "a waiting run")
        assert str(flow) in holder(long) and waiting.poll() is None
        (long / ".clear/finish").write_text("")
        assert server.ended(run).is_completed(), "the orphan ends its work and says so"
        assert waiting.wait(PATIENCE) == 0
    run_dvc(long, "status", "--quiet")


@pytest.mark.slow
def test_a_run_without_any_process_left_to_speak_for_it_is_crashed_by_the_automation(server, worker, long):
    automation = Automation.read(name="clear-zombies")
    automation.trigger.within = timedelta(seconds=35)  # still more than a heartbeat
    automation.update()
    run = server.start("pipeline/here", workspace=str(long))
    flow, child = in_progress(long)
    time.sleep(45)
    assert server.state(run).is_running(), "heartbeats keep a long run alive"
    processes = [*family(flow), child]
    os.killpg(worker.pid, signal.SIGKILL)
    os.killpg(os.getpgid(flow), signal.SIGKILL)
    all_gone(processes)
    state = server.ended(run, 35 + 30)
    assert state.is_crashed() and "No heartbeat" in state.message


@pytest.mark.slow
def test_without_a_server_it_runs_too_and_sigterm_leaves_no_process(long, server, tmp_path):
    environment = server.environment | {"PREFECT_HOME": str(tmp_path / "home")}
    del environment["PREFECT_API_URL"]
    command = [sys.executable, "-m", "flows.pipeline", str(long)]
    with running(command, environment, tmp_path / "first.log") as process:
        _, child = in_progress(long)
        processes = [*family(process.pid), child]
        process.terminate()
        all_gone(processes)
        assert process.wait() == 128 + signal.SIGTERM
        said = (tmp_path / "first.log").read_text()
        assert said.partition("resumed at 0")[2].splitlines()[1:] == [
            "interrupted; run the same command again to resume from the last checkpoint"
        ], f"nothing of a crash, nor of a state: {said}"
    (long / ".clear/finish").write_text("")
    with running(command, environment, tmp_path / "second.log") as process:
        assert process.wait(PATIENCE) == 0, (tmp_path / "second.log").read_text()


@pytest.mark.slow
def test_prefect_local_is_one_command_and_ctrl_c_stops_server_and_worker(server, tmp_path):
    port = free_port()
    environment = server.environment | {"PREFECT_HOME": str(tmp_path / "home")}
    del environment["PREFECT_API_URL"]
    log = tmp_path / "local.log"
    with running([sys.executable, "-m", "flows.service.local", str(port)], environment, log) as process:
        wait_until(lambda: "stop with Ctrl-C" in log.read_text() or process.poll() is not None, PATIENCE, "the start")
        assert process.poll() is None, log.read_text()
        wait_until(lambda: "Worker" in log.read_text() and "started" in log.read_text(), PATIENCE, "the worker")
        asked = {"Origin": "http://evil.test", "Access-Control-Request-Method": "POST"}
        api = f"http://127.0.0.1:{port}/api/flow_runs/filter"
        with httpx.Client(trust_env=False) as client:  # a page of any other site, open in a browser of this machine
            assert "access-control-allow-origin" not in client.options(api, headers=asked).headers
            assert client.post(api, json={}).status_code == 403, "without the token that only its own page can read"
        taken = subprocess.run(
            [sys.executable, "-m", "flows.service.local", str(port)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert taken.returncode == 1 and taken.stderr == (
            f"error: port {port} is taken; name another one: make prefect-local PORT=4300.\n"
        )
        processes = family(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert "stopped: worker and server" in log.read_text()
        all_gone(processes)


@pytest.mark.slow
def test_the_smoke_pipeline_completes_as_a_run_and_again_has_nothing_to_do(server, worker, tmp_path):
    folder = tmp_path / "smoke"
    refresh(ROOT, folder)
    write_params(folder / "params.yaml", ["profile=smoke"])
    names = dvc_commands.stages_in_order(folder)
    for expected in ("Ran", "Cached"):
        run = server.start("pipeline/here", workspace=str(folder))
        assert server.ended(run, 1800).is_completed(), server.state(run)
        wait_until(lambda run=run: {*names} <= {*server.tasks(run)}, 30, "the server knows every task")
        tasks = server.tasks(run)
        assert {tasks[name] for name in names} == {expected}
    assert "| grpo | " in server.artifacts(run)["metrics"] and "picture" in server.artifacts(run)


@pytest.mark.slow
def test_a_check_for_new_data_without_any_completes_at_once(server, worker, project):
    (project / "data/incoming").mkdir()
    run = server.start("retrain/check", workspace=str(project))
    assert server.ended(run).is_completed(), server.state(run)
    assert server.state(run).name == "NothingNew" and "nothing new in data/incoming" in server.state(run).message
    commit = git(project, "rev-parse", "HEAD")[:10]
    assert server.client.read_flow_run(run).name == f"tiny {commit}"
    said = "nothing new in data/incoming"
    wait_until(lambda: any(said in one["message"] for one in server.logs(run)), 20, "its log")
