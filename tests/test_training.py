"""Optimisation resumes exactly, and training moves what it should and nothing else."""

import os
import signal
import tracemalloc
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from clear.config import compose, from_dict
from clear.errors import ClearError
from clear.model.bagel import FROZEN, GENERATION
from clear.reasoning.answering import Answerer
from clear.schema import Phase
from clear.training.load import incoming
from clear.training.loop import run as running
from clear.training.loop import trainer
from clear.training.loop.run import StageRun
from clear.training.loop.saved import last_complete
from clear.training.loop.trainer import optimise
from clear.training.sft import set_trainable
from tests.conftest import ROOT
from tests.tiny import tiny_model

PHASE = Phase(steps=12, batch=4, lr=0.01, warmup=2)


class Interrupted(Exception):
    """Stands for the kill of the process."""


@pytest.fixture
def config():
    return from_dict(
        compose(["profile=smoke", "runtime.checkpoint_every=3", "runtime.device=cpu", "runtime.log_every=1"])
    )


def _train(
    config, folder: Path, stop_after: int | None = None, leave_at: int = 0, twice: bool = False
) -> tuple[torch.Tensor, list]:
    torch.manual_seed(7)
    module = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    data = torch.randn(40, 5)
    calls = 0

    def loss(index):
        nonlocal calls
        calls += 1
        if stop_after is not None and calls > stop_after:
            raise Interrupted
        if calls == leave_at:
            for _ in range(1 + twice):
                os.kill(os.getpid(), signal.SIGTERM)
        x = data[index]
        return (module(x + 0.1 * torch.randn_like(x)) - x.sum(1, keepdim=True)).pow(2).mean(), {"figure": float(calls)}

    inputs = folder.parent / "input.txt"
    inputs.write_text("data")
    run = StageRun("test", config, [inputs], folder)
    try:
        optimise(run, "phase", module, loss, len(data), PHASE)
    finally:
        optimise_state = torch.cat([p.detach().flatten() for p in module.parameters()])
    return optimise_state, run.curve


@pytest.mark.parametrize("stop", [1, 4, 7, 11])
def test_an_interrupted_run_ends_with_the_same_weights(config, tmp_path, stop):
    expected, curve = _train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        _train(config, tmp_path / "killed", stop_after=stop)
    found, again = _train(config, tmp_path / "killed")
    assert torch.equal(found, expected)
    assert [row["loss"] for row in again] == [row["loss"] for row in curve]


def test_a_run_that_is_killed_while_it_removes_its_checkpoints_leaves_none(config, tmp_path, monkeypatch):
    """A half of one called itself complete, and every repetition ended at what it lacked."""
    (tmp_path / "input.txt").write_text("data")
    stage = StageRun("test", config, [tmp_path / "input.txt"], tmp_path / "runs")
    checkpoint = stage.folder / "phase/checkpoint-3"
    checkpoint.mkdir(parents=True)
    for name in ("complete", "rng_state.pth"):
        (checkpoint / name).touch()

    def killed(folder, **_):
        next(Path(folder).rglob("rng_state.pth")).unlink()
        raise Interrupted

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(running.shutil, "rmtree", lambda folder, **how: killed(folder) if folder.exists() else None)
        stage.finish(tmp_path / "curve.csv")
    again = StageRun("test", config, [tmp_path / "input.txt"], tmp_path / "runs")
    assert again.folder == stage.folder and last_complete(again.folder / "phase") is None
    assert [*(tmp_path / "runs").iterdir()] == [again.folder]


@pytest.mark.parametrize("step", [5, 8, PHASE.steps])
def test_a_run_that_is_asked_to_leave_saves_first_and_ends_with_the_same_weights_and_curve(tmp_path, step):
    settings = ["profile=smoke", "runtime.checkpoint_every=100", "runtime.device=cpu", "runtime.log_every=4"]
    config = from_dict(compose(settings))
    expected, curve = _train(config, tmp_path / "whole")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        _train(config, tmp_path / "left", leave_at=step)
    assert signal.getsignal(signal.SIGTERM) is handler
    left = [path.name for path in (tmp_path / "left").glob("*/phase*") for path in [*path.glob("*"), path]]
    assert (f"checkpoint-{step}" in left) == (step < PHASE.steps) == ("phase.safetensors" not in left)
    found, again = _train(config, tmp_path / "left", stop_after=PHASE.steps - step)
    assert torch.equal(found, expected)
    assert [row["loss"] for row in again] == [row["loss"] for row in curve]


def test_a_kill_between_the_last_step_and_the_end_of_a_phase_changes_nothing(config, tmp_path, monkeypatch):
    expected, curve = _train(config, tmp_path / "whole")
    with monkeypatch.context() as broken:
        broken.setattr(trainer, "_unshard", lambda module: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            _train(config, tmp_path / "killed")
    found, again = _train(config, tmp_path / "killed")
    assert torch.equal(found, expected)
    assert [row["loss"] for row in again] == [row["loss"] for row in curve]


def test_a_curve_has_the_last_steps_too_where_the_interval_does_not_divide_them(tmp_path):
    every = ["profile=smoke", "runtime.checkpoint_every=100", "runtime.device=cpu"]
    weights, single = _train(from_dict(compose([*every, "runtime.log_every=1"])), tmp_path / "single")
    found, curve = _train(from_dict(compose([*every, "runtime.log_every=5"])), tmp_path / "fives")
    assert torch.equal(found, weights)
    assert [row["step"] for row in curve] == [5, 10, 12]
    last = [row["loss"] for row in single[10:]]
    assert curve[-1]["loss"] == pytest.approx(sum(last) / len(last), abs=1e-4)


def test_a_second_request_to_leave_is_obeyed_at_once(config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _train(config, tmp_path / "left", leave_at=5, twice=True)
    assert [path.name for path in (tmp_path / "left").glob("*/phase/checkpoint-*")] == ["checkpoint-3"]


def test_a_finished_phase_is_not_repeated(config, tmp_path):
    expected, _ = _train(config, tmp_path / "run")
    found, curve = _train(config, tmp_path / "run", stop_after=0)
    assert torch.equal(found, expected) and len(curve) == PHASE.steps


def test_an_incomplete_checkpoint_is_ignored(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "complete").touch()
    (tmp_path / "checkpoint-6").mkdir()
    assert last_complete(tmp_path) == tmp_path / "checkpoint-3"
    assert not (tmp_path / "checkpoint-6").exists()


def test_other_inputs_or_parameters_get_another_folder(config, tmp_path):
    file = tmp_path / "input.txt"
    file.write_text("one")
    first = StageRun("s", config, [file], tmp_path / "runs").folder
    file.write_text("two")
    second = StageRun("s", config, [file], tmp_path / "runs").folder
    config.sft.ce_weight = 0.5
    third = StageRun("s", config, [file], tmp_path / "runs").folder
    assert len({first, second, third}) == 3


def test_an_input_is_never_whole_in_memory(config, tmp_path):
    """Every input was read into memory to be hashed; the weights of the full model are 29 GB."""
    with (tmp_path / "weights").open("wb") as file:
        file.truncate(2**28)
    tracemalloc.start()
    try:
        first = StageRun("s", config, [tmp_path / "weights"], tmp_path / "runs").folder
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    with (tmp_path / "weights").open("r+b") as file:
        file.seek(2**27)
        file.write(b"1")
    assert StageRun("s", config, [tmp_path / "weights"], tmp_path / "runs").folder != first, "the content is the key"


def test_trainable_parameters():
    model, _ = tiny_model()
    set_trainable(model)
    assert not any(p.requires_grad for n, p in model.named_parameters() if any(part in n for part in FROZEN))
    assert model.connector.fc1.weight.requires_grad
    set_trainable(model, only=GENERATION)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(any(part in n for part in GENERATION) for n in trained)
    assert not any("lm_head" in n for n in trained)


def _averaged(config, folder: Path, ema: float, stop_after: int | None = None) -> tuple[list, torch.Tensor, Path]:
    """The trained weight before each step, the weight at the end, and the run's folder; the bias is frozen."""
    torch.manual_seed(1)
    module = nn.Linear(3, 1)
    module.bias.requires_grad_(False)
    data, seen = torch.randn(20, 3), []

    def loss(index):
        if len(seen) == stop_after:
            raise Interrupted
        seen.append(module.weight.detach().clone())
        return (module(data[index]) - 1).pow(2).mean(), {}

    folder.mkdir(exist_ok=True)
    (folder / "input.txt").write_text("data")
    run = StageRun("test", config, [folder / "input.txt"], folder / "runs")
    optimise(run, "phase", module, loss, len(data), PHASE, ema)
    return seen, module.weight.detach(), run.folder


def test_the_average_is_that_of_the_steps_and_survives_a_kill(config, tmp_path):
    seen, last, _ = _averaged(config, tmp_path / "plain", 0.0)
    expected = seen[0].clone()
    for weight in [*seen[1:], last]:
        expected = 0.75 * expected + 0.25 * weight
    _, found, folder = _averaged(config, tmp_path / "ema", 0.75)
    torch.testing.assert_close(found, expected)
    assert (found - last).abs().max() > 1e-3
    assert set(load_file(folder / "phase.safetensors")) == {"weight"}, "what is frozen is not stored"
    with pytest.raises(Interrupted):
        _averaged(config, tmp_path / "killed", 0.75, stop_after=7)
    (left,) = (tmp_path / "killed").glob("runs/*/phase/checkpoint-6/ema.safetensors")
    averages = load_file(left)
    assert [key.rpartition(".")[2] for key in averages] == ["weight"], "what is frozen is not averaged"
    (mean,) = averages.values()
    assert mean.dtype == torch.float32 and (mean - seen[6]).abs().max() > 1e-3, "the average, not the weights"
    assert torch.equal(_averaged(config, tmp_path / "killed", 0.75)[1], found)


def test_a_step_with_a_gradient_that_is_no_number_is_not_taken(config, tmp_path):
    """Its weights would all be NaN, saved and evaluated as if nothing had happened."""
    torch.manual_seed(1)
    module, data, asked = nn.Linear(3, 1), torch.randn(20, 3), []

    def loss(index):
        asked.append(index)
        return (module(data[index]) - 1).pow(2).mean() * (torch.inf if len(asked) == 5 else 1), {}

    (tmp_path / "input.txt").write_text("data")
    run = StageRun("test", config, [tmp_path / "input.txt"], tmp_path / "runs")
    with pytest.raises(ClearError, match=r"phase one: the gradient of step 5 is (nan|inf), .*lower the learning rate"):
        optimise(run, "one", module, loss, len(data), PHASE)
    assert module.weight.isfinite().all()
    assert last_complete(run.folder / "one").name == "checkpoint-3" and not (run.folder / "one.safetensors").exists()


@pytest.mark.parametrize("damage", ["a flipped bit", "cut off", "gone", "a damaged marker"])
def test_a_damaged_checkpoint_is_not_resumed_from_but_the_one_before(config, tmp_path, damage, capsys):
    expected, curve = _train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        _train(config, tmp_path / "killed", stop_after=8)
    name = "complete" if "marker" in damage else "model.safetensors"
    (file,) = (tmp_path / "killed").glob(f"*/phase/checkpoint-6/{name}")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink() if damage == "gone" else file.write_bytes(data if damage == "a flipped bit" else data[:-2])
    found, again = _train(config, tmp_path / "killed")
    assert torch.equal(found, expected) and [row["loss"] for row in again] == [row["loss"] for row in curve]
    assert f"checkpoint-6/{name}: not what was written" in capsys.readouterr().err


def test_a_run_whose_code_was_changed_begins_anew(config, tmp_path, monkeypatch):
    code = tmp_path / "code"
    code.mkdir()
    (code / "loss.py").write_text("old")
    monkeypatch.setattr(running, "CODE", [code])
    first = StageRun("test", config, [], tmp_path / "runs").folder
    (code / "loss.pyc").write_text("compiled")
    assert StageRun("test", config, [], tmp_path / "runs").folder == first
    (code / "loss.py").write_text("new")
    assert StageRun("test", config, [], tmp_path / "runs").folder != first
    monkeypatch.undo()
    listed = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    used = [dep for stage in ("base", "sft", "sft_direct", "bridge", "grpo") for dep in listed[stage]["deps"]]
    used = {Path(dep).parts[1] for dep in used if dep.startswith("clear/")}
    assert {path.name for path in running.CODE} == used, "else an edit of what it leaves out would keep the old weights"
    assert all(path.is_dir() for path in running.CODE)


def test_a_phase_with_nothing_to_train_is_refused(config, tmp_path):
    (tmp_path / "input.txt").write_text("data")
    run = StageRun("test", config, [tmp_path / "input.txt"], tmp_path / "runs")
    with pytest.raises(ClearError, match=r"phase one has no sample to learn from; .* or set its steps to 0"):
        optimise(run, "one", nn.Linear(2, 2), lambda _: None, 0, PHASE)
    with pytest.raises(ClearError, match="nothing to train"):
        optimise(run, "phase", nn.Linear(2, 2).requires_grad_(False), lambda _: None, 4, PHASE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("load", [incoming, Answerer.load])
def test_a_gpu_that_is_asked_for_and_absent_is_an_error_to_train_and_to_answer(tmp_path, load):
    config = from_dict(compose(["profile=smoke", "runtime.device=cuda"]))
    with pytest.raises(ClearError, match="torch sees no GPU; set it to auto or cpu"):
        load(tmp_path, config)
