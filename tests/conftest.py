"""Fixtures shared by all tests: a quiet environment and a small project under git and DVC."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

if "tests.helpers" not in sys.modules:  # imported a second time, as tests.conftest
    pytest.register_assert_rewrite(
        "tests.helpers", "tests.cloud"
    )  # their asserts show values, as those of test modules do

# On a machine that is busy with something else the first example may take a minute, which says nothing of the test.
# The suite tries the same examples every time, so that it says something of the change and not of luck; `make test-all`
# draws new ones (profile "search"), and what it finds becomes an `@example`.
_patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("search", **_patient)
settings.register_profile("suite", derandomize=True, **_patient)
settings.load_profile("suite")

# The same switches as in the Makefile, for a bare `pytest`; set before any library reads them.
for _name, _value in {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several workers: threads that wait for each other would stand idle
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun with `&`: what the tests start would not hear a Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


import dvc  # noqa: E402, F401 - its log goes where stderr is at its first import, which must not be one test's capture


def pytest_collection_modifyitems(items):
    """The longest test comes first: at the end one worker would be waited for while the others have nothing to do."""
    items.sort(key=lambda item: item.path.name != "test_smoke.py")


@pytest.fixture(autouse=True)
def _own_home(monkeypatch):
    # `make` exports CLEAR_HOME; a test must never write into the user's run records.
    monkeypatch.delenv("CLEAR_HOME", raising=False)


def git(folder: Path, *arguments: str) -> str:
    """Run git in `folder` as a made-up author and return its output."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, check=True)
    return done.stdout.decode(errors="replace")  # files may be of any bytes


STAGES = """
    stages:
      source:
        cmd: cp code/source.txt data/samples
        params: [seed, source]
        deps: [code/source.txt]
        outs: [data/samples]
      evaluate:
        cmd: mkdir -p data/metrics && wc -c < data/samples > data/metrics/evaluate_base.json
        params: [seed]
        deps: [code/lib, data/samples]
        metrics:
          - data/metrics/evaluate_base.json: {cache: false}
"""


@pytest.fixture(scope="session")
def _project(tmp_path_factory) -> Path:
    """A reproduced and committed project of two stages with this project's parameters; never changed by a test."""
    from dvc.repo import Repo

    from clear.project.scratch import write_params

    folder = tmp_path_factory.mktemp("project")
    git(folder, "init", "-q", "-b", "main")
    with Repo.init(str(folder)) as repo:
        (folder / "dvc.yaml").write_text(textwrap.dedent(STAGES))
        (folder / ".gitignore").write_text("/data/samples\n/.clear/\n/data/report/\n")
        write_params(folder / "params.yaml")
        for name in ("code/source.txt", "code/lib/a.txt", "data/README.md"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        before = Path.cwd()
        os.chdir(folder)
        try:
            repo.reproduce()
        finally:
            os.chdir(before)
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "a small project")
    return folder


@pytest.fixture
def project(_project, tmp_path, monkeypatch) -> Path:
    """A copy of the small project, which is also the working directory."""
    folder = tmp_path / "project"
    shutil.copytree(_project, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def clear(monkeypatch, capsys):
    """Run `clear …` in this process; gives (exit status, stdout, stderr)."""

    def call(*arguments):
        from clear import cli

        monkeypatch.setattr(sys, "argv", ["clear", *map(str, arguments)])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as end:
                cli.main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        return (end.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def golden():
    """Inputs and outputs of the reference implementation by name (tests/reference.py)."""
    from safetensors.torch import load_file

    from tests.reference import GOLDEN

    return load_file(GOLDEN / "cases.safetensors")


@pytest.fixture(scope="module")
def bagel():
    """The reference's model, autoencoder and (absent) tokenizer."""
    from clear.model.checkpoint import load_bagel
    from tests.reference import GOLDEN

    return load_bagel(GOLDEN)


@pytest.fixture(scope="module")
def model(bagel):
    return bagel[0]


@pytest.fixture(scope="module")
def config():
    """Parameters of a model for images of different sizes."""
    from tests.helpers.mixed_sizes import mixed_config

    return mixed_config()


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """Images of different sizes, encoded."""
    from tests.helpers.mixed_sizes import mixed_images

    return mixed_images()


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The working tree as it is now, committed in a repository of its own; no data, no cache."""
    from tests.helpers.scratch import committed_copy

    return committed_copy(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def first(clone, tmp_path_factory) -> Path:
    """CLEAR_HOME of an uninterrupted run with a cache and checkpoints of its own."""
    from tests.helpers.scratch import scratch_command

    home = tmp_path_factory.mktemp("first")
    command, environment = scratch_command(home)
    subprocess.run(command, cwd=clone, env=environment, check=True)
    return home
