"""The pipeline as DVC sees it: stages and code belong together, a scratch run leaves no trace."""

import ast
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import yaml

from clear.bench.models import MODELS
from clear.errors import ClearError
from clear.project.scratch import refresh, run
from clear.schema import Gate
from tests.conftest import ROOT, git
from tests.helpers.processes import run_dvc
from tests.helpers.stages import STAGES, entry_of, made_by

# Code that cannot change a result: it reports errors, finds folders, times runs, checks what is tracked as params.
NEUTRAL = {"clear/errors.py", "clear/data/workspace.py", "clear/config.py", "clear/schema.py"}

# Code that only shows what a stage does, with the random state put back: neither it nor what it imports is a
# dependency. tests/test_trackers.py holds the weights against those of a training that shows nothing.
SHOWING = {"clear/training/trackers.py", "clear/training/panel.py"}


def _folder_of_figures(stage: str) -> str:
    """`report` reads the whole folder of the others' figures and so keeps its own apart."""
    return "data/results" if stage == "report" else "data/metrics"


@cache  # the stages share most of their files
def _imports(file: Path) -> set[Path]:
    """The files of this project that a file imports, wherever in it (type checking aside)."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for path in (ROOT / name.replace(".", "/") for name in names if name.partition(".")[0] == "clear"):
            found |= {file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()}
    return found


def _code_of(stage: str) -> set[str]:
    """Every file of this project that a stage may load, by its imports."""
    todo, seen = [ROOT / "clear/stages" / f"{'sft' if stage == 'sft_direct' else stage}.py"], set()
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo += [found for found in _imports(file) if found.relative_to(ROOT).as_posix() not in SHOWING]
    names = {file.relative_to(ROOT).as_posix() for file in seen if file.stat().st_size}
    return names - NEUTRAL - {"clear/__init__.py"}


def _covers(dep: str, file: str) -> bool:
    return file == dep or file.startswith(f"{dep}/")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_exactly_the_code_it_imports(stage):
    deps = [dep for dep in entry_of(stage)["deps"] if dep.startswith("clear/")]
    code = _code_of(stage)
    undeclared = sorted(file for file in code if not any(_covers(dep, file) for dep in deps))
    written = {file.relative_to(ROOT).as_posix() for file in (ROOT / "clear").rglob("*.py") if file.stat().st_size}
    needless = sorted(file for file in written - code - NEUTRAL if any(_covers(dep, file) for dep in deps))
    assert (undeclared, needless) == ([], []), "a folder is named where all of it is used"


def test_the_list_of_models_is_the_same_wherever_it_cannot_be_imported():
    assert STAGES["evaluate"]["foreach"] == {name: folder for name, (folder, _, _) in MODELS.items()}
    assert (
        list(STAGES["evaluate"]["foreach"])
        == list(MODELS)
        == list(Gate.__dataclass_fields__["model"].metadata["values"])
    )


def test_stage_command_module_parameters_and_metrics_share_one_name():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name, stage in STAGES.items():
        argument = " ${key}" if name == "evaluate" else ""
        suffix = "_${key}" if name == "evaluate" else ""
        definition = stage.get("do", stage)
        assert definition["cmd"] == f"python -m clear {name}{argument}"
        made = [*definition["outs"], *definition.get("plots", [])]
        assert {f"{_folder_of_figures(name)}/{name}{suffix}.json": {"cache": False}} in made
        for key in definition["params"]:
            value = params
            for part in key.split("."):
                value = value[part]
        section = "sft" if name == "sft_direct" else name
        assert any(key.partition(".")[0] == section for key in definition["params"])


def test_the_committed_baseline_took_as_many_steps_as_clear():
    """What `dvc commit` could seal without a training: the steps of one model follow from parameters of others."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    own = [params["sft"][phase]["steps"] for phase in ("restoration", "traces")]
    later = [params["bridge"][phase]["steps"] for phase in ("distill", "answer", "decide")] + [params["grpo"]["steps"]]
    trained = {
        name: json.loads((ROOT / f"data/metrics/{name}.json").read_text())["steps"]
        for name in ("sft", "sft_direct", "grpo")
    }
    assert trained == {"sft": sum(own), "sft_direct": sum(own + later), "grpo": params["grpo"]["steps"]}


def test_nothing_trains_on_data_that_failed_validation():
    """Every stage that trains or evaluates stands behind `validate` in the graph; only `base` may precede it."""
    upstream = {}
    outputs = {}
    for name, stage in STAGES.items():
        definition = stage.get("do", stage)
        for out in (one for kind in ("outs", "metrics", "plots") for one in definition.get(kind, [])):
            outputs[out if isinstance(out, str) else next(iter(out))] = name
    for name in STAGES:
        deps = entry_of(name)["deps"]
        upstream[name] = {stage for out, stage in outputs.items() if any(_covers(dep, out) for dep in deps)} - {name}
    for name in ("traces", "sft", "sft_direct", "bridge", "grpo", "evaluate", "report"):
        behind, todo = set(), [name]
        while todo:
            for other in upstream[todo.pop()] - behind:
                behind.add(other)
                todo.append(other)
        assert "validate" in behind, name


MAY_OPEN_BENCH = {
    "source": "makes the split",
    "mmd_bench": "makes the benchmark",
    "degrade": "looks up hashes, so that no picture of data/incoming that is in the benchmark is taught",
    "validate": "checks it, and that no image of it is in another split",
    "evaluate": "answers it, after every choice is made",
    "report": "shows pictures of it beside the figures",
}
"""Who may read data/samples/bench and data/bench, and why; whatever chooses a recipe reads data/development."""


def _names_of_bench(file: Path) -> list[str]:
    """Where the code of a file names the benchmark's folders: as a path, or as a part that a path is made of."""
    tree = ast.parse(file.read_text())
    nodes = [*ast.walk(tree)]
    told = {id(n.value) for n in nodes if isinstance(n, ast.Expr)}  # docstrings
    parts = {id(n.right) for n in nodes if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Div)}
    parts |= {id(one) for n in nodes if isinstance(n, ast.Tuple | ast.List | ast.Set) for one in n.elts}
    parts |= {
        id(one)
        for n in nodes
        if isinstance(n, ast.Call)
        and getattr(n.func, "attr", getattr(n.func, "id", "")) in ("Path", "joinpath", "join")
        for one in n.args
    }
    texts = [n for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in told]
    return [
        f"{file.relative_to(ROOT)}:{n.lineno}"
        for n in texts
        if re.search(r"(data|samples)/bench\b", n.value) or (n.value == "bench" and id(n) in parts)
    ]


def test_no_stage_before_evaluation_reads_the_benchmark():
    """By the graph, and by the code of the stages, shared modules included."""
    reading = {
        name
        for name in STAGES
        if any(dep.startswith(("data/bench", "data/samples/bench")) for dep in entry_of(name)["deps"])
    }
    assert reading == set(MAY_OPEN_BENCH) - {"source"}
    code = set().union(*(_code_of(name) for name in STAGES if name not in MAY_OPEN_BENCH))
    assert {"clear/training/rl/grpo.py", "clear/stages/traces.py"} <= code
    assert [place for file in sorted(code) for place in _names_of_bench(ROOT / file)] == []


def test_what_compares_recipes_reads_the_development_split_and_never_the_benchmark():
    scripts = sorted((ROOT / "tests/bench").glob("*.py"))
    assert [place for file in scripts for place in _names_of_bench(file)] == []
    for name in ("bridge_ablation", "image_term"):
        assert "data/development" in (ROOT / f"tests/bench/{name}.py").read_text(), name
    assert _names_of_bench(ROOT / "clear/stages/mmd_bench.py"), "what opens the benchmark is found"


def _hash_of(content: bytes) -> str:
    digest = hashlib.md5(content).hexdigest()
    return f"{digest[:2]}/{digest[2:]}"


def test_a_scratch_run_changes_nothing_but_its_own_folder(project, monkeypatch):
    (project / "code/source.txt").write_text("uncommitted")
    (project / "code/lib/untracked.txt").write_text("untracked")
    before, lock = git(project, "status", "--porcelain"), (project / "dvc.lock").read_bytes()
    folder = run(Path(), "smoke")
    assert folder == project / ".clear/scratch/smoke"
    assert yaml.safe_load((folder / "params.yaml").read_text())["profile"] == "smoke"
    assert (folder / "data/samples").read_text() == "uncommitted"
    assert (folder / "code/lib/untracked.txt").exists()
    assert json.loads((folder / "data/metrics/evaluate_base.json").read_text()) == len("uncommitted")
    assert git(project, "status", "--porcelain") == before
    assert (project / "dvc.lock").read_bytes() == lock
    assert (project / "data/samples").read_text() == "code/source.txt"

    assert (project / ".dvc/cache/files/md5" / _hash_of(b"uncommitted")).exists(), "the cache is shared"

    (project / "code/lib/untracked.txt").unlink()
    made = (folder / "data/samples").stat().st_mtime_ns
    run(Path(), "smoke", ["grpo.steps=2"])
    assert not (folder / "code/lib/untracked.txt").exists()
    assert (folder / "data/samples").stat().st_mtime_ns == made, "what is up to date is not run again"
    assert yaml.safe_load((folder / "params.yaml").read_text())["grpo"]["steps"] == 2


@pytest.mark.slow
def test_a_scratch_run_of_targets_begins_with_what_the_workspace_has_made(project, capfd):
    profile = yaml.safe_load((project / "params.yaml").read_text())["profile"]
    (project / "code/lib/b.txt").write_text("code of evaluate alone")
    (project / "data/raw").mkdir()
    (project / "data/raw/.gitkeep").touch()  # in git and the user's own: linked to, not copied onto itself
    folder = run(Path(), profile, name="changed", targets=["evaluate"])
    said = capfd.readouterr().out
    assert "Stage 'source' didn't change, skipping" in said and "Running stage 'evaluate'" in said
    assert (folder / "data/samples").read_text() == "code/source.txt" and (folder / "data/raw").is_symlink()
    run(Path(), profile, name="changed", targets=["evaluate"])
    assert "Running" not in capfd.readouterr().out, "a second run begins with what the first has made"
    (folder / "data/samples").unlink()  # it comes from the cache; what git keeps comes from the copy
    further = run(Path(), profile, name="further", targets=["evaluate"], begin=folder)
    assert "Running" not in capfd.readouterr().out, "nor has a copy of the copy anything to do"
    assert (further / "data/metrics/evaluate_base.json").exists() and (further / "data/samples").exists()
    shutil.rmtree(folder)
    shutil.rmtree(project / ".dvc/cache")
    with pytest.raises(ClearError, match=r"not all that dvc\.lock names is in the cache"):
        run(Path(), profile, name="changed", targets=["evaluate"])


def test_a_scratch_run_that_cannot_start_or_fails_is_refused(project, tmp_path):
    with pytest.raises(ClearError, match="not one of smoke, tiny"):
        run(Path(), "huge")
    with pytest.raises(ClearError, match="no_such"):
        run(Path(), "smoke", ["no_such=1"])
    (project / "code/source.txt").unlink()
    with pytest.raises(ClearError, match="continues where it stopped"):
        run(Path(), "smoke")
    shutil.rmtree(project / ".git")
    with pytest.raises(ClearError, match="git clone"):
        refresh(project, tmp_path / "copy")
    with pytest.raises(ClearError, match="no DVC project"):
        refresh(tmp_path, tmp_path / "copy")


def test_copies_in_a_home_that_git_does_not_ignore_do_not_copy_themselves(project, monkeypatch):
    monkeypatch.setenv("CLEAR_HOME", str(project / "home"))
    for _ in range(2):
        refresh(project, project / "home/scratch/smoke")
    assert (project / "home/scratch/smoke/dvc.yaml").exists()
    assert not (project / "home/scratch/smoke/home").exists()


@pytest.mark.parametrize("begun", ["at a terminal", "in the background"])
def test_an_interrupted_scratch_run_ends_its_stage_too(project, begun):
    """In the background of a script SIGINT is ignored, by whatever is started there, too."""
    stages = "stages:\n  source:\n    cmd: echo $$ > pid && exec sleep 60\n"
    (project / "dvc.yaml").write_text(stages)
    command = [sys.executable, "-m", "clear", "scratch", "smoke"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pid = project / ".clear/scratch/smoke/pid"
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN if begun == "in the background" else before)
    try:
        started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        signal.signal(signal.SIGINT, before)
    with started as process:
        while not (pid.exists() and pid.read_text()):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted; run the same command again" in stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


TRAINING = ("base", "sft", "sft_direct", "bridge", "grpo")
FAKE_STAGE = """
import pathlib, sys
pathlib.Path("ran").open("a").write("x")
for name in sys.argv[1:]:
    path = pathlib.Path(name) if "." in name else pathlib.Path(name, "weights")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("step,loss\\n1,2\\n" if path.suffix == ".csv" else '{"a": 1}')
"""


@pytest.mark.parametrize("stage", TRAINING)
def test_dvc_keeps_a_training_in_its_run_cache(stage):
    """It does so only if every output without a cache of DVC's own is a metric or a plot."""
    plain = [one for one in entry_of(stage)["outs"] if isinstance(one, dict)]
    assert not [one for one in plain if next(iter(one.values())).get("cache") is False]
    assert f"data/metrics/{stage}.json" in made_by(stage) and f"data/plots/{stage}.csv" in made_by(stage)


def test_a_training_that_was_done_before_is_restored_and_not_repeated(project):
    """The outputs of a stage as dvc.yaml declares them, with a command that takes no time."""
    definition = {key: entry_of("base")[key] for key in ("outs", "plots")}
    command = f"python code/train.py {' '.join(made_by('base'))}"
    stage = definition | {"cmd": command, "deps": ["code/train.py", "code/source.txt"]}
    (project / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"base": stage}}))
    (project / "code/train.py").write_text(FAKE_STAGE)
    (project / "dvc.lock").unlink()
    (project / ".gitignore").write_text("/data/models/\n/ran\n")
    run_dvc(project, "repro", "-q")
    lock, files = (project / "dvc.lock").read_bytes(), [project / name for name in made_by("base")]
    made = [file.read_bytes() for file in files if file.is_file()]
    (project / "code/source.txt").write_text("another input")
    run_dvc(project, "repro", "-q")
    assert (project / "ran").read_text() == "xx" and (project / "dvc.lock").read_bytes() != lock
    (project / "code/source.txt").write_text("code/source.txt")
    for file in files:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    assert "is cached - skipping run" in run_dvc(project, "repro")
    assert (project / "ran").read_text() == "xx" and (project / "dvc.lock").read_bytes() == lock
    assert [file.read_bytes() for file in files if file.is_file()] == made and files[0].is_dir()
