"""The stages as the command line runs them, from a checkpoint in BAGEL's layout to answers, with one adapter."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from clear.bench import predictions
from clear.config import compose, from_dict
from clear.model import lora
from clear.records import write_json
from clear.scratch import write_params
from tests.conftest import ROOT
from tests.tiny import save_random_model

STAGES = ("source", "degrade", "mmd_bench", "base", "traces", "sft_direct", "sft", "bridge", "grpo", "evaluate grpo")
SETTINGS = [
    "profile=smoke",
    "runtime.weights=bfloat16",
    "runtime.precision=bfloat16",
    "runtime.token_budget=256",
    "lora={rank: 2, alpha: 4.0}",
    "source={pretrain: 8, sft: 24, rl: 16, validation: 8, bench: 8}",
    "sampling.max_think_tokens=8",
    "sft.restoration.steps=4",
    "sft.traces.steps=4",
    "bridge={kind: mlp, distill: {steps: 4}, answer: {steps: 2}}",
    "grpo={steps: 1, reward_latent_quality: 0.1}",
]


@pytest.mark.slow
def test_one_adapter_goes_from_a_checkpoint_through_every_stage(tmp_path):
    settings = [*SETTINGS, f"model.checkpoint={tmp_path}/weights"]
    save_random_model(tmp_path / "weights", from_dict(compose(settings)))
    write_params(tmp_path / "params.yaml", settings)
    write_json(tmp_path / "data/metrics/validate.json", {})
    environment = os.environ | {"CLEAR_HOME": str(tmp_path / ".clear"), "PYTHONPATH": str(ROOT)}
    for stage in (*STAGES, "merge data/models/grpo merged"):
        command = [sys.executable, "-m", "clear", *stage.split()]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{stage}: {done.stderr[-2000:]}"

    models = {name: tmp_path / "data/models" / name for name in ("sft_direct", "sft", "bridge", "grpo")}
    adapters = {name: load_file(folder / lora.ADAPTER) for name, folder in models.items()}
    assert not list((tmp_path / "data/models").rglob("ema.safetensors")), "no stage copies the weights"
    records = [json.loads((folder / lora.BASE).read_text()) for folder in models.values()]
    assert records[0]["files"] and all(record["files"] == records[0]["files"] for record in records), "the same weights"
    for before, after in (("sft", "bridge"), ("bridge", "grpo")):
        assert adapters[before].keys() == adapters[after].keys()
    assert all(any(value.any() for key, value in adapter.items() if "lora_B" in key) for adapter in adapters.values())

    answered = predictions.read(tmp_path / "data/predictions/grpo.parquet")
    assert len(answered) > 0
    adapted, *_ = lora.load_model(models["grpo"], torch.float32, "cpu", tmp_path / "weights")
    merged, *_ = lora.load_model(tmp_path / "merged", torch.float32, "cpu")
    name = "language_model.model.layers.0.mlp.down_proj"
    layer = adapted.get_submodule(name)
    expected = layer.base_layer.weight + layer.get_delta_weight(lora.TRAINED)
    torch.testing.assert_close(merged.get_submodule(name).weight, expected, atol=0.02, rtol=0)
