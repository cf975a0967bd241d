"""The Makefile, the installer and the CI script: each target is listed, each obstacle is one clear line."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

from clear.data.lock import lock_file, main, writer
from tests.conftest import ROOT

TARGETS = [
    "venv",
    "repro",
    "results",
    "ablations",
    "test",
    "test-all",
    "lint",
    "hashes",
    "format",
    "bench",
    "fuzz",
    "kill",
    "scale",
    "gpu",
    "plots",
    "experiments",
    "params",
    "check",
    "remote",
]
TARGETS += ["deploy", "prefect-local", "stack", "image", "clean"]


def _make(*arguments, cwd=ROOT, **environment):
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "VENV"))}
    return subprocess.run(["make", *arguments], cwd=cwd, capture_output=True, text=True, env=plain | environment)


def test_help_is_the_default_and_lists_every_target():
    shown = _make()
    assert shown.returncode == 0
    assert shown.stdout == _make("help").stdout
    listed = re.findall(r"^  make (\S+) +\S", shown.stdout, re.MULTILINE)
    assert sorted(listed) == sorted([*TARGETS, "help"])
    assert len(shown.stdout.splitlines()) == len(listed)


@pytest.mark.parametrize("target", [t for t in TARGETS if t != "clean"])
def test_every_target_installs_first_unless_an_environment_is_named(tmp_path, target):
    for name in ("Makefile", "pyproject.toml", "infra"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    assert "infra/install.sh .venv" in _make("--dry-run", target, cwd=tmp_path).stdout
    assert "install" not in _make("--dry-run", target, "VENV=/somewhere", cwd=tmp_path).stdout
    assert "install" not in _make("--dry-run", target, cwd=tmp_path, VENV="/somewhere").stdout


def test_commands_run_in_the_environment_without_telemetry(tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text() + "\nshow:\n\t@env\n")
    shown = dict(
        line.split("=", 1) for line in _make("show", "VENV=v", cwd=tmp_path).stdout.splitlines() if "=" in line
    )
    assert shown["PATH"].startswith(f"{tmp_path}/v/bin:")
    assert shown["CLEAR_HOME"] == f"{tmp_path}/.clear"
    assert shown["DO_NOT_TRACK"] == shown["DVC_NO_ANALYTICS"] == shown["HF_HUB_OFFLINE"] == "1"
    assert shown["PREFECT_SERVER_ANALYTICS_ENABLED"] == shown["GX_ANALYTICS_ENABLED"] == "false"


def test_clean_keeps_data_and_environment(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept, gone = ["data/models/a", ".venv/a", "data/metrics/a"], [".clear/a", "data/report/a", "clear/__pycache__/a"]
    for name in kept + gone:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert _make("clean", cwd=tmp_path).returncode == 0
    assert [name for name in kept + gone if (tmp_path / name).exists()] == kept


@pytest.mark.parametrize("folder", [".", ".clear/scratch", ".clear/scratch/retrain"])
def test_clean_refuses_while_a_run_holds_the_workspace_or_the_scratch_copies(tmp_path, folder):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "clear", tmp_path / "clear", ignore=shutil.ignore_patterns("__pycache__", "conf"))
    (tmp_path / ".clear").mkdir()
    (tmp_path / ".clear/checkpoint").write_text("")
    with writer(tmp_path / folder, label="flow run brave-otter"):
        refused = _make("clean", cwd=tmp_path)
        assert refused.returncode != 0
        line, *rest = refused.stderr.splitlines()
        assert line.startswith(f"error: {(tmp_path / folder).resolve()} is being written to by process {os.getpid()} ")
        assert "flow run brave-otter" in line and all(one.startswith("make: ***") for one in rest)
        assert (tmp_path / ".clear/checkpoint").exists() and lock_file(tmp_path / folder).exists()
    done = _make("clean", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and not (tmp_path / ".clear").exists()


def test_ci_runs_lint_and_test_and_stops_at_a_failure(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "Makefile").write_text("lint:\n\t@echo lint\ntest:\n\t@echo test; test ! -e broken\n")
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run([tmp_path / ".ci/run"], capture_output=True, text=True, env=plain)
    assert done.stdout == "lint\ntest\n"
    (tmp_path / "broken").write_text("")
    assert subprocess.run([tmp_path / ".ci/run"], capture_output=True).returncode != 0


FAKE_PYTHON = """#!/usr/bin/env bash
# Stands in for an interpreter: {version} decides the version check, {pip} whether pip can install.
case "$*" in
    "-c "*) {version} ;;
    "-m venv"*) mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python" ;;
    "-m pip"*) echo "$*" >> {log}; {pip} ;;
    --version) echo "Python 3.11.9" ;;
esac
"""


@pytest.fixture
def install(tmp_path):
    """Run infra/install.sh in a copy of the project with fake programs first on PATH."""
    shutil.copytree(ROOT / "infra", tmp_path / "infra")
    fakes = tmp_path / "fakes"
    fakes.mkdir()

    def run(version="exit 0", pip="exit 0", df=None):
        text = FAKE_PYTHON.format(version=version, pip=pip, log=tmp_path / "pip.log")
        for name in ("python3.11", "python3.12", "python3.13", "python3"):
            _program(fakes / name, text)
        if df is not None:
            _program(fakes / "df", f"#!/bin/sh\nprintf 'head\\n/dev/x 9 9 {df} 1%% /\\n'\n")
        environment = {**os.environ, "PATH": f"{fakes}:{os.environ['PATH']}"}
        environment.pop("PYTHON", None)
        command = [tmp_path / "infra/install.sh", ".venv"]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    return run


def _program(file: Path, text: str) -> None:
    file.write_text(text)
    file.chmod(0o755)


def _refused(done, *words):
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_an_installation_uses_the_lock_and_marks_itself_complete(install, tmp_path):
    assert install().returncode == 0
    assert (tmp_path / ".venv/.installed").exists()
    uv, packages, torch, project = (tmp_path / "pip.log").read_text().splitlines()
    assert uv.endswith("--require-hashes --no-deps -r .venv/uv.txt")
    first, *more = (tmp_path / ".venv/uv.txt").read_text().splitlines()
    assert first.startswith("uv==") and more and all("--hash=sha256:" in line for line in more)
    assert packages.endswith("--require-hashes --no-deps -r infra/hashes.txt"), "pip does it where uv cannot"
    assert torch.endswith("-c infra/constraints.txt torch==2.13.0")
    assert project.endswith("-c infra/constraints.txt -e .[dev]")


def test_no_suitable_python_is_one_line(install, tmp_path):
    _refused(install(version="exit 1"), "no Python 3.11 or newer")
    assert not (tmp_path / ".venv").exists()


def test_a_full_disk_is_one_line(install):
    _refused(install(df=50 * 1024), "only 50 MB are free", "4 GB")


def test_no_network_is_one_line_and_leaves_the_installation_incomplete(install, tmp_path):
    _refused(install(pip="echo 'Could not find a version' >&2; exit 1"), "no network", "install.log")
    assert not (tmp_path / ".venv/.installed").exists()
    assert "Could not find a version" in (tmp_path / ".venv/install.log").read_text()


def test_the_lock_pins_everything_and_names_no_host():
    lock = (ROOT / "infra/constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in lock
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lock if line and not line.startswith("#"))
    infra = (f"infra/{name}" for name in ("install.sh", "constraints.txt", "hashes.txt"))
    for name in ("Makefile", *infra, "pyproject.toml", ".ci/run"):
        assert "://" not in (ROOT / name).read_text(), name


def test_every_locked_package_has_hashes_but_torch():
    """Files of another content, whoever serves them, are not installed; `make hashes` follows an edit of the lock."""
    lock = [line for line in (ROOT / "infra/constraints.txt").read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"^#.*\n", "", (ROOT / "infra/hashes.txt").read_text(), flags=re.MULTILINE)
    entries = re.findall(r"^(\S+==\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n", text, re.MULTILINE)
    named = [line.split("==") for line in lock if not line.startswith("torch==")]
    assert {name for name, _ in entries} == {f"{re.sub('[._]', '-', name.lower())}=={v}" for name, v in named}
    assert "".join(f"{name}{hashes}\n" for name, hashes in entries) == text, "nothing else is in it"


def _plain(name):
    return re.match(r"[\w.-]+", name)[0].lower().replace("_", "-")


@pytest.fixture(scope="module")
def declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {_plain(line) for line in project["dependencies"] + project["optional-dependencies"]["dev"]}


def test_every_dependency_is_in_the_lock(declared):
    lock = (ROOT / "infra/constraints.txt").read_text().splitlines()
    assert declared <= {_plain(line) for line in lock}


def test_every_imported_package_is_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    declared = {_plain(line) for line in [*project["dependencies"], *chain.from_iterable(extras)]}
    owners = packages_distributions()
    for file in (*ROOT.glob("clear/**/*.py"), *ROOT.glob("flows/**/*.py"), *ROOT.glob("tests/**/*.py")):
        for module in re.findall(r"^\s*(?:import|from) (\w+)", file.read_text(), re.MULTILINE):
            own = module in sys.stdlib_module_names or (ROOT / module).is_dir()
            if not own and module in owners:
                assert {_plain(owner) for owner in owners[module]} & declared, f"{file}: {module}"


@pytest.mark.parametrize("arguments", [[], ["."], [".", "--"]])
def test_the_writer_without_a_command_says_how_it_is_called(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err == "usage: python -m clear.data.lock FOLDER … -- COMMAND …\n"


BENCHMARK = """
def bench_sum():
    return {"sum": {"value": 1.0, "unit": "ms", "baseline": 2.0, "ratio": 0.5}}

def bench_odd():
    return {"odd": {"value": 1.0}}
"""


def test_benchmarks_are_found_checked_and_written(tmp_path, capsys):
    from clear.errors import ClearError
    from tests.bench import run

    with pytest.raises(ClearError, match="no file bench_"):
        run.main(tmp_path)
    (tmp_path / "bench_a.py").write_text(BENCHMARK)
    output = tmp_path / "bench.json"
    run.main(tmp_path, ["sum"], output)
    assert not output.exists()  # a part is shown; figures of one run belong together
    assert "ratio 0.500" in capsys.readouterr().out
    with pytest.raises(ClearError, match="odd has the keys"):
        run.main(tmp_path, [], output)
    with pytest.raises(ClearError, match="no benchmark nothing; there are odd, sum"):
        run.main(tmp_path, ["nothing"], output)
    (tmp_path / "bench_a.py").write_text(BENCHMARK.split("def bench_odd")[0])
    run.main(tmp_path, [], output)
    assert json.loads(output.read_text())["rows"] == {
        "sum": {"value": 1.0, "unit": "ms", "baseline": 2.0, "ratio": 0.5}
    }
