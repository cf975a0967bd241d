"""The stages as the command line runs them, from a checkpoint in BAGEL's layout: with one adapter, and sharded."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clear.bench import predictions
from clear.config import compose, from_dict
from clear.data.io import write_json
from clear.model import lora
from clear.model.checkpoint import MODEL
from clear.model.quantised import plain
from clear.project.scratch import write_params
from tests.conftest import ROOT
from tests.tiny import save_random_model

DATA, CHAIN = ("source", "degrade", "base", "traces"), ("sft_direct", "sft", "bridge", "grpo")
SMALL = [
    "profile=smoke",
    "source={pretrain: 8, sft: 24, rl: 16, validation: 8, bench: 8, development: 8}",
    "sampling.max_think_tokens=8",
    "sft.restoration.steps=4",
    "sft.traces.steps=4",
]
ADAPTER = [
    *SMALL,
    "runtime={weights: bfloat16, precision: bfloat16, token_budget: 256}",
    "lora={rank: 2, alpha: 4.0}",
    "bridge={kind: mlp, distill: {steps: 4}, answer: {steps: 2}}",
    # Made to restore, the members of a group differ in their pictures: there is always something to learn.
    "grpo={steps: 1, restore: always, reward_latent_quality: 0.1, reward_answer: 0.2, answer_scored: reply}",
]
QUANTISED = [
    *ADAPTER,
    "runtime={weights: nf4, precision: float32}",  # bfloat16 takes minutes where the processor has none
    "bridge={kind: direct}",
]
"""What the profile bagel_7b_qlora sets, at the size of a test."""
SHARDED = [*SMALL, "runtime={device: cpu, threads: 1, token_budget: 256, rows_per_pass: 1, log_every: 1}"]


def _workspace(folder: Path, settings: list[str]) -> None:
    """Params and an untrained checkpoint, and the data made from them."""
    settings = [*settings, f"model.checkpoint={folder}/weights"]
    save_random_model(folder / "weights", from_dict(compose(settings)))
    write_params(folder / "params.yaml", settings)
    write_json(folder / "data/metrics/validate.json", {})
    for stage in DATA:
        _run(folder, ["-m", "clear", stage])


def _run(folder: Path, command: list[str], wanted: tuple[int, ...] = (0,)) -> None:
    environment = os.environ | {"CLEAR_HOME": str(folder / ".clear"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode in wanted, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("settings", [ADAPTER, QUANTISED], ids=["lora", "qlora"])
def test_one_adapter_goes_from_a_checkpoint_through_every_stage(tmp_path, settings):
    _workspace(tmp_path, settings)
    for command in ("mmd_bench", *CHAIN, "evaluate grpo", "merge data/models/grpo merged"):
        _run(tmp_path, ["-m", "clear", *command.split()])

    models = {name: tmp_path / "data/models" / name for name in CHAIN}
    adapters = {name: load_file(folder / lora.ADAPTER) for name, folder in models.items()}
    assert not list((tmp_path / "data/models").rglob(MODEL)), "no stage copies the weights"
    records = [json.loads((folder / lora.BASE).read_text()) for folder in models.values()]
    assert records[0]["files"] and all(record["files"] == records[0]["files"] for record in records), "the same weights"
    for before, after in (("sft", "bridge"), ("bridge", "grpo")):
        assert adapters[before].keys() == adapters[after].keys()
    assert all(any(value.any() for key, value in adapter.items() if "lora_B" in key) for adapter in adapters.values())

    assert len(predictions.read(tmp_path / "data/predictions/grpo.parquet")) > 0
    kind = lora.quantisation_of(models["grpo"])
    assert kind == ("nf4" if settings is QUANTISED else "")
    adapted, *_ = lora.load_model(models["grpo"], torch.float32, "cpu", tmp_path / "weights", kind=kind)
    merged, *_ = lora.load_model(tmp_path / "merged", torch.float32, "cpu")
    name = "language_model.model.layers.0.mlp.down_proj"
    layer = adapted.get_submodule(name)
    expected = plain(layer.base_layer, torch.float32).weight + layer.get_delta_weight(lora.TRAINED)
    torch.testing.assert_close(merged.get_submodule(name).weight, expected, atol=1e-6 if kind else 0.02, rtol=0)
    with (tmp_path / "data/plots/grpo.csv").open() as file:
        first = next(csv.DictReader(file))
    assert float(first["kl"]) == 0 and float(first["ratio_error"]) <= (1e-3 if kind else 1)


@pytest.mark.slow
def test_accelerate_launch_trains_a_stage_as_one_process_does(tmp_path):
    """The README's command, with the shipped settings, but for two processes on the CPU in place of eight GPUs."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    _workspace(alone, SHARDED)
    shutil.copytree(alone, together)
    _run(alone, ["-m", "clear", "sft"])
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "infra/fsdp.yaml"), "--num_processes=2"]
    launched = 0
    while not (together / "data/plots/sft.csv").exists():  # a stage of two phases asks for the same command again
        _run(together, [*launch, "-m", "tests.sharded", "sft"], wanted=(0, 1))
        launched += 1
        assert launched <= 2
    curves = []
    for folder in (together, alone):
        with (folder / "data/plots/sft.csv").open() as file:
            curves.append(list(csv.DictReader(file)))
    assert len(curves[0]) == len(curves[1]) == 8
    for found, expected in zip(*curves, strict=True):
        assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-4)
    folders = together / "data/models/sft", alone / "data/models/sft", alone / "weights"
    weights, wanted, start = (load_file(folder / MODEL) for folder in folders)
    for name, value in wanted.items():
        # AdamW turns the rounding of small gradients into steps: what counts is how far the weights have come.
        assert (weights[name] - value).norm() <= 0.01 * (value - start[name]).norm() + 1e-6, name
