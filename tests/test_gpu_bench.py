"""The program for GPU measurements runs, and its FLOP formula is that of a plain count."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clear.model.runtime import autocast
from tests.bench import gpu
from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("offload", [[], ["--offload"]])
def test_the_program_measures_a_small_model_on_the_cpu(tmp_path, offload):
    out = tmp_path / "deep/gpu.json"
    arguments = "--small --device=cpu --repeats=1 --pixels 64 96 --flow-steps=2 --attention=dense --group=2 --out"
    done = subprocess.run(
        [sys.executable, "tests/bench/gpu.py", *offload, *arguments.split(), out],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    table = [line.split(" | ") for line in done.stdout.splitlines()]
    assert [len(cells) for cells in table if len(cells) > 1] == [10] * 4
    found = json.loads(out.read_text())
    assert found["attention"] == "dense" and "recomputation excluded" in found["formula"]
    assert sorted(found["runs"]) == ["bfloat16", "int8", "nf4"]
    assert sorted(cells[1] for cells in table[2:]) == [f"{kind}{', offload' * bool(offload)}" for kind in found["runs"]]
    for one in found["runs"].values():
        assert one["sft_step"]["tokens"] > one["grpo_scoring"]["tokens"] > 0 < one["sft_step"]["estimated_gib"]
        assert one["restoration_96px_batch_8"]["seconds_per_image"] > 0
        step = one["grpo_step"]
        assert step["rollouts"] == 2 and step["reply_tokens"] > 10 and step["rollout_seconds"] > 0
    sizes = {weights: one["parameters"] for weights, one in found["runs"].items()}
    assert sizes["int8"] == sizes["nf4"] < sizes["bfloat16"], "coded weights are no parameters"


def test_the_attention_is_that_of_the_option_and_flex_needs_a_gpu(monkeypatch, capsys):
    for attention in ("dense", "flex"):
        assert gpu.random_model(True, "cpu", 4, attention).language_model.attention == attention
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--device=cpu", "--attention=flex"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--attention flex has a backward pass on CUDA only" in capsys.readouterr().err


def test_the_formula_counts_what_a_step_without_recomputation_does():
    """torch counts the whole dense attention and the gradients of the inputs' own embeddings; hence the margin."""
    torch.manual_seed(0)
    model = gpu.random_model(small=True, device="cpu", rank=4)
    model.language_model.gradient_checkpointing = False
    built, contents, _ = gpu.sft_batch(model, rows=2, pixels=64)
    dense = torch.ones_like(built.allowed())
    with FlopCounterMode(display=False) as counter, autocast(model):
        hidden = model(built, contents)
        logits, _ = model.scored_logits(hidden, built)
        (logits.sum() + model.velocities(hidden, built).sum()).backward()
    formula = gpu.model_flops(model, built)
    llm = model.config.llm
    masked = 3 * 4 * llm.layers * llm.hidden * (int(dense.sum()) - int(built.allowed().sum()))
    assert 0.85 < (formula + masked) / counter.get_total_flops() < 1.15
