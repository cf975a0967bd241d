"""Layers that wait in host memory: the numbers of a model that is on the device whole, and two layers there at most.

The device is the CPU here, so what is fetched are copies; on CUDA they come by a stream of their own (make gpu).
"""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from clear.config import compose, from_dict
from clear.errors import ClearError
from clear.model import lora, quantised
from clear.model.checkpoint import load_bagel, save_bagel
from clear.model.offload import AHEAD, Waiting, frozen, wait_in_host_memory
from clear.model.vae import AutoEncoder
from clear.reasoning.answering import Answerer
from clear.reasoning.engine import generate
from clear.training import load
from clear.training.load import incoming, trainable
from tests.helpers.adapters import SETTINGS, adapted, adapter_folders, batch, loss_of, stirred
from tests.helpers.generation import OPTIONS, ids_of
from tests.tiny import SIZES, tiny_model, tiny_prompts


@pytest.fixture
def there(monkeypatch):
    """Per fetched layer, how many are on the device as it is begun, this one included."""
    alive, counts, copied = weakref.WeakSet(), [], Waiting._copied

    def counted(self, number):
        found = copied(self, number)
        alive.add(next(iter(found.values())))
        counts.append(len(alive))
        return found

    monkeypatch.setattr(Waiting, "_copied", counted)
    return counts


def _deep(kind: str = "", folder=None):
    """The tiny model with an adapter and six layers, trained as the stages do: layers are recomputed."""
    model, tokenizer = tiny_model("direct", layers=6)
    if kind:
        save_bagel(folder / "weights", model, AutoEncoder(model.config.vae), tokenizer)
        model = load_bagel(folder / "weights", kind=kind)[0]
    torch.manual_seed(5)
    stirred(lora.attach(model, replace(SETTINGS, dropout=0.3)))
    trainable(model)
    model.language_model.gradient_checkpointing = True
    return model.train(), tokenizer


@pytest.mark.parametrize("kind", ["", "nf4", "int8"])
def test_two_training_steps_are_those_of_a_whole_model_and_two_layers_are_there(there, tmp_path, kind):
    found = []
    for waits in (False, True):
        model, tokenizer = _deep(kind, tmp_path / str(waits))
        if waits:
            wait_in_host_memory(model, "cpu")
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        torch.manual_seed(3)
        losses = []
        for _ in range(2):
            with torch.inference_mode():
                generate(
                    model.eval(), tokenizer, tiny_prompts(tokenizer, 1), OPTIONS
                )  # ends with a layer fetched ahead
            model.train()
            loss = loss_of(model, batch(tokenizer))
            loss.backward()
            losses.append(loss.item())
            optimiser.step()
            optimiser.zero_grad()
        found.append((losses, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}))
    (expected, weights), (losses, again) = found
    assert losses == expected and losses[0] != losses[1] and weights.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    assert max(there) == AHEAD and len(there) > 2 * 2 * 6


def test_layers_are_fetched_in_the_order_in_which_they_are_used(monkeypatch):
    model, tokenizer = _deep()
    wait_in_host_memory(model, "cpu")
    fetched, copied = [], Waiting._copied
    monkeypatch.setattr(Waiting, "_copied", lambda self, number: fetched.append(number) or copied(self, number))
    for _ in range(2):
        loss_of(model, batch(tokenizer)).backward()
    up, down = [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]
    assert fetched == [*up, *down, 0, *up[1:], *down, 0], "each once for a pass, and none in vain"
    fetched.clear()
    with torch.inference_mode():
        model.eval()
        for _ in range(2):
            model(*batch(tokenizer))
    assert fetched == [1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0], "the first was there already, and the next forward's is"


def test_answers_are_those_of_a_whole_model(tmp_path, there):
    base, adapter, _, tokenizer = adapter_folders(tmp_path)
    config = from_dict(compose(["profile=smoke", *SIZES]))
    restoring = replace(OPTIONS, restore="always", noise_seed=1)
    for folder in (base, adapter):
        texts = []
        for waits in (False, True):
            config.runtime.offload = waits
            model = Answerer.load(folder, config).model
            texts.append(ids_of(generate(model, tokenizer, tiny_prompts(tokenizer, 3), restoring)))
        assert texts[0] == texts[1]
    assert max(there) == AHEAD


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_gradient_goes_through_the_codes_of_its_forward(kind):
    """Those that a layer is lent for a forward are not its own when the gradient comes."""
    layer, x = quantised.QuantisedLinear(64, 8, False, kind), torch.randn(3, 64, requires_grad=True)
    lent = quantised.encode(kind, torch.randn(8, 64))
    y = functional_call(layer, lent, (x,))
    y.sum().backward()
    for name, value in lent.items():
        getattr(layer, name).copy_(value)
    torch.testing.assert_close(x.grad, layer.decoded(torch.float32).sum(0).expand(3, -1))
    assert x.grad.abs().max() > 0


def test_what_moves_a_model_moves_all_but_the_layers_that_wait():
    model, _ = adapted()
    held = {id(value) for layer in model.language_model.model.layers for value in frozen(layer).values()}
    wait_in_host_memory(model, "meta")
    for name, value in model.named_parameters():
        assert value.is_meta != (id(value) in held), name
    assert {name for name, value in model.named_parameters() if value.is_meta} >= {"vae2llm.weight"}
    model.to(torch.float64)
    kinds = {name: value.dtype for name, value in model.named_parameters()}
    layer = "language_model.model.layers.0.self_attn.q_proj"
    assert kinds[f"{layer}.base_layer.weight"] == torch.float32 and kinds["vae2llm.weight"] == torch.float64
    assert kinds[f"{layer}.lora_A.{lora.TRAINED}.weight"] == torch.float64


def test_a_stage_trains_so_and_says_where_it_cannot(tmp_path, monkeypatch):
    base, adapter, *_ = adapter_folders(tmp_path)
    settings = ["profile=smoke", "runtime.offload=true", "runtime.gradient_checkpointing=true", *SIZES]
    config = replace(from_dict(compose(settings)), lora=SETTINGS)
    for folder in (base, adapter):
        model = incoming(folder, config).model
        trainable(model)
        assert model.language_model.waiting
        assert {"lora_" in name for name, p in model.named_parameters() if p.requires_grad} == {True}
    monkeypatch.setattr(load, "world", lambda: 2)
    with pytest.raises(ClearError, match="on one device"):
        incoming(base, config)
    config.runtime.gradient_checkpointing = False
    with pytest.raises(ClearError, match=r"without runtime.gradient_checkpointing the device"):
        incoming(base, config)
    config.lora = replace(SETTINGS, rank=0)
    with pytest.raises(ClearError, match=r"lora.rank = 0 trains them; set lora.rank, or offload to false"):
        incoming(base, config)
