"""The command line: right stage, one-line errors, an interruption that says how to go on; run records; results."""

import errno
import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from tqdm import tqdm

from clear import cli
from clear.cli.pipeline import STAGES
from clear.data import workspace
from clear.errors import UNDECIDED, ClearError, naming, refusal
from clear.project.scratch import write_params
from tests.conftest import ROOT, git


@pytest.fixture
def fake_stage(monkeypatch):
    """Replace `clear.stages.<name>` by a module whose `run` is the given function."""

    def put(name, run):
        module = types.ModuleType(f"clear.stages.{name}")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return put


def test_help_names_every_stage_of_the_pipeline():
    shown = subprocess.run([sys.executable, "-m", "clear", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for name in (*stages, "check", "results", "params", "scratch", "ask"):
        assert re.search(rf"\b{name}\b", shown.stdout), name


def test_help_is_fast_for_it_loads_nothing_heavy():
    code = "import sys, clear.cli; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = set(shown.stdout.split())
    heavy = {"torch", "transformers", "pandas", "numpy", "cv2", "dvc", "pyarrow", "hydra", "omegaconf", "matplotlib"}
    assert not loaded & heavy


@pytest.mark.parametrize("name", [*STAGES, "report"])
def test_a_stage_runs_its_own_module_with_the_checked_parameters(project, clear, fake_stage, name):
    calls = []
    fake_stage("sft" if name == "sft_direct" else name, lambda config, **more: calls.append((config.profile, more)))
    assert clear(name)[0] == 0
    assert calls == [("tiny", {"direct": True} if name == "sft_direct" else {})]
    assert set(workspace.run_records()) == {name}


def test_evaluate_takes_a_model_and_refuses_another_word(project, clear, fake_stage):
    calls = []
    fake_stage("evaluate", lambda config, model: calls.append(model))
    assert clear("evaluate", "reencode")[0] == 0
    assert calls == ["reencode"]
    assert set(workspace.run_records()) == {"evaluate_reencode"}
    code, _, stderr = clear("evaluate", "llama")
    assert code == 1
    assert stderr.startswith("error: evaluate llama: choose one of base, ")


def test_a_clear_error_is_one_line_and_other_errors_keep_their_trace(project, clear, fake_stage, monkeypatch):
    def refuse(config):
        raise ClearError("data/samples: row 3 is empty; remove it.")

    fake_stage("degrade", refuse)
    assert clear("degrade") == (1, "", "error: data/samples: row 3 is empty; remove it.\n")
    assert workspace.run_records() == {}

    fake_stage("degrade", lambda config: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["clear", "degrade"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize(
    ("arguments", "said"),
    {
        ("score", "M_B.tsv", "--json", "folder"): "folder: Is a directory; correct the path.",
        ("score", "M_B.tsv", "--json", "file/x.json"): "file: File exists; correct the path.",
        ("score", "M_B.tsv", "--rows", "folder"): "folder: Is a directory; correct the path.",
        ("score", "M_B.tsv", "--rows", "/dev/full"): "/dev/full: No space left on device; free some space there, then "
        "run the command again.",
        ("mmd-bench", "--source", "lmu", "--out", "file"): "file: File exists; correct the path.",
        ("mmd-bench", "--source", "lmu", "--out", "file/x"): "file/x: Not a directory; correct the path.",
        ("mmd-bench", "--source", "lmu", "--out", "/proc/x"): "/proc/x: No such file or directory; correct the path.",
    }.items(),
)
def test_what_the_system_refuses_is_one_line_with_the_path_whoever_meets_it(project, clear, arguments, said):
    (project / "folder").mkdir()
    (project / "lmu").mkdir()
    (project / "lmu/B.tsv").write_text("index\timage_path\tquestion\tanswer\n1\tx.png\tq\tx\n")
    (project / "file").write_text("")
    (project / "M_B.tsv").write_text("index\tquestion\tanswer\tprediction\n1\tq\tred\tred\n")
    code, _, stderr = clear(*arguments)
    assert code == 1 and stderr.startswith(f"error: {said}") and stderr.count("\n") == 1


def test_a_full_disk_is_named_with_the_file_and_a_library_s_own_error_keeps_its_trace():
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'") as full, naming("/dev/full"):
        Path("/dev/full").write_text("x")
    assert str(refusal(full.value)).startswith("/dev/full: No space left on device; free some space")
    assert str(refusal(OSError(28, "No space left on device"))).startswith("output: No space left on device; free")
    assert str(refusal(OSError(13, "Cannot open 'x'. Detail: y"))).startswith("Cannot open 'x': Permission denied;")
    assert refusal(OSError("damaged")) is None


def test_wrong_parameters_stop_a_stage_before_it_starts(project, clear, fake_stage):
    fake_stage("grpo", lambda config: pytest.fail("ran"))
    file = project / "params.yaml"
    file.write_text(file.read_text().replace("group_size: 8", "group_size: 1"))
    code, _, stderr = clear("grpo")
    assert code == 1
    assert "grpo.group_size = 1" in stderr and stderr.count("\n") == 1


def test_files_are_utf_8_whatever_the_locale_says(tmp_path):
    code = (
        "import sys; from clear import cli; cli.app.command('x')(lambda: open('it', 'w').write('\\u2713')); cli.main()"
    )
    places = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, "x"], cwd=tmp_path, env=os.environ | places, check=True)
    assert (tmp_path / "it").read_bytes().decode() == "✓"


def test_what_a_terminal_would_obey_is_printed_as_text(clear, tmp_path):
    """A name with control sequences could clear the screen, colour a refusal as a success, or rewrite its title."""
    name = tmp_path / "a\x1b[2J\x1b]0;title\x07b.png"
    status, _, stderr = clear("ask", name, "which colour ?")
    assert status == 1 and "\x1b" not in stderr and "\x07" not in stderr
    assert r"a\x1b[2J\x1b]0;title\x07b.png: no such file" in stderr and stderr.count("\n") == 1


def test_params_composes_and_refuses(tmp_path, clear, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert clear("params", "--set", "profile=smoke", "--set", "grpo.group_size=4")[0] == 0
    written = yaml.safe_load((tmp_path / "params.yaml").read_text())
    assert (written["profile"], written["grpo"]["group_size"]) == ("smoke", 4)
    before = (tmp_path / "params.yaml").read_text()
    code, _, stderr = clear("params", "--set", "grpo.group_size=1")
    assert code == 1 and "grpo.group_size" in stderr
    assert (tmp_path / "params.yaml").read_text() == before


def test_an_error_has_a_line_of_its_own_below_a_bar_that_it_has_left_open(capsys):
    bar = tqdm(total=3, file=sys.stderr)
    with pytest.raises(SystemExit):
        cli._refuse(ClearError("no"))
    assert bar.disable and capsys.readouterr().err.endswith("\nerror: no\n")


def test_parameters_are_replaced_whole_or_not_at_all(project, monkeypatch):
    before = (project / "params.yaml").read_bytes()

    def full(path: Path, text: str, **_) -> None:
        with path.open("w") as file:
            file.write(text[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_params(project / "params.yaml", ["seed=7"])
    assert (project / "params.yaml").read_bytes() == before and not list(project.glob("*.partial"))


def test_check_exits_with_one_on_drift(project, clear):
    assert clear("check") == (0, "dvc.lock, params.yaml, code and committed results agree.\n", "")
    (project / "code/source.txt").write_text("edited")
    code, stdout, stderr = clear("check")
    assert (code, stdout) == (1, "")
    assert "code/source.txt" in stderr and "1 drift found." in stderr
    (project / "dvc.lock").write_text("- broken")
    code, stdout, stderr = clear("check")
    assert (code, stdout) == (2, "") and "dvc.lock" in stderr, "cannot say"


def test_ask_prints_the_trace_and_saves_the_picture(project, clear, monkeypatch):
    from clear.data.images import decode_image

    picture = np.full((4, 5, 3), 7, np.uint8)
    asked = []

    def ask(image, question, model, restore, config):
        asked.append((image, question, model, restore, config.profile))
        shown = picture if restore == "always" else None
        return types.SimpleNamespace(trace="<think>…</think>", restored=shown is not None, answer="red", picture=shown)

    module = types.ModuleType("clear.reasoning.ask")
    module.ask = ask
    monkeypatch.setitem(sys.modules, module.__name__, module)
    Path("a.png").write_bytes(b"")
    Path("model").mkdir()
    arguments = ["ask", "a.png", "which colour?", "--model", "model", "--save", "out.png"]
    code, stdout, _ = clear(*arguments, "--restore", "always")
    assert code == 0
    assert "<think>…</think>" in stdout and "restored: yes" in stdout and "answer: red" in stdout
    assert (decode_image(Path("out.png").read_bytes()) == picture).all()
    assert asked == [(Path("a.png"), "which colour?", Path("model"), "always", "tiny")]
    assert "--restore always" in clear(*arguments)[2]
    assert "choose auto, always or never" in clear(*arguments, "--restore", "maybe")[2]
    assert "b.png: no such file" in clear("ask", "b.png", "?", "--model", "model")[2]
    assert "data/models/grpo: no model here" in clear("ask", "a.png", "?")[2]


def test_a_run_record_measures_this_process_and_its_children(project):
    with workspace.stage_run("degrade"):
        workspace.record_run("degrade", images_per_second=12.5)
        hog = "x = bytearray(150 * 2**20); x[::4096] = b'1' * len(x[::4096])"
        subprocess.run([sys.executable, "-c", hog], check=True)
        time.sleep(0.05)
    record = workspace.run_records()["degrade"]
    assert record["images_per_second"] == 12.5
    assert 0.05 < record["seconds"] < 20
    assert 0 < record["cpu_seconds"] < 20
    assert record["children_peak_mb"] > 150
    assert record["peak_mb"] > 20
    with workspace.stage_run("degrade"):
        pass
    assert "images_per_second" not in workspace.run_records()["degrade"], "a record belongs to one run"


def test_everything_private_lies_under_one_folder(project, tmp_path, monkeypatch):
    home = project / ".clear"
    assert (workspace.home(), workspace.profile()) == (home, "tiny")
    assert workspace.checkpoint_dir("sft") == home / "checkpoints/tiny/sft"
    assert workspace.report_dir() == project / "data/report/tiny"
    monkeypatch.setenv("CLEAR_HOME", str(tmp_path / "other/.clear"))
    assert workspace.checkpoint_dir("sft") == tmp_path / "other/.clear/checkpoints/tiny/sft"
    assert workspace.report_dir("smoke") == tmp_path / "other/data/report/smoke"
    git_sees = git(project, "status", "--porcelain")
    assert git_sees == ""


@pytest.mark.parametrize("text", ["", "profile: [", "profile: 3\n", "profile: ../x\n", "seed: 1\n"])
def test_a_profile_that_is_no_name_is_refused(tmp_path, text):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ClearError, match="make params"):
        workspace.profile(tmp_path)


def _metrics(high):
    levels = {"clean": 0.9, "low": 0.8, "mid": 0.7, "high": high}
    return json.dumps({"accuracy": levels, "average": 0.75, "call_rate": {"clean": 0.1, "high": 0.625}})


def test_results_show_the_committed_figures_where_they_differ(project, clear):
    base, grpo = (project / f"data/metrics/evaluate_{model}.json" for model in ("base", "grpo"))
    base.write_text(_metrics(0.5))
    grpo.write_text(_metrics(0.6))
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "results")
    code, same, _ = clear("results")
    assert code == 0
    assert "committed" not in same
    assert re.search(r"base +0\.900 +0\.800 +0\.700 +0\.500 +0\.750 +0\.100 +0\.625", same)
    assert "report: not rendered" in same

    grpo.write_text(_metrics(0.65))
    page = workspace.report_dir() / "index.html"
    page.write_text("")
    _, differing, _ = clear("results")
    lines = differing.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("grpo"))
    assert "0.650" in lines[place] and "committed" in lines[place + 1] and "0.600" in lines[place + 1]
    assert "1 of 2 models differ" in differing
    assert f"report: {page}" in differing


@pytest.mark.parametrize("content", ["15", "[]", "{"])
def test_an_evaluation_that_is_none_is_named(project, clear, content):
    (project / "data/metrics/evaluate_base.json").write_text(content)
    code, _, stderr = clear("results")
    assert code == 1 and "evaluate_base.json: not valid JSON" in stderr and "dvc repro" in stderr


def test_results_without_a_run_say_what_to_do(project, clear):
    (project / "data/metrics/evaluate_base.json").unlink()
    code, _, stderr = clear("results")
    assert code == 1 and "make repro" in stderr


@pytest.mark.parametrize("command", ["results", "results --markdown", "incoming list", "incoming list --json"])
def test_a_folder_that_is_no_workspace_is_named(tmp_path, clear, monkeypatch, command):
    """`results` advised hours of training, and `incoming list` found an empty project."""
    monkeypatch.chdir(tmp_path)
    status, stdout, stderr = clear(*command.split())
    assert (status, stdout) == (1, "")
    assert stderr.startswith(f"error: {tmp_path / 'params.yaml'} is not here; run this from the project's folder")
    assert len(stderr.splitlines()) == 1 and "make repro" not in stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_changes_no_verdict(tmp_path, closed):
    """Python then has none, and a traceback's status 1 means worse, or changed."""
    code, environment = f"{sys.executable} -m clear gate HEAD HEAD {closed}", os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == UNDECIDED and b"Traceback" not in done.stderr


def test_a_fault_of_the_program_is_no_judgement(project, clear, monkeypatch):
    from clear.project import check

    monkeypatch.setattr(check, "drifts", lambda root: 1 / 0)
    status, _, errors = clear("check")
    assert status == UNDECIDED and "ZeroDivisionError" in errors


def test_a_library_s_error_has_python_s_own_status_whatever_it_calls_status(project, fake_stage, monkeypatch):
    class Answered(Exception):
        status = 0

    def stage(config):
        raise Answered

    fake_stage("degrade", stage)
    monkeypatch.setattr(sys, "argv", ["clear", "degrade"])
    with pytest.raises(Answered):
        cli.main()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["watch"], UNDECIDED, "name a folder or s3://bucket/prefix to watch"),
        (["watch", ""], UNDECIDED, "name a folder or s3://bucket/prefix to watch"),
        (["watch", "x", "--calibrate"], UNDECIDED, "or give --calibrate alone"),
        (
            ["mmd-bench", "--source", ".", "--out", "o", "--scale", "0"],
            1,
            "--scale 0: a number above 0 and at most 100",
        ),
        (["mmd-bench", "--source", ".", "--out", "o", "--scale", "nan"], 1, "--scale nan: a number above 0"),
        (
            ["answer", "t.tsv", "--out", "o", "--endpoint", "x", "--name", "m"],
            1,
            "--endpoint x: must begin with http://",
        ),
        (["answer", "t.tsv", "--out", "o", "--model", "m", "--name", ".."], 1, "--name ..: files are called after it"),
        (
            ["answer", "t.tsv", "--out", "o", "--endpoint", "http://x", "--name", "m", "--key-from", "NIX"],
            1,
            "--key-from NIX: this environment variable is not set",
        ),
    ],
)
def test_options_are_refused_by_their_own_name(project, clear, arguments, status, said):
    Path("t.tsv").write_text("index\tquestion\n")
    found, out, errors = clear(*arguments)
    assert (found, out) == (status, "") and said in errors and errors.count("\n") == 1, errors


def test_parameters_that_are_no_text_are_one_line(tmp_path):
    (tmp_path / "params.yaml").write_bytes(b"profile: tiny # \xe4\n")
    with pytest.raises(ClearError, match="no readable key 'profile'"):
        workspace.profile(tmp_path)
