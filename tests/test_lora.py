"""Adapters: what they change and what not, their folders, the reference of GRPO, merging, and recomputed layers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file

from clear.config import compose, from_dict
from clear.errors import ClearError
from clear.model import flow, lora
from clear.model.bagel import GENERATION, Bagel, BagelConfig, Contents
from clear.model.checkpoint import MODEL, PLAIN, VAE, fingerprint, load, load_bagel, save_bagel
from clear.model.checkpoint import format as folder_format
from clear.model.mot import LlmConfig
from clear.model.sequence import LATENT, Image, SpecialTokens, Text, layout
from clear.model.tokenizer import encode
from clear.model.vae import AutoEncoder, VaeConfig
from clear.model.vit import VitConfig
from clear.reasoning.answering import Answerer
from clear.reasoning.engine import Options, generate
from clear.training.load import incoming, save, trainable
from clear.training.rl import scoring
from tests.helpers.adapters import PAIRS, SETTINGS, TEXTS, adapted, qwen_folder
from tests.tiny import SIZES, tiny_model, tiny_prompts


def batch(tokenizer, count: int = 3):
    """Rows with text, ViT tokens, a noisy and a clean latent: both experts, all kinds of routing."""
    rows, contents = [], Contents(vit=[], latent=[], time=[])
    for prompt in tiny_prompts(tokenizer, count):
        noisy = prompt.latent.flip(0)
        contents.vit.append(prompt.patches)
        contents.latent += [prompt.latent, noisy, prompt.latent]
        contents.time += [0.0, 0.5, 0.0]
        pictures = [Image(LATENT, prompt.latent_grid, noise=True), Image(LATENT, prompt.latent_grid)]
        rows.append([*prompt.segments(), Text(prompt.question, scored=True), *pictures, Text([5, 6], scored=True)])
    return layout(rows, SpecialTokens(0, 1, 2, 3))[0], contents


def outputs(model: Bagel, given) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text logits, their targets and velocities."""
    hidden = model(*given)
    return *model.scored_logits(hidden, given[0]), model.velocities(hidden, given[0])


def loss_of(model: Bagel, given) -> torch.Tensor:
    """Answer loss and velocity loss together."""
    logits, target, velocity = outputs(model, given)
    return F.cross_entropy(logits, target) + velocity.pow(2).mean()


@pytest.fixture
def folders(tmp_path):
    """A folder with weights and one with an adapter on them; also the adapted model itself."""
    plain, tokenizer = tiny_model("direct")
    save_bagel(tmp_path / "base", plain, AutoEncoder(plain.config.vae), tokenizer)
    model, _ = adapted()
    files = fingerprint(tmp_path / "base")
    lora.save_adapter(tmp_path / "adapter", model, tmp_path / "base", files, torch.float32)
    return tmp_path / "base", tmp_path / "adapter", model, tokenizer


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


def test_a_folder_gives_the_same_model_back_and_peft_reads_it_too(folders):
    base, folder, model, tokenizer = folders
    assert {p.name for p in folder.iterdir()} == {lora.ADAPTER, lora.ADAPTER_CONFIG, lora.BASE}
    given = batch(tokenizer)
    again, _, loaded = lora.load_model(folder)
    assert loaded.get_vocab() == tokenizer.get_vocab() and not again.training
    assert all(torch.equal(a, b) for a, b in zip(outputs(again, given), outputs(model, given), strict=True))
    peft = PeftModel.from_pretrained(load_bagel(base)[0], str(folder)).base_model.model.eval()
    assert all(torch.equal(a, b) for a, b in zip(outputs(peft, given), outputs(model, given), strict=True))


def test_a_folder_with_a_bridge_gives_it_back(tmp_path):
    plain, tokenizer = tiny_model("direct")
    save_bagel(tmp_path / "base", plain, AutoEncoder(plain.config.vae), tokenizer)
    model, _ = adapted("mlp")
    files = fingerprint(tmp_path / "base")
    lora.save_adapter(tmp_path / "a", model, tmp_path / "base", files, torch.float32)
    again, _, _ = lora.load_model(tmp_path / "a")
    assert again.config.bridge == "mlp"
    assert all(torch.equal(v, model.bridge.state_dict()[k]) for k, v in again.bridge.state_dict().items())


def test_merged_weights_give_the_outputs_of_base_and_adapter(folders, tmp_path):
    _, folder, model, tokenizer = folders
    lora.merge(folder, tmp_path / "merged", torch.float32)
    merged, _, _ = load_bagel(tmp_path / "merged")
    given = batch(tokenizer)
    for found, expected in zip(outputs(merged, given), outputs(model, given), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    with pytest.raises(ClearError, match="not empty"):
        lora.merge(folder, tmp_path / "merged", torch.float32)
    with pytest.raises(ClearError, match="holds no adapter"):
        lora.merge(tmp_path / "merged", tmp_path / "again", torch.float32)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_the_command_merges_onto_weights_that_have_moved(folders, tmp_path, clear, weights):
    base, folder, model, tokenizer = folders
    base.rename(tmp_path / "moved")
    status, _, stderr = clear("merge", folder, tmp_path / "merged", "--weights", weights)
    assert status == 1 and "which is not here" in stderr and not (tmp_path / "merged").exists()
    asked = ("merge", folder, tmp_path / "merged", "--base", tmp_path / "moved", "--weights", weights)
    status, stdout, _ = clear(*asked)
    assert (status, stdout) == (0, f"{tmp_path / 'merged'} written.\n") and not lora.is_adapter(tmp_path / "merged")
    assert {v.dtype for v in load_file(tmp_path / "merged" / MODEL).values()} == {getattr(torch, weights)}
    merged, _, loaded = load_bagel(tmp_path / "merged")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    given, close = batch(tokenizer), (2e-5, 1e-5) if weights == "float32" else (0.1, 0.05)
    for found, expected in zip(outputs(merged, given), outputs(model, given), strict=True):
        torch.testing.assert_close(found, expected, atol=close[0], rtol=close[1])
    status, _, stderr = clear(*asked)
    assert status == 1 and "not empty" in stderr


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_sums_on_bfloat16_weights_are_made_in_float32_and_rounded_once(tmp_path, kind):
    model, tokenizer = tiny_model("direct")
    save_bagel(tmp_path / "base", model.to(torch.bfloat16), AutoEncoder(model.config.vae), tokenizer)
    model, _ = adapted()
    lora.save_adapter(tmp_path / "a", model, tmp_path / "base", fingerprint(tmp_path / "base"), torch.float32)
    base, wide = load_file(tmp_path / "base" / MODEL), lora.load_model(tmp_path / "a", torch.float32)[0]
    lora.merge(tmp_path / "a", tmp_path / "merged", kind)
    found = load_file(tmp_path / "merged" / MODEL)
    deltas = {name + ".weight": layer.get_delta_weight(lora.TRAINED) for name, layer in lora._layers(wide)}
    assert deltas and found.keys() == base.keys()
    for key, value in base.items():
        assert torch.equal(found[key], (value.float() + deltas.get(key, 0.0)).to(kind)), key


@pytest.mark.parametrize("way", ["trained", "merged"])
def test_the_files_of_a_byte_pair_tokenizer_are_kept_for_the_published_code(config, tmp_path, way):
    from transformers import Qwen2Tokenizer

    base, out = tmp_path / "base", tmp_path / "out"
    qwen_folder(base)
    expected = Qwen2Tokenizer.from_pretrained(base)
    config.lora.rank = 2 if way == "merged" else 0
    start = incoming(base, config)
    save(tmp_path / "adapter" if way == "merged" else out, start, config)
    if way == "merged":
        lora.merge(tmp_path / "adapter", out, torch.float32)
    assert {name: (out / name).read_bytes() for name in PAIRS} == {name: (base / name).read_bytes() for name in PAIRS}
    (tmp_path / "pairs").mkdir()
    for name in PAIRS:
        (tmp_path / "pairs" / name).write_bytes((out / name).read_bytes())
    readers = [Qwen2Tokenizer.from_pretrained(folder) for folder in (out, tmp_path / "pairs")]
    for text in TEXTS:
        ids = expected.encode(text)
        assert [reader.encode(text) for reader in readers] == [ids, ids]
        assert encode(load_bagel(out)[2], text) == expected.encode(text, split_special_tokens=True)
    plain, tokenizer = tiny_model("direct")
    save_bagel(out, plain, AutoEncoder(plain.config.vae), tokenizer)
    assert not any((out / name).exists() for name in PAIRS), "another tokenizer takes their place"


def test_another_base_is_refused(folders, tmp_path):
    base, folder, _, _ = folders
    state = load_file(base / MODEL)
    state["llm2vae.bias"] += 1
    save_file(state, base / MODEL)
    with pytest.raises(ClearError, match="is not the file that"):
        lora.load_model(folder)
    with pytest.raises(ClearError, match="not here"):
        lora.load_model(folder, base=tmp_path / "elsewhere")


def test_another_base_of_the_same_size_is_refused_where_files_are_too_large_to_hash(folders, monkeypatch):
    base, _, model, _ = folders
    for module in (folder_format, lora):
        monkeypatch.setattr(module, "HASHED_ON_LOAD", 10_000)
    monkeypatch.setattr(folder_format, "_SAMPLE", 64)
    folder, file = base.parent / "large", base / MODEL
    lora.save_adapter(folder, model, base, fingerprint(base), torch.float32)
    records = json.loads((folder / lora.BASE).read_text())
    assert {name for name, known in records["files"].items() if "samples_sha256" in known} == {MODEL, "ae.safetensors"}
    lora.load_model(folder)

    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    assert header > 100 * 64, "more than the first slice holds"
    for place in (header // 2, (len(whole) - 64) * 31 // 63 + 40, len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(ClearError, match="is not the file that"):
            lora.base_of(folder)
    for known in records["files"].values():
        known.pop("samples_sha256", None)
    (folder / lora.BASE).write_text(json.dumps(records))
    assert lora.base_of(folder) == base, "an adapter of before says the size alone"
    file.write_bytes(whole[:-1])
    with pytest.raises(ClearError, match="is not the file that"):
        lora.base_of(folder)


def test_all_keys_of_a_broken_adapter_are_named_with_their_shapes(folders):
    file = folders[1] / lora.ADAPTER
    state = load_file(file)
    missing, other, *_ = sorted(state)
    shapes = [tuple(state[key].shape) for key in (missing, other)]
    del state[missing]
    state[other] = state[other][:1].contiguous()
    save_file(state | {"surplus.weight": torch.zeros(2, 7)}, file)
    with pytest.raises(ClearError) as refused:
        lora.load_model(folders[1])
    said = str(refused.value)
    assert f"{file}: 3 problems: key {missing} {shapes[0]} is missing; " in said
    assert f"key {other} has shape {(1, *shapes[1][1:])}, the configs say {shapes[1]}; " in said
    assert "key surplus.weight (2, 7) is not part of this model. adapter_config.json, base.json or the base" in said


def test_a_truncated_adapter_is_refused_by_name(folders):
    file = folders[1] / lora.ADAPTER
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ClearError, match=rf"{lora.ADAPTER} is truncated"):
        lora.load_model(folders[1])


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
    with lora.autocast(low):
        loss = loss_of(low, given)
    loss.backward()
    expected = loss_of(model, given)
    assert abs(loss.item() - expected.item()) < 0.05 * expected.item()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in low.parameters() if p.requires_grad)
    with lora.autocast(low.eval()):
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


def test_an_adapter_says_which_of_several_weight_files_it_adapts(folders, tmp_path):
    base, folder, model, _ = folders
    (base / PLAIN).write_bytes((base / MODEL).read_bytes())
    with pytest.raises(ClearError, match=r"several models' weights"):
        lora.load_model(folder)
    lora.load_model(folder, base=base / MODEL)
    with pytest.raises(ClearError, match=rf"{PLAIN} is not what .* was trained on, but .*{MODEL}"):
        lora.load_model(folder, base=base / PLAIN)
    named = base / PLAIN
    lora.save_adapter(tmp_path / "other", model, named, fingerprint(named), torch.float32)
    lora.load_model(tmp_path / "other")
    lora.merge(tmp_path / "other", tmp_path / "merged", torch.float32)
    assert (tmp_path / "merged" / MODEL).exists()


def test_a_base_file_names_no_more_than_the_base(folders):
    base, folder, _, _ = folders
    known = json.loads((folder / lora.BASE).read_text())
    assert known["folder"] == str(base) and set(known["files"]) == {p.name for p in Path(base).iterdir()}


def test_a_save_that_breaks_leaves_the_old_adapter(folders, tmp_path, monkeypatch):
    """All files are written under temporary names and renamed at the end; a kill between the renames is refused."""
    base, folder = folders[0], tmp_path / "adapter"
    model, _ = adapted()
    lora.save_adapter(folder, model, base, fingerprint(base), torch.float32)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.add_(1.0)
    original = Path.write_text

    def full(self, text):
        if self.name.startswith("base.json"):
            raise OSError("no space left")
        return original(self, text)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space left"):
            lora.save_adapter(folder, model, base, fingerprint(base), torch.float32)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    lora.load_model(folder)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "unlink", lambda self, missing_ok=False: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lora.save_adapter(folder, model, base, fingerprint(base), torch.float32)
    with pytest.raises(ClearError, match="half-written"):
        lora.load_model(folder)


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
