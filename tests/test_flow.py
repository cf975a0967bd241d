"""What the flows stand on, without a Prefect server: no process outlives a flow, tables."""

import base64
import errno
import importlib.machinery
import inspect
import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from prefect.exceptions import CancelledRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from clear.data.workspace import profile
from clear.errors import ClearError
from flows import benchmark, dvc_commands, pipeline, promote, retrain, sweep, tidy, watch
from flows.dvc_commands import explain
from flows.service import children
from flows.service.artifacts import metrics_table, picture
from flows.service.deploy import AUTOMATIONS, DEPLOYMENTS, POOL
from tests.conftest import ROOT, git
from tests.helpers.processes import alive, python

# Commands of a flow

STUBBORN = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
outlived = str(pathlib.Path(sys.argv[1]).with_name("outlived"))
deaf = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); time.sleep(90); open(sys.argv[1], 'w')"
child = subprocess.Popen([sys.executable, "-c", deaf, outlived])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("up", flush=True)
time.sleep(90)
open(outlived, "w")
"""
RUN = """
import os, signal, sys
from pathlib import Path
from flows.service import children
def leave(*_): raise SystemExit(1)
signal.signal(signal.SIGTERM, leave)
say = lambda line: print(line, flush=True)
command = [sys.executable, "-c", sys.argv[1], sys.argv[2]]
children.run(command, Path(sys.argv[2]).parent, dict(os.environ), say, Path(sys.argv[2]).parent / "lock")
"""


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_commands_that_ignore_sigterm_are_gone_with_the_flow_and_the_next_one_waits_for_that(tmp_path, number):
    file = tmp_path / "pid"
    with python(RUN, STUBBORN, str(file), process_group=0) as process:
        assert process.stdout.readline() == "up\n"
        family = psutil.Process(process.pid).children(recursive=True)
        assert int(file.read_text()) in {one.pid for one in family} and len(family) == 3
        os.killpg(process.pid, number)
        said = []
        status, _ = children.run(["echo", "next"], tmp_path, dict(os.environ), said.append, tmp_path / "lock")
        assert (status, said) == (0, ["next"])
        assert not [one for one in family[1:] if alive(one.pid)], "the next command started before they were gone"
        assert not (tmp_path / "outlived").exists(), "they were ended, and did not end by themselves"


SLOW_TO_LEAVE = """
import pathlib, signal, time
def leave(number, frame):
    time.sleep(1)
    pathlib.Path("saved").touch()
    raise SystemExit
signal.signal(signal.SIGTERM, leave)
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("seconds", "saved"), [("0.1", False), ("30", True)])
def test_a_command_has_the_seconds_to_leave_that_it_is_given(tmp_path, monkeypatch, seconds, saved):
    monkeypatch.setenv("CLEAR_GRACE_SECONDS", seconds)
    command = [sys.executable, "-c", SLOW_TO_LEAVE]
    process = children.start(command, tmp_path, dict(os.environ), stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"up\n"
    children.stop(process)
    assert (tmp_path / "saved").exists() is saved


@pytest.mark.parametrize("seconds", ["soon", "-1", "nan", "1e9"])
def test_seconds_to_leave_that_are_none_are_named(tmp_path, monkeypatch, seconds):
    monkeypatch.setenv("CLEAR_GRACE_SECONDS", seconds)
    with pytest.raises(ClearError, match=f"CLEAR_GRACE_SECONDS={seconds} is not a number from 0 to 86400"):
        children.start(["true"], tmp_path, dict(os.environ))


def test_a_command_leaves_nothing_behind_when_it_ends_by_itself(tmp_path):
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    status, lines = children.run([sys.executable, "-c", code], tmp_path, dict(os.environ), lambda line: None)
    assert status == 0 and not alive(int(lines[0]))


def test_lines_arrive_while_the_command_runs_and_progress_is_thinned_out(tmp_path):
    """It prints the second line only once somebody has read the first."""
    code = "import os, sys, time\nprint('first', flush=True)\n"
    code += "for _ in range(3000): os.path.exists('read') or time.sleep(0.01)\n"
    code += "os.path.exists('read') or sys.exit('nobody has read the first line')\n"
    code += "for i in range(50): print(i, end='\\r', flush=True)\nprint()\nprint('last')\nraise SystemExit(3)"
    seen = []

    def say(line: str) -> None:
        seen.append(line)
        (tmp_path / "read").touch()

    status, kept = children.run([sys.executable, "-c", code], tmp_path, dict(os.environ), say)
    assert status == 3, kept
    assert seen == kept == ["first", "49", "last"], "only the last state of the bar"


def test_a_signal_ends_a_command_with_the_shells_status(tmp_path):
    status, _ = children.run(["sh", "-c", "kill -9 $$"], tmp_path, dict(os.environ), lambda line: None)
    assert status == 128 + signal.SIGKILL


# DVC behind the flow


def test_stages_come_after_what_they_depend_on_wherever_one_asks_from(project, tmp_path, monkeypatch):
    assert dvc_commands.stages_in_order(project) == ["source", "evaluate"]
    monkeypatch.chdir(tmp_path)
    assert dvc_commands.stages_in_order(project) == ["source", "evaluate"]


def test_a_stage_is_unchanged_only_if_everything_before_it_is(project):
    assert dvc_commands.unchanged(project) == {"source", "evaluate"}
    (project / "code/lib/a.txt").write_text("new")
    assert dvc_commands.unchanged(project) == {"source"}
    (project / "code/source.txt").write_text("new")
    git(project, "checkout", "-q", "code/lib/a.txt")
    assert dvc_commands.unchanged(project) == set()


def test_only_what_is_known_and_not_there_is_missing(project):
    assert dvc_commands.missing_outputs(project) == []
    (project / "data/samples").unlink()
    (project / "data/metrics/evaluate_base.json").unlink()  # git's, not the remote's
    assert dvc_commands.missing_outputs(project) == ["data/samples"]
    assert dvc_commands.missing_outputs(project, ["evaluate"]) == ["data/samples"]
    assert dvc_commands.remote_of(project) is None


def test_commands_see_the_workspaces_own_home_and_this_interpreter(project, monkeypatch, tmp_path):
    assert dvc_commands.environment(project)["CLEAR_HOME"] == str(project / ".clear")
    monkeypatch.setenv("CLEAR_HOME", "/elsewhere")
    assert dvc_commands.environment(project)["CLEAR_HOME"] == "/elsewhere", "set for this folder, as make does"
    assert dvc_commands.environment(tmp_path)["CLEAR_HOME"] == str(tmp_path / ".clear")
    assert dvc_commands.environment(project)["PATH"].startswith(f"{Path(sys.executable).parent}:")


@pytest.mark.slow
def test_a_busy_dvc_is_temporary_and_a_missing_stage_is_not(project, monkeypatch):
    from dvc.repo import Repo

    with Repo(str(project)) as repo, repo.lock, pytest.raises(dvc_commands.Temporary, match="Unable to acquire lock"):
        dvc_commands.dvc(["repro", "source"], project, lambda line: None)
    with pytest.raises(ClearError, match="ended with status") as refused:
        dvc_commands.dvc(["repro", "nothing"], project, lambda line: None)
    assert not isinstance(refused.value, dvc_commands.Temporary)


def test_a_failure_is_explained_in_one_line_with_what_to_do():
    lines = [
        "Collecting",
        "ERROR: unexpected error - [Errno 28] No space left on device: '/x'",
        "",
        "Having any troubles? …",
    ]
    assert explain(lines).startswith("the disk is full; free some space") and "'/x'" in explain(lines)
    assert explain(["a stage says Forbidden", "1", "2", "ERROR: b"]) == "1 | 2 | b", "only DVC's own words count"
    assert explain([]) == "no output"
    unknown = ["ERROR: unexpected error - The config profile (team) could not be found"]
    assert "AWS profile that ~/.aws does not have" in explain(unknown) and "(team)" in explain(unknown)
    bucket = (
        'ERROR: unexpected error - Parameter validation failed:\nInvalid bucket name "my bucket": Bucket name must …'
    )
    assert "a name that no bucket can have" in explain(bucket.splitlines())


# What a run shows


def test_the_table_has_a_row_per_model_and_says_what_ran(tmp_path):
    assert metrics_table(tmp_path) == "No evaluation here yet."
    folder = tmp_path / "data/metrics"
    folder.mkdir(parents=True)
    content = {"accuracy": {"clean": 0.5, "high": 0.25}, "average": 0.375, "call_rate": {"high": 1.0}}
    (folder / "evaluate_grpo.json").write_text(json.dumps(content))
    (folder / "evaluate_base.json").write_text("15")
    (folder / "source.json").write_text("[]")
    lines = metrics_table(tmp_path, {"source": "Cached"}).splitlines()
    assert lines[2:4] == [
        "| base | – | – | – | – | 15.000 | – | – |",
        "| grpo | 0.500 | – | – | 0.250 | 0.375 | – | 1.000 |",
    ]
    assert lines[-1] == "| source | Cached |"
    (folder / "evaluate_base.json").write_text("{")
    with pytest.raises(ClearError, match=r"evaluate_base.json: not valid JSON"):
        metrics_table(tmp_path)


def test_the_picture_is_the_plot_of_the_current_profile(project, tmp_path):
    assert picture(tmp_path, project) is None
    file = tmp_path / profile(project) / "plots/accuracy.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\x89PNG")
    assert picture(tmp_path, project).endswith(f"base64,{base64.b64encode(file.read_bytes()).decode()})")


# On the command line


API = "http://127.0.0.1:4200/api"
AGAIN = "start it, or set PREFECT_API_URL, then run the same command again: what was made is kept."


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (None, 0, ""),
        (ClearError("the disk is full."), 1, "error: the disk is full.\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "data/a"),
            1,
            "error: data/a: No space left on device; free some space there, then run the command again.\n",
        ),
        (httpx.ConnectError("refused"), 1, f"error: the Prefect API at {API} does not answer (refused); {AGAIN}\n"),
        (
            RuntimeError("Failed to reach API at http://a/api"),
            1,
            f"error: the Prefect API at {API} does not answer (Failed to reach API at http://a/api); {AGAIN}\n",
        ),
        (CancelledRun("another run writes."), 3, "another run writes.\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again, please\n"),
    ],
)
def test_a_flow_on_the_command_line_ends_with_a_status_and_one_line(capsys, raised, status, said):
    def run():
        if raised is not None:
            raise raised
        return {"done": True}

    before = signal.getsignal(signal.SIGTERM)
    try:
        with temporary_settings({PREFECT_API_URL: API}):
            assert pipeline.here_and_now(run, ", please") == (status, None if raised else {"done": True})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("name", ["prefect.flow_runs", "prefect.task_runs"])
def test_a_known_error_is_logged_in_one_line_and_a_bug_with_its_trace(name, monkeypatch):
    logger, said = logging.getLogger(name), io.StringIO()
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(said)])
    for error in (ClearError("the disk is full."), ValueError("a bug")):
        try:
            raise error
        except Exception as caught:
            logger.exception("Encountered exception during execution: %r", caught)
    first, *rest = said.getvalue().splitlines()
    assert first == "the disk is full."
    assert "Traceback" in rest[1] and rest[-1] == "ValueError: a bug"


# What is deployed


def test_deployments_name_flows_with_the_parameters_they_have():
    content = yaml.safe_load((ROOT / DEPLOYMENTS).read_text())
    flows = {"flows/pipeline.py:pipeline": pipeline.pipeline, "flows/benchmark.py:benchmark": benchmark.benchmark}
    flows |= {"flows/pipeline.py:propose": pipeline.propose, "flows/promote.py:promote": promote.promote}
    flows |= {"flows/retrain.py:retrain": retrain.retrain, "flows/sweep.py:sweep_jobs": sweep.sweep_jobs}
    flows["flows/tidy.py:tidy"] = tidy.tidy
    flows["flows/watch.py:watch"] = watch.watch
    assert {one["entrypoint"] for one in content["deployments"]} == set(flows)
    for one in content["deployments"]:
        flow = flows[one["entrypoint"]]
        asked = {"version": "v1.2.0"} if flow is promote.promote else {}
        flow.validate_parameters(one["parameters"] | asked)
        assert set(one["parameters"]) <= set(inspect.signature(flow.fn).parameters)
        assert one["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
        assert one["work_pool"]["name"] == POOL and one["tags"] == ["clear"]
        assert (one["name"] in ("here", "prod")) == ("schedules" not in one), "on request only"
        assert all(schedule["cron"] for schedule in one.get("schedules", []))


def test_no_file_beside_a_deployed_flow_hides_a_package():
    """Prefect puts the folder of a flow's file in front of the import path and leaves it there."""
    folders = [entry for entry in sys.path if entry and Path(entry).resolve() != ROOT / "flows"]
    for file in (ROOT / "flows").iterdir():
        if file.stem.isidentifier() and not file.stem.startswith("__"):
            assert importlib.machinery.PathFinder.find_spec(file.stem, folders) is None, file


def test_the_automation_waits_longer_than_two_heartbeats_and_watches_only_our_runs():
    (automation,) = yaml.safe_load((ROOT / AUTOMATIONS).read_text())
    worker = yaml.safe_load((ROOT / DEPLOYMENTS).read_text())["deployments"][0]["work_pool"]
    heartbeat = int(worker["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    assert automation["trigger"]["within"] > 2 * heartbeat
    assert automation["trigger"]["match_related"]["prefect.resource.id"] == "prefect.tag.clear"
