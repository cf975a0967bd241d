"""Trackers show a training and change nothing of it; what they wrote is read back with their own libraries."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from clear.config import compose, from_dict
from clear.data.records import write_samples
from clear.degradation.build import degraded_samples
from clear.errors import ClearError
from clear.project.scratch import write_params
from clear.schema import Phase, Runtime
from clear.sources.scenes.render import scenes
from clear.stages import bridge
from clear.training import trackers
from clear.training.load import incoming
from clear.training.loop.run import StageRun
from clear.training.loop.trainer import optimise
from clear.training.panel import panel
from tests.conftest import ROOT, git
from tests.helpers.bridging import CELL, bridge_workspace
from tests.helpers.processes import wait_until
from tests.tiny import save_random_model

SETTINGS = ["profile=smoke", "runtime.checkpoint_every=4", "runtime.device=cpu", "runtime.log_every=2"]
STEPS = 8


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    """A workspace of the smoke profile in the working directory, with no service named in the environment."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "DVCLIVE_", "DVC_EXP_", "DVC_ROOT")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path / "params.yaml", ["profile=smoke"])
    return tmp_path


def _picture():
    from PIL import Image

    torch.rand(3)  # a panel may draw; the training must not notice
    return Image.new("RGB", (6, 4), (255, 0, 0))


def _train(folder: Path, names=(), draw=_picture, every: int = 3, stop_after: int = 0) -> tuple[bytes, list]:
    """Train a small module whose loss draws random numbers; the bytes of its weights, and the curve."""
    config = from_dict(compose([*SETTINGS, f"runtime.trackers=[{','.join(names)}]", f"runtime.panel_every={every}"]))
    torch.manual_seed(7)
    module = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    data, calls = torch.randn(40, 5), 0

    def loss(index):
        nonlocal calls
        calls += 1
        if calls > stop_after > 0:
            raise KeyboardInterrupt
        x = data[index]
        return (module(x + 0.1 * torch.randn_like(x)) - x.sum(1, keepdim=True)).pow(2).mean(), {"ce": float(x.mean())}

    run = StageRun("sft", config, [], folder)
    run.panel = draw
    optimise(run, "traces", module, loss, len(data), Phase(steps=STEPS, batch=4, lr=0.01, warmup=2))
    return b"".join(p.detach().numpy().tobytes() for p in module.parameters()), run.curve


@pytest.fixture
def plain(tmp_path):
    """What a training that shows nothing ends with."""
    return _train(tmp_path / "plain")


def _package(name: str) -> None:
    pytest.importorskip(name, reason=f"the extra '{name}' is not installed")


def _scalars(metrics: dict) -> None:
    assert {"loss", "ce", "learning_rate", "grad_norm", "seconds/compute", "seconds/optimiser", "seconds/panel"} <= set(
        metrics
    )


def _project(folder: Path) -> None:
    """A project of DVC with what this one says of the training in progress."""
    git(folder, "init", "-q", "-b", "main")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=folder, check=True)
    for name in (".gitignore", ".dvcignore", "dvclive/.gitkeep", "data/dvc.yaml"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    told = yaml.safe_load((folder / "data/dvc.yaml").read_text())
    (folder / "data/dvc.yaml").write_text(yaml.safe_dump({"metrics": told["metrics"]}))  # its plots are of other files
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "start")


def _show(folder: Path) -> list[dict]:
    """What `dvc exp show` says, the workspace first; it must warn of nothing."""
    asked = [sys.executable, "-m", "dvc", "exp", "show", "--json"]
    shown = subprocess.run(asked, cwd=folder, capture_output=True, text=True, check=True)
    assert "WARNING" not in shown.stderr + shown.stdout
    return json.loads(shown.stdout)


def test_dvclive_is_read_by_dvc_and_changes_nothing(tmp_path, plain):
    _project(tmp_path)
    assert _show(tmp_path)[0]["data"]["metrics"] == {}, "no training, and no word about it"
    assert _train(tmp_path / "shown", ["dvclive"]) == plain
    found = _show(tmp_path)[0]["data"]["metrics"]["dvclive/metrics.json"]["data"]
    _scalars(found["sft"]["traces"] | {f"seconds/{k}": v for k, v in found["sft"]["traces"]["seconds"].items()})
    assert found["step"] == STEPS
    assert len(found["sft"]["traces"]) <= 8, "few columns: no argument of the Trainer is among them"
    assert [p.name for p in sorted(Path("dvclive/plots/images/sft/traces").iterdir())] == ["3.png", "6.png", "8.png"]
    assert git(tmp_path, "status", "--porcelain", "dvclive", "dvc.yaml", "data") == "", (
        "no commit and no lock can hold it"
    )
    assert git(tmp_path, "for-each-ref", "refs/exps") == "", "DVCLive has made no experiment of its own"


_STAGE = """
import time
from pathlib import Path
from tests.test_trackers import _picture, _train
def wait():
    Path({0!r}).touch()
    while not Path({1!r}).exists():
        time.sleep(0.05)
    return _picture()
_train(Path("run"), ["dvclive"], wait)
"""


@pytest.mark.slow
@pytest.mark.parametrize("aside", [[], ["--temp"]])
def test_a_running_experiment_shows_its_figures_in_dvc(tmp_path, monkeypatch, aside):
    """In the workspace, and in a copy aside, which DVC looks into while it runs."""
    reached, go = tmp_path / ".dvc/tmp/reached", tmp_path / ".dvc/tmp/go"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "train.py").write_text(_STAGE.format(str(reached), str(go)))
    (tmp_path / "dvc.yaml").write_text("stages: {sft: {cmd: python train.py, deps: [train.py], outs: [run]}}")
    _project(tmp_path)
    running = subprocess.Popen([sys.executable, "-m", "dvc", "exp", "run", *aside], cwd=tmp_path)
    try:
        wait_until(reached.exists, 120, "the panel of step 3")
        rows = _show(tmp_path)
        own = rows[0] if not aside else rows[1]["experiments"][0]["revs"][0]
        state = rows[0]["experiments"] if not aside else rows[1]["experiments"][0]["executor"]["state"]
        found = own["data"]["metrics"]["dvclive/metrics.json"]["data"]
    finally:
        go.touch()
        assert running.wait(120) == 0
    assert state == (None if not aside else "running") and found["step"] == 2 and found["sft"]["traces"]["loss"] > 0
    ended = _show(tmp_path)[1]["experiments"][0]["revs"][0]["data"]["metrics"]
    assert ended == {}, "its commit holds no clock"


def test_tensorboards_event_files_hold_figures_and_panels(tmp_path, plain):
    _package("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert _train(tmp_path / "shown", ["tensorboard"]) == plain
    events = EventAccumulator(".clear/trackers/smoke/tensorboard/sft/traces").Reload()
    _scalars(dict.fromkeys(events.Tags()["scalars"]))
    losses = [(e.step, e.value) for e in events.Scalars("loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in plain[1]]
    images = events.Images("panel")
    assert [(e.step, e.width, e.height) for e in images] == [(3, 6, 4), (6, 6, 4), (8, 6, 4)]


def test_mlflows_local_store_holds_figures_and_panels(tmp_path, plain):
    _package("mlflow")
    from mlflow.tracking import MlflowClient

    assert _train(tmp_path / "shown", ["mlflow"]) == plain
    client = MlflowClient(f"sqlite:///{tmp_path}/.clear/trackers/smoke/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("clear").experiment_id])
    assert (run.info.status, run.data.tags["stage"], run.data.tags["profile"]) == ("FINISHED", "sft", "smoke")
    _scalars(run.data.metrics)
    losses = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in plain[1]]
    panels = [artifact.path for artifact in client.list_artifacts(run.info.run_id, "panel")]
    assert panels == [f"panel/{step:06d}.png" for step in (3, 6, 8)]


def test_weights_and_biases_runs_offline_without_a_key(tmp_path, plain):
    _package("wandb")
    assert _train(tmp_path / "shown", ["wandb"]) == plain
    (run,) = (tmp_path / ".clear/trackers/smoke/wandb/wandb").glob("offline-run-*")
    (record,) = run.glob("*.wandb")
    content = record.read_bytes()
    assert all(name.encode() in content for name in ("loss", "grad_norm", "seconds/optimiser", "panel"))
    assert len(list((run / "files/media/images").glob("panel_*.png"))) == 3


@pytest.mark.parametrize("name", ["dvclive", "tensorboard"])
def test_a_training_that_is_killed_resumes_to_the_same_bytes_with_a_tracker(tmp_path, plain, name):
    _package(name)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "shown", [name], stop_after=6)
    assert _train(tmp_path / "shown", [name]) == plain


def test_a_tracker_without_its_package_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ClearError, match=r"runtime\.trackers names wandb.*'\.\[wandb\]'"):
        _train(tmp_path / "shown", ["wandb"])
    assert not (tmp_path / "shown").exists()


def test_the_trackers_that_may_be_named_are_those_there_are():
    (field,) = (f for f in fields(Runtime) if f.name == "trackers")
    assert sorted(field.metadata["values"]) == sorted(trackers.TRACKERS)


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ClearError, match=r"runtime\.trackers = 'tensorbord' is not one of dvclive, tensorboard"):
        from_dict(compose(["runtime.trackers=[dvclive,tensorbord]"]))


class _Broken:
    def __init__(self, *_) -> None:
        self.told = 0

    def figures(self, step, values) -> None:
        self.told += 1
        if self.told == 2:
            raise OSError("disk\nfull")

    def picture(self, step, image) -> None: ...

    def end(self) -> None:
        raise AssertionError("it was dropped")


def test_a_tracker_that_fails_in_mid_run_is_one_warning(tmp_path, plain, monkeypatch, capsys):
    monkeypatch.setitem(trackers.TRACKERS, "dvclive", _Broken)
    assert _train(tmp_path / "shown", ["dvclive"]) == plain
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: tracker dvclive failed and is off, the training goes on: disk full"]


def test_a_server_that_is_down_is_one_warning(tmp_path, plain, monkeypatch, capsys):
    _package("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert _train(tmp_path / "shown", ["mlflow"]) == plain
    assert capsys.readouterr().err.count("warning: tracker mlflow failed") == 1


def test_a_panel_that_fails_is_one_warning_and_the_figures_go_on(tmp_path, plain, capsys):
    def broken():
        raise RuntimeError("no picture")

    assert _train(tmp_path / "shown", ["dvclive"], draw=broken) == plain
    assert capsys.readouterr().err.count("warning: the panel of held-out pictures failed") == 1
    assert json.loads(Path("dvclive/metrics.json").read_text())["step"] == STEPS


def test_no_stage_tracks_what_trackers_write_or_reruns_for_them():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert not [s for s in stages.values() if any(word in json.dumps(s) for word in ("dvclive", "trackers", "panel"))]
    for folder in ("dvclive/metrics.json", ".clear/trackers/tiny/tensorboard/x"):
        assert subprocess.run(["git", "check-ignore", "-q", folder], cwd=ROOT).returncode == 0


def _hold_out(folder: Path) -> None:
    clean = scenes("validation", 4, 6, 256, 4)
    write_samples(folder / "data/degraded/validation", degraded_samples(((s, *CELL) for s in clean), 0.4, workers=1))


@pytest.mark.slow
def test_a_stage_ends_with_the_same_files_whether_it_is_shown_or_not(tmp_path, monkeypatch):
    """Real panels between the steps of a real model with an adapter, whose dropout draws numbers."""
    files = []
    for name, names in (("plain", ""), ("shown", "dvclive")):
        overrides = ["profile=smoke", "lora.rank=2", "lora.dropout=0.1", "runtime.device=cpu"]
        overrides += [f"runtime.trackers=[{names}]", "runtime.panel_every=4", "sampling.max_think_tokens=3"]
        bridge_workspace(tmp_path / name, overrides)
        _hold_out(tmp_path / name)
        monkeypatch.chdir(tmp_path / name)
        bridge.run(from_dict(compose(overrides)))
        left = [*sorted(Path("data/models/bridge").glob("*")), Path("data/plots/bridge.csv")]
        files.append({file.name: file.read_bytes() for file in [*left, Path("data/metrics/bridge.json")]})
    assert files[0] == files[1] and any(name.endswith(".safetensors") for name in files[0])
    assert not (tmp_path / "plain/dvclive").exists()
    assert len(list((tmp_path / "shown/dvclive/plots/images/bridge/decide").iterdir())) == 3


def test_the_panel_shows_held_out_pictures_and_leaves_the_model_as_it_was(tmp_path):
    config = from_dict(compose([*SETTINGS, "sampling.max_think_tokens=3"]))
    save_random_model(tmp_path / "model", config)
    start = incoming(tmp_path / "model", config)
    assert panel(start, config) is None, "without held-out pictures there is no panel"
    _hold_out(tmp_path)
    start.model.train()
    frozen = next(iter(start.model.children())).eval()
    before = {name: value.clone() for name, value in start.model.state_dict().items()}
    draw = panel(start, config, feedback="reencode")
    state = torch.get_rng_state()
    with trackers.same_random_state():
        image, again = draw(), draw()
    assert torch.equal(torch.get_rng_state(), state)
    assert image.tobytes() == again.tobytes()
    assert image.mode == "RGB" and image.height >= 2 * 160
    cells = [image.crop((column * 160, 0, column * 160 + 48, 48)).getcolors(10**6) for column in range(3)]
    assert all(len(colours) > 1 for colours in cells), "clean, degraded, restored: none is blank"
    assert cells[0] != cells[1] != cells[2]
    assert start.model.training and not frozen.training
    assert all(torch.equal(value, before[name]) for name, value in start.model.state_dict().items())
