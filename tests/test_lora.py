"""Adapters: what they change and what not, their folders, the reference of GRPO, merging, and recomputed layers."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from clear.config import compose, from_dict
from clear.errors import ClearError
from clear.model import flow, lora
from clear.model.bagel import GENERATION, Bagel, BagelConfig
from clear.model.checkpoint import MODEL, VAE, fingerprint, load, load_bagel
from clear.model.mot import LlmConfig
from clear.model.runtime import autocast
from clear.model.sequence import SpecialTokens
from clear.model.vae import VaeConfig
from clear.model.vit import VitConfig
from clear.reasoning.answering import Answerer
from clear.reasoning.engine import Options, generate
from clear.training.load import incoming, save, trainable
from clear.training.rl import scoring
from tests.helpers.adapters import SETTINGS, adapted, adapter_folders, batch, loss_of, outputs
from tests.tiny import SIZES, tiny_model, tiny_prompts


@pytest.fixture
def folders(tmp_path):
    """A folder with weights and one with an adapter on them; also the adapted model itself."""
    return adapter_folders(tmp_path)


def test_a_fresh_adapter_changes_no_output_and_a_trained_one_does():
    plain, tokenizer = tiny_model("direct")
    given = batch(tokenizer)
    expected = outputs(plain, given)
    fresh = lora.attach(tiny_model("direct")[0], SETTINGS)
    for found, value in zip(outputs(fresh, given), expected, strict=True):
        assert torch.equal(found, value)
    logits, _, velocity = outputs(adapted()[0], given)
    assert (logits - expected[0]).abs().max() > 0.01 and (velocity - expected[2]).abs().max() > 0.01


@pytest.mark.parametrize(("experts", "gen"), [("both", {True, False}), ("und", {False}), ("gen", {True})])
def test_only_the_chosen_experts_of_the_decoder_are_adapted(experts, gen):
    model, _ = tiny_model("direct")
    lora.attach(model, replace(SETTINGS, experts=experts, targets=["q_proj", "down_proj"]))
    found = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {"_moe_gen" in name for name in found} == gen
    assert all(name.startswith("language_model.model.layers.") for name in found)
    assert len(found) == len(gen) * 2 * 2 * 2, "experts x layers x targets x factors"


def test_the_name_rule_of_the_stages_chooses_among_adapters():
    model, tokenizer = adapted("mlp")
    trainable(model, only=GENERATION)
    found = {n for n, p in model.named_parameters() if p.requires_grad}
    assert found and all("lora_" in n and "_moe_gen" in n for n in found)
    trainable(model)
    assert any(p.requires_grad for n, p in model.named_parameters() if n.startswith("bridge."))
    assert not model.language_model.lm_head.weight.requires_grad
    loss_of(model, batch(tokenizer)).backward()
    assert model.language_model.model.embed_tokens.weight.grad is None


def test_the_adapter_of_the_7b_model_weighs_what_the_profile_promises():
    settings = from_dict(compose(["profile=bagel_7b_lora"])).lora
    config = BagelConfig(LlmConfig(), VitConfig(64, 1, 2, 64, 14, 70), VaeConfig(), SpecialTokens(0, 1, 2, 3))
    with torch.device("meta"):
        model = lora.attach(Bagel(config), settings)
    weights = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert weights == 16 * 5_046_272
    assert 40e6 <= 2 * weights <= 200e6


def test_an_unknown_target_is_refused():
    with pytest.raises(ClearError, match="'query' is not a linear layer"):
        lora.attach(tiny_model("direct")[0], replace(SETTINGS, targets=["query"]))


@pytest.fixture
def config():
    overrides = ["profile=smoke", "runtime.device=cpu", "lora.rank=2", "lora.alpha=4", *SIZES]
    return from_dict(compose(overrides))


def test_one_adapter_is_carried_through_the_stages(folders, config, tmp_path):
    base, _, _, tokenizer = folders
    config.model.checkpoint = str(base)
    start = incoming(base, config)
    trainable(start.model)
    given = batch(tokenizer)
    optimiser = torch.optim.SGD([p for p in start.model.parameters() if p.requires_grad], 0.1)
    loss_of(start.model, given).backward()
    optimiser.step()
    save(tmp_path / "sft", start, config)
    assert not (tmp_path / "sft" / MODEL).exists()
    following = incoming(tmp_path / "sft", config)
    assert following.weights == base and following.files == start.files
    expected = outputs(start.model, given)
    assert all(torch.equal(a, b) for a, b in zip(outputs(following.model, given), expected, strict=True))
    save(tmp_path / "again", following, config)
    for name in (lora.ADAPTER, lora.ADAPTER_CONFIG, lora.BASE):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "sft" / name).read_bytes()
    config.lora.rank = 3
    with pytest.raises(ClearError, match=r"lora.rank = 3"):
        incoming(tmp_path / "sft", config)
    config.lora.rank = 0
    with pytest.raises(ClearError, match="holds an adapter"):
        incoming(tmp_path / "sft", config)


def test_without_a_rank_a_stage_trains_and_saves_all_weights(folders, config, tmp_path):
    base = folders[0]
    config.lora.rank = 0
    start = incoming(base, config)
    assert not lora.has_adapter(start.model)
    save(tmp_path / "full", start, config)
    assert (tmp_path / "full" / MODEL).read_bytes() == (base / MODEL).read_bytes()


@pytest.mark.parametrize("bridge", ["direct", "mlp"])
def test_the_reference_is_the_incoming_adapter(bridge):
    model, tokenizer = adapted(bridge)
    trainable(model)
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    before = sum(p.numel() for p in model.parameters())
    logits = outputs(model, batch(tokenizer))[0]
    lora.add_reference(model)
    with torch.no_grad():
        changed = next(p for n, p in model.named_parameters() if "down_proj.lora_B.default" in n)
        changed.mul_(2)
        assert not torch.equal(outputs(model, batch(tokenizer))[0], logits), "the trained adapter is the active one"
        changed.div_(2)
    extra = sum(p.numel() for n, p in model.named_parameters() if ".reference." in n)
    assert sum(p.numel() for p in model.parameters()) == before + extra, "an adapter more and no base weights"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == wanted

    prompts = tiny_prompts(tokenizer, 2)
    options = Options(flow_steps=3, shift=3.0, sigma=0.3, temperature=1.0, max_tokens=6, restore="always")
    found = generate(model, tokenizer, prompts, options, 2, torch.Generator().manual_seed(1))
    asked = ([prompts[t.prompt] for t in found], found, [[1]] * len(found), flow.time_grid(3, 3.0).tolist(), 0.3, 1.0)
    new = scoring.score(model.train(), *asked)
    with torch.no_grad(), lora.reference(model):
        old = scoring.score(model, *asked)
    assert model.training
    assert torch.equal(new.text, old.text) and torch.equal(new.velocity, old.velocity), "KL is exactly 0"
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1)
        moved = scoring.score(model, *asked)
        with lora.reference(model):
            again = scoring.score(model, *asked)
    assert torch.equal(again.text, old.text) and torch.equal(again.velocity, old.velocity)
    assert (moved.text - old.text).abs().max() > 1e-3
    assert not any(".reference." in key for key in lora._adapter_state(model))


@pytest.mark.parametrize("with_adapter", [False, True])
def test_recomputed_layers_give_the_same_loss_and_gradients(with_adapter):
    model, tokenizer = adapted(settings=replace(SETTINGS, dropout=0.3)) if with_adapter else tiny_model("direct")
    model.train()
    given, found = batch(tokenizer), []
    for recompute in (False, True):
        model.zero_grad()
        model.language_model.gradient_checkpointing = recompute
        torch.manual_seed(3)
        calls = []
        hook = model.language_model.model.layers[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        loss = loss_of(model, given)
        loss.backward()
        hook.remove()
        assert len(calls) == 1 + recompute
        found.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (expected, gradients), (loss, again) = found
    assert loss == expected and gradients.keys() == again.keys()
    assert any("_moe_gen" in n for n in gradients) and any("_moe_gen" not in n for n in gradients)
    for name, value in gradients.items():
        assert torch.equal(again[name], value), name


def test_a_forward_with_a_cache_recomputes_nothing():
    model, tokenizer = tiny_model("direct")
    model.train()
    model.language_model.gradient_checkpointing = True
    prompts, options = tiny_prompts(tokenizer, 2), Options(flow_steps=2, max_tokens=4, restore="always")
    expected = [t.replies[-1].ids for t in generate(model.eval(), tokenizer, prompts, options)]
    assert [t.replies[-1].ids for t in generate(model.train(), tokenizer, prompts, options)] == expected


def test_bfloat16_weights_train_and_answer_under_autocast(folders, tmp_path):
    base, folder, model, tokenizer = folders
    low, vae, _ = lora.load_model(folder, torch.bfloat16)
    types = {n: p.dtype for n, p in low.named_parameters()}
    assert {d for n, d in types.items() if "lora_" in n} == {torch.float32}
    assert {d for n, d in types.items() if "lora_" not in n} == {torch.bfloat16}
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    trainable(low.train())
    given = batch(tokenizer)
    with autocast(low):
        loss = loss_of(low, given)
    loss.backward()
    expected = loss_of(model, given)
    assert abs(loss.item() - expected.item()) < 0.05 * expected.item()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in low.parameters() if p.requires_grad)
    with autocast(low.eval()):
        done = generate(
            low, tokenizer, tiny_prompts(tokenizer, 2), Options(flow_steps=2, max_tokens=4, restore="always")
        )
    assert all(t.restorations[0].x0.isfinite().all() and t.replies for t in done)
    lora.save_adapter(tmp_path / "low", low, base, fingerprint(base), torch.bfloat16)
    assert {v.dtype for v in load_file(tmp_path / "low" / lora.ADAPTER).values()} == {torch.bfloat16}


@pytest.mark.parametrize("way", ["weights", "adapter", "merged", "stage", "answers"])
def test_bfloat16_weights_leave_the_autoencoder_as_it_is(folders, config, tmp_path, way):
    """It was rounded to bfloat16 on the way to float32."""
    base, folder, _, _ = folders
    config.runtime.weights = "bfloat16"
    if way == "merged":
        lora.merge(folder, tmp_path / "merged", torch.bfloat16)
        vae = load_bagel(tmp_path / "merged", None)[1]
    elif way == "stage":
        config.lora.rank = 0
        vae = incoming(base, config).vae
    elif way == "answers":
        vae = Answerer.load(folder, config).vae
    else:
        vae = lora.load_model(base if way == "weights" else folder, torch.bfloat16)[1]
    expected = load_file(base / VAE)
    assert all(torch.equal(value, expected[key]) for key, value in vae.state_dict().items())


@pytest.mark.parametrize("number", [0, 1])
def test_of_several_sharding_processes_only_the_first_reads_the_weights(folders, config, monkeypatch, number):
    """The others read no byte of the model, but the autoencoder; their parameters have shape, type and an address."""
    base, read, original = folders[0], [], load._tensors

    def reading(file, *rest):
        read.append(file.name)
        return original(file, *rest)

    monkeypatch.setattr(load, "_tensors", reading)
    config.lora.rank = 0
    for name, value in {"ACCELERATE_USE_FSDP": "true", "RANK": str(number)}.items():
        monkeypatch.setenv(name, value)
    places = []
    for efficient in ("true", "false"):
        monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", efficient)
        for whole in (False, True):
            read.clear()
            start = incoming(base, config, whole=whole)
            values = list(start.model.parameters())
            assert {(p.dtype, p.device.type) for p in [*values, *start.vae.parameters()]} == {(torch.float32, "cpu")}
            assert len({p.data_ptr() for p in values}) == len(values) and "ae.safetensors" in read
            places.append(MODEL in read)
    assert places == [not number, True, True, True]
