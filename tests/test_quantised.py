"""Quantised layers: products and gradients, and the folders, adapters and errors that come with them."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from clear.bench.vlmeval.respond import Folder
from clear.config import compose, from_dict
from clear.errors import ClearError
from clear.model import lora, quantised
from clear.model.bagel import Bagel
from clear.model.checkpoint import MODEL, fingerprint, load_bagel, quantise_folder, read_config, read_header, save_bagel
from clear.model.runtime import stored
from clear.model.vae import AutoEncoder
from clear.reasoning.answering import Answerer
from clear.training import load
from clear.training.load import incoming, save, trainable
from clear.training.loop.saved import adopt_trained, trained_state
from tests.conftest import ROOT
from tests.helpers import adapters
from tests.helpers.adapters import SETTINGS, batch, loss_of, outputs
from tests.helpers.model_folders import save_large
from tests.tiny import SIZES, tiny_model

KINDS = list(quantised.KINDS)


@pytest.fixture
def folder(tmp_path):
    """A folder of exact weights."""
    model, tokenizer = tiny_model("direct")
    save_bagel(tmp_path / "exact", model, AutoEncoder(model.config.vae), tokenizer)
    return tmp_path / "exact"


@pytest.fixture
def tokenizer():
    return tiny_model("direct")[1]


def layer_of(kind: str, outputs: int, inputs: int, bias: bool = True) -> tuple[quantised.QuantisedLinear, nn.Linear]:
    """A quantised layer with random weights, and the ordinary one with the weights it stands for."""
    torch.manual_seed(0)
    layer = quantised.QuantisedLinear(inputs, outputs, bias, kind)
    for name, value in quantised.encode(kind, torch.randn(outputs, inputs)).items():
        layer.get_buffer(name).copy_(value)
    if bias:
        layer.bias.data.normal_()
    return layer, quantised.plain(layer, torch.float32)


def stirred(model: Bagel) -> Bagel:
    """The model with random adapter weights, the same at every call."""
    torch.manual_seed(7)
    return adapters.stirred(model)


# --- layers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradient_are_those_of_the_decoded_weight(kind, bias):
    layer, plain = layer_of(kind, 48, 96, bias)
    x = torch.randn(2, 7, 96, requires_grad=True)
    weights = torch.randn(2, 7, 48)
    found, expected = layer(x), plain(x)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_for_the_backward_pass(kind):
    layer, _ = layer_of(kind, 48, 96, False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(7, 96, requires_grad=True))
    assert not kept


def test_swiglu_in_pieces_is_the_whole_one(folder):
    model, _ = tiny_model("direct")
    mlp = load_bagel(folder, kind="nf4")[0].language_model.model.layers[0].mlp
    assert mlp.piece == quantised.PIECE and not model.language_model.model.layers[0].mlp.piece
    x, weights = torch.randn(10, 32, requires_grad=True), torch.randn(10, 32)
    found = []
    for piece in (0, 3, 10):
        mlp.piece = piece
        y = mlp(x)
        found.append((y, *torch.autograd.grad((y * weights).sum(), x)))
        with torch.no_grad():
            torch.testing.assert_close(mlp(x), y)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize("recompute", [False, True])
def test_training_in_pieces_has_the_same_gradients(folder, recompute, tokenizer):
    found = []
    for piece in (0, 3):
        model = stirred(lora.attach(load_bagel(folder, kind="nf4")[0], SETTINGS)).train()
        model.language_model.gradient_checkpointing = recompute
        for layer in model.language_model.model.layers:
            layer.mlp.piece = layer.mlp_moe_gen.piece = piece
        loss_of(model, batch(tokenizer)).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any("down_proj" in name for name in found[0])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_keep_their_types_where_a_model_changes_its(kind):
    layer, _ = layer_of(kind, 48, 96)
    before = {name: value.clone() for name, value in layer.held().items()}
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    for name, value in layer.held().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])
    assert layer(torch.randn(2, 96).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 96)).dtype == torch.bfloat16


# --- folders


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_quantised_as_it_is_read(folder, kind, tokenizer):
    exact, found = load_bagel(folder)[0], load_bagel(folder, kind=kind)[0]
    layers = quantised.layers(found)
    assert len(layers) == 2 * 2 * 7, "layers x experts x projections"
    assert {type(layer) for layer in layers.values()} == {quantised.QuantisedLinear}
    assert found.config == replace(exact.config, quantised=kind)
    for name, layer in quantised.layers(exact).items():
        held = quantised.encode(kind, layer.weight.detach())
        layer.weight.data = quantised.decode(kind, held, *layer.weight.shape, torch.float32)
        assert all(torch.equal(value, held[part]) for part, value in layers[name].held().items())
    given = batch(tokenizer)
    for value, expected in zip(outputs(found, given), outputs(exact, given), strict=True):
        torch.testing.assert_close(value, expected, atol=2e-5, rtol=1e-5)
    held = {key: value for key, value in exact.state_dict().items() if key.rpartition(".")[0] not in layers}
    assert all(torch.equal(found.state_dict()[key], value) for key, value in held.items()), "the rest is as it was"


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_writes_a_folder_that_loads_to_the_same_model(folder, kind, clear, tmp_path, tokenizer):
    out = tmp_path / "small"
    assert clear("quantise", folder, out, "--kind", kind) == (0, f"{out} written.\n", "")
    assert json.loads((out / "config.json").read_text())["quantisation"] == quantised.description(kind)
    assert read_config(out).quantised == kind
    found, expected = load_bagel(out, kind=kind)[0], load_bagel(folder, kind=kind)[0]
    state = found.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
    given = batch(tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(outputs(found, given), outputs(expected, given), strict=True))
    mixed = load_bagel(out, torch.bfloat16, kind=kind)[0]
    kinds = {key: value.dtype for key, value in mixed.state_dict().items() if key not in quantised.kinds(mixed)}
    assert set(kinds.values()) == {torch.bfloat16} and quantised.kinds(mixed) == quantised.kinds(found)
    save_bagel(tmp_path / "again", found, AutoEncoder(found.config.vae))
    assert (tmp_path / "again" / MODEL).read_bytes() == (out / MODEL).read_bytes()
    load_bagel(out, None, "meta", kind=kind)
    load_bagel(folder, None, "meta", kind=kind)

    status, _, stderr = clear("quantise", out, tmp_path / "third", "--kind", kind)
    assert status == 1 and f"holds {kind} weights already" in stderr
    status, _, stderr = clear("quantise", folder, out, "--kind", kind)
    assert status == 1 and "not empty" in stderr
    adapted = lora.attach(load_bagel(folder)[0], SETTINGS)
    lora.save_adapter(tmp_path / "adapter", adapted, folder, fingerprint(folder), torch.float32)
    status, _, stderr = clear("quantise", tmp_path / "adapter", tmp_path / "third")
    assert status == 1 and "holds an adapter; quantise the weights it adapts" in stderr
    status, _, stderr = clear("quantise", folder, tmp_path / "third", "--kind", "int4")
    assert status == 1 and "--kind int4: choose nf4 or int8" in stderr


def test_a_quantised_folder_is_refused_where_exact_weights_are_needed(folder, tmp_path, clear):
    out = tmp_path / "small"
    quantise_folder(folder, out, "nf4")
    with pytest.raises(ClearError, match=r"holds nf4 weights, and exact ones are needed here; name the folder"):
        load_bagel(out)
    with pytest.raises(ClearError, match=r"holds nf4 weights, runtime.weights says int8; set it to nf4"):
        load_bagel(out, kind="int8")
    config = json.loads((out / "config.json").read_text())
    config["quantisation"]["block_size"] = 32
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ClearError, match=r"config.json: quantisation .*32.* is not one of this version's"):
        load_bagel(out, kind="nf4")


def test_codes_of_a_wrong_type_are_refused_with_their_key(folder, tmp_path):
    out = tmp_path / "small"
    quantise_folder(folder, out, "int8")
    state = load_file(out / MODEL)
    key = next(key for key, entry in read_header(out / MODEL).items() if entry.kind == "I8")
    save_file(state | {key: state[key].float()}, out / MODEL)
    with pytest.raises(ClearError, match=rf"key {key} has type F32, its quantisation says torch.int8.*clear quantise"):
        load_bagel(out, kind="int8")
    save_file(state | {key: state[key].float()}, folder / MODEL)
    with pytest.raises(ClearError, match=rf"key {key.removesuffix('weight')}scale .* is not part of this model"):
        load_bagel(folder)


def test_nf4_on_a_gpu_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ClearError, match=r"needs bitsandbytes.*pip install 'clear-mllm\[quantised\]'"):
        quantised.require("nf4", "cuda:0")
    quantised.require("int8", "cuda:0")
    quantised.require("nf4", "cpu")
    assert 'quantised = ["bitsandbytes"]' in (ROOT / "pyproject.toml").read_text()


PEAKS = """
import os, sys
import torch
from clear.model import quantised
from clear.model.bagel import Bagel
from clear.model.checkpoint import load_bagel, read_config

with torch.device("meta"):
    Bagel(read_config(sys.argv[1]))  # torch imports the machinery of the meta device on its first use
for kind in quantised.KINDS:  # and the kernels their own
    quantised.encode(kind, torch.ones(1024, 1024))

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

for kind in ("none", *quantised.KINDS):
    if os.fork() == 0:
        size = 0
        if kind != "none":
            model, vae, _ = load_bagel(sys.argv[1], None, kind=kind)
            for value in [*model.state_dict().values(), *vae.parameters()]:
                size += value.nbytes
                value.view(torch.uint8).max()  # touch every page
        print(kind, size, peak(), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_quantising_holds_the_small_weights_and_one_tensor(tmp_path):
    save_large(tmp_path)
    assert (tmp_path / MODEL).stat().st_size >= 400e6
    largest = max(entry.stop - entry.start for entry in read_header(tmp_path / MODEL).values())
    command, environment = [sys.executable, "-c", PEAKS, str(tmp_path)], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    found = {kind: (int(a), int(b)) for kind, a, b in (line.split() for line in done.stdout.splitlines())}
    pieces = 140 * 2**20  # what coding takes and the allocator keeps: of a fixed size, and more than it should be
    for kind in KINDS:
        size, peak = found[kind]
        assert peak - found["none"][1] <= 1.1 * size + largest + pieces, kind
    assert found["nf4"][0] < 0.65 * found["int8"][0] < 0.5 * (tmp_path / MODEL).stat().st_size


# --- adapters and stages


@pytest.fixture
def config():
    return from_dict(compose(["profile=smoke", "runtime.device=cpu", "lora.rank=2", "lora.alpha=4", *SIZES]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained_and_saved(folder, kind, tmp_path, tokenizer):
    plain = load_bagel(folder, kind=kind)[0]
    given = batch(tokenizer)
    expected = outputs(plain, given)
    model = lora.attach(load_bagel(folder, kind=kind)[0], SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, given), expected, strict=True))
    trainable(stirred(model).train())
    loss_of(model, given).backward()
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * 2 * 7 * 2 and all("lora_" in name for name in trained)
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
    assert trained_state(model).keys() == trained, "checkpoints hold no codes"
    save_file(trained_state(model), tmp_path / "checkpoint.safetensors")
    other = lora.attach(load_bagel(folder, kind=kind)[0], SETTINGS)
    trainable(other)
    adopt_trained(other, tmp_path / "checkpoint.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(outputs(other, given), outputs(model, given), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["exact", "small"])
def test_merging_adds_to_the_decoded_weights_and_says_so(folder, kind, base, tmp_path, clear, tokenizer):
    if base == "small":
        quantise_folder(folder, tmp_path / base, kind)
    weights = tmp_path / base
    few = replace(SETTINGS, targets=["q_proj", "down_proj"], experts="gen")
    model = stirred(lora.attach(load_bagel(weights, kind=kind)[0], few))
    lora.save_adapter(tmp_path / "adapter", model, weights, fingerprint(weights), torch.float32)
    status, stdout, _ = clear("merge", tmp_path / "adapter", tmp_path / "merged", "--weights", "float32")
    assert status == 0 and f"trained on {kind} weights and has been added to those, decoded" in stdout
    merged = load_bagel(tmp_path / "merged")[0]
    given = batch(tokenizer)
    for found, expected in zip(outputs(merged, given), outputs(model, given), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    deltas = {name: layer.get_delta_weight(lora.TRAINED) for name, layer in lora._layers(model)}
    assert len(deltas) == 2 * 2
    small = load_bagel(weights, kind=kind)[0]
    for name, layer in quantised.layers(small).items():
        expected = layer.decoded(torch.float32) + deltas.get(name, 0)
        assert torch.equal(merged.get_submodule(name).weight, expected), name
    assert not merged.config.quantised


def test_bfloat16_merges_round_once(folder, tmp_path):
    model = stirred(lora.attach(load_bagel(folder, kind="nf4")[0], SETTINGS))
    lora.save_adapter(tmp_path / "adapter", model, folder, fingerprint(folder), torch.float32)
    lora.merge(tmp_path / "adapter", tmp_path / "merged", torch.bfloat16)
    state = load_file(tmp_path / "merged" / MODEL)
    for name, layer in lora._layers(model):
        expected = layer.get_base_layer().decoded(torch.float32) + layer.get_delta_weight(lora.TRAINED)
        assert torch.equal(state[f"{name}.weight"], expected.to(torch.bfloat16)), name


def test_training_stays_on_the_weights_that_it_began_on(folder, config, tmp_path):
    config.model.checkpoint, config.runtime.weights = str(folder), "nf4"
    start = incoming(folder, config)
    assert {type(layer.get_base_layer()) for _, layer in lora._layers(start.model)} == {quantised.QuantisedLinear}
    save(tmp_path / "sft", start, config)
    assert json.loads((tmp_path / "sft" / lora.BASE).read_text())["quantised"] == "nf4"
    assert incoming(tmp_path / "sft", config).model.config.quantised == "nf4"
    assert Answerer.load(tmp_path / "sft", config).model.config.quantised == "nf4"
    for other in ("int8", "float32"):
        config.runtime.weights = other
        said = rf"sft was trained on nf4 weights, params say runtime.weights = {other}; set it back, or run sft again"
        with pytest.raises(ClearError, match=said):
            incoming(tmp_path / "sft", config)
        assert Answerer.load(tmp_path / "sft", config).model.config.quantised == ("int8" if other == "int8" else "")
    save(tmp_path / "plain", incoming(folder, config), config)
    config.runtime.weights = "nf4"
    with pytest.raises(ClearError, match=r"plain was trained on exact weights, params say runtime.weights = nf4"):
        incoming(tmp_path / "plain", config)


def test_what_quantised_weights_cannot_do_is_refused(folder, config, monkeypatch):
    config.runtime.weights, config.lora.rank = "nf4", 0
    with pytest.raises(ClearError, match=r"runtime.weights = nf4 freezes the decoder, and lora.rank = 0 trains it"):
        incoming(folder, config)
    config.lora.rank = 2
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ClearError, match=r"runtime.weights = nf4 is not sharded; train on one device"):
        incoming(folder, config)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"files": ["ema.safetensors"]}', '{"files": {"ema.safetensors": 1}}']
)
def test_a_damaged_record_of_the_weights_under_an_adapter_is_refused(folder, config, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    load.MANIFEST.parent.mkdir(parents=True)
    load.MANIFEST.write_text(content)
    config.model.checkpoint = str(folder)
    with pytest.raises(ClearError, match=r"data/models/base/manifest\.json.*; run the base stage again\."):
        incoming(folder, config)


def test_answers_of_quantised_weights_are_not_taken_for_those_of_exact_ones(folder, config):
    exact = Folder(folder, config).identity()
    config.runtime.weights = "nf4"
    assert Folder(folder, config).identity() == exact | {"weights": "nf4"}
    config = replace(config, runtime=replace(config.runtime, weights="bfloat16"))
    assert Folder(folder, config).identity() == exact | {"weights": "bfloat16"}, "these answer otherwise, too"


@pytest.mark.parametrize(("precision", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_other_weights_have_the_type_of_the_computation(folder, config, precision, expected):
    config.runtime.weights, config.runtime.precision = "int8", precision
    assert stored(config) == (expected, "int8")
    model = Answerer.load(folder, config).model
    assert {value.dtype for value in model.parameters()} == {expected}
