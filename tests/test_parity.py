"""The model is the published mathematics: pieces, prefill, packed training, distillation and gradients.

Numbers of the reference implementation (tests/reference.py); the tolerances are those under which two float32
implementations of the same formulas differ by rounding only. Generation is in test_parity_generation.py.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from clear.data.images import encode_image
from clear.model.bagel import Contents
from clear.model.bridge import distilled_layers, token_distillation
from clear.model.checkpoint import load_bagel
from clear.model.images import ImageBank, target_size, vae_array
from clear.model.mot import rotary
from clear.model.sequence import LATENT, VIT, Text, layout
from clear.model.vae import patchify, unpatchify
from clear.training.sft import distillation, taught_pairs
from tests.reference import (
    CASES,
    GOLDEN,
    close,
    conversation,
    greedy,
    image_size,
    packed_contents,
    packed_layout,
    spans,
    tokens,
    vit_input,
)

# --- pieces


def test_vision_tower(model, golden):
    conv, tower = golden["vit.conv_weight"], model.vit_model.vision_model
    assert torch.equal(tower.embeddings.patch_embedding.weight, conv.permute(0, 2, 3, 1).flatten(1))
    names = [f"vit.image{i}" for i in range(len(CASES["vit"]["params"]["image_sizes_hw"]))]
    patches = [vit_input(model, golden[name])[0] for name in names]
    assert torch.equal(torch.cat(patches), golden["vit.packed_tokens"])
    ids, side = golden["vit.position_ids"], model.config.vit.side
    with torch.no_grad():
        embedded = tower.embeddings.patch_embedding(torch.cat(patches)) + tower.embeddings.position_embedding(ids)
        parts = zip(patches, ids.split([len(p) for p in patches]), strict=True)
        features = torch.cat([model.vit_model(p[None], at[None])[0] for p, at in parts])
        found = model.vit_tokens(patches, torch.stack([ids // side, ids % side], 1))
        connected = model.connector(features)
    close(embedded, golden["vit.embeddings"], 2e-5)
    close(features, golden["vit.last_hidden"], 2e-5)
    close(connected, golden["vit.connector"], 2e-5)
    close(found, golden["vit.output"], 2e-5)


def test_autoencoder_and_its_two_posteriors(bagel, golden):
    model, vae, _ = bagel
    image, noise = golden["vae.image"], golden["vae.noise"]
    with torch.no_grad():
        mean, log_var = vae.moments(image)
        sampled, central = vae.encode(image, noise), vae.encode(image)
        decoded = vae.decode(golden["vae.latent_sample"])
        context = vae.encode(golden["inputs.vae_pixels"][None], golden["inputs.vae_noise"])
    close(mean, golden["vae.mean"], 2e-5)
    close(log_var, golden["vae.logvar"], 2e-5)
    close(central, golden["vae.latent_mean"], 2e-5)
    close(sampled, golden["vae.latent_sample"], 2e-5)
    close(decoded, golden["vae.decoded"], 2e-5)
    close(context, golden["prefill_vae_vit.vae_latent"], 2e-5)
    found, grid = tokens(model, golden["vae.latent_sample"])
    assert torch.equal(found, golden["vae.patchified"])
    assert torch.equal(unpatchify(found[None], grid, model.config.latent_patch), golden["vae.latent_sample"])


def test_time_embedding(model, golden):
    seen = []
    hook = model.time_embedder.mlp[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        found = model.time_embedder(golden["time_embed.t"])
    hook.remove()
    close(seen[0], golden["time_embed.freq"], 1e-6)
    close(found, golden["time_embed.output"], 1e-5)


def test_rotary_embedding(model, golden):
    llm = model.config.llm
    cos, sin = rotary(golden["rope.positions"][None], llm.head_dim, llm.rope_theta, torch.float32)
    close(cos[0, 0], golden["rope.cos"], 1e-5)
    close(sin[0, 0], golden["rope.sin"], 1e-5)


def test_sizes_of_the_image_transforms(golden):
    for width, height, *expected in golden["resize.table"].tolist():
        vae = target_size(height, width, 1024, 512, 16)
        vit, again = target_size(height, width, 518, 224, 14), target_size(*vae, 518, 224, 14)
        assert [*vae[::-1], *vit[::-1], *again[::-1]] == expected, (width, height)


def test_image_transforms_of_training(model, golden):
    """`resize: direct` is the reference's training: source → ViT size."""
    size = image_size(CASES["transform"]["params"], "direct")
    bank = ImageBank([encode_image(golden["transform.uint8"].numpy())], size)
    close(bank.pixels(0), golden["transform.vae_out"], 1e-6)
    patches, grid = vit_input(model, golden["transform.vit_out"])
    assert bank.vit_grid(0) == grid
    close(bank.patches(0), patches, 1e-6)


def test_image_transforms_of_inference(model, golden):
    """`resize: reference` is the reference's inference: source → VAE size → ViT size."""
    size = image_size(CASES["inputs"]["params"], "reference")
    source = golden["inputs.image_uint8"].numpy()
    assert (vae_array(source, size) == golden["inputs.image_resized_uint8"].numpy()).all()
    bank = ImageBank([encode_image(source)], size)
    close(bank.pixels(0), golden["inputs.vae_pixels"], 1e-6)
    patches, grid = vit_input(model, golden["inputs.vit_pixels"])
    assert bank.vit_grid(0) == grid
    close(bank.patches(0), patches, 1e-6)


# --- understanding: prefill and greedy decoding


@pytest.mark.parametrize("which", ["vit", "vae_vit"])
@torch.no_grad()
def test_prefill_then_greedy_decoding(model, golden, which):
    name = f"prefill_{which}"
    segments, contents = conversation(model, golden, name)
    built, ends = layout([segments], model.config.special)
    cache = model.new_cache(1, 8)
    embeds = model.embed(built, contents)[0]
    hidden = model(built, contents, cache, write=True)
    merged = hidden.routing.merge(hidden.und, hidden.gen)[0]
    parts = [part for part in ("system", "vae", "vit", "question") if f"{name}.{part}.embeds" in golden]
    for part, (start, end) in zip(parts, spans(golden[f"{name}.{p}.embeds"] for p in parts), strict=True):
        close(embeds[start:end], golden[f"{name}.{part}.embeds"], 1e-4)
        close(merged[start:end], golden[f"{name}.{part}.hidden"], 1e-4)
        assert torch.equal(built.rope[0, start:end], golden[f"{name}.{part}.position_ids"])
        assert torch.equal(torch.arange(start, end), golden[f"{name}.{part}.kv_index"])
    assert ends == [int(golden[f"{name}.rope"])]
    length = int(golden[f"{name}.kv_len"])
    assert cache.lengths.tolist() == [length] == [built.ids.shape[1]]
    for i in range(model.config.llm.layers):
        close(cache.keys[i][0, :, :length].transpose(0, 1), golden[f"{name}.k{i}"], 1e-4)
        close(cache.values[i][0, :, :length].transpose(0, 1), golden[f"{name}.v{i}"], 1e-4)
    bos, _ = layout([[Text([], eos=False)]], model.config.special, rope=ends)
    after = model(bos, Contents(), cache).und[-1]
    close(after, golden[f"{name}.next_hidden"], 1e-4)
    close(model.language_model.lm_head(after), golden[f"{name}.next_logits"], 1e-4)
    greedy(model, cache, ends[0], golden, f"greedy_{which}")


# --- training: packed samples


@pytest.mark.parametrize("name", ["train", "train_two"])
def test_packed_layout_is_the_references(model, golden, name):
    built = packed_layout(model, golden, name)
    assert torch.equal(built.rope[0], golden[f"{name}.packed_position_ids"])
    assert torch.equal(built.allowed()[0], golden[f"{name}.attention_mask"])
    assert torch.equal(built.noisy[0].nonzero().squeeze(1), golden[f"{name}.mse_loss_indexes"])
    assert torch.equal((built.target[0] >= 0).nonzero().squeeze(1), golden[f"{name}.ce_loss_indexes"])
    for kind, key, table in ((VIT, "vit", model.config.vit.side), (LATENT, "latent", model.config.max_latent_size)):
        place = built.place[0][built.kind[0] == kind]
        assert torch.equal(place[:, 0] * table + place[:, 1], golden[f"{name}.packed_{key}_position_ids"])


@pytest.mark.parametrize(
    ("name", "inputs"), [("train", "train"), ("train_shift3", "train"), ("train_two", "train_two")]
)
@torch.no_grad()
def test_packed_training_forward(model, golden, name, inputs):
    built = packed_layout(model, golden, inputs)
    contents, velocity_target = packed_contents(golden, inputs, CASES[name]["params"].get("timestep_shift", 1.0))
    per_token = torch.cat([t.expand(len(x)) for t, x in zip(contents.time, contents.latent, strict=True)])
    close(per_token, golden[f"{name}.packed_timesteps"], 1e-6)
    if f"{name}.x_t" in golden:
        close(torch.cat(contents.latent), golden[f"{name}.x_t"], 1e-6)
    hidden = model(built, contents)
    logits, target = model.scored_logits(hidden, built)
    ce = F.cross_entropy(logits, target, reduction="none")
    mse = (model.velocities(hidden, built) - velocity_target) ** 2
    close(hidden.routing.merge(hidden.und, hidden.gen)[0], golden[f"{name}.last_hidden"], 1e-4)
    assert torch.equal(target, golden[f"{inputs}.packed_label_ids"])
    close(ce, golden[f"{name}.ce"], 1e-4)
    close(mse, golden[f"{name}.mse"], 2e-4)
    if f"{name}.ce_mean" in golden:
        close(ce.mean(), golden[f"{name}.ce_mean"], 1e-4)
        close(mse.mean(), golden[f"{name}.mse_mean"], 2e-4)


@pytest.mark.parametrize("name", ["train", "train_two"])
def test_latents_of_a_pack_padded_to_one_size(bagel, golden, name):
    model, vae, _ = bagel
    p, images = model.config.latent_patch, golden[f"{name}.padded_images"]
    with torch.no_grad():
        z = vae.encode(images, golden[f"{name}.vae_noise"])
    close(z, golden[f"{name}.padded_latent"], 2e-5)
    cropped = [patchify(z[i, None, :, : h * p, : w * p], p)[0] for i, (h, w) in enumerate(shapes(golden, name))]
    close(torch.cat(cropped), golden[f"{name}.packed_latent_clean"], 2e-5)


def shapes(golden, name):
    return golden[f"{name}.latent_shapes"].tolist()


# --- distillation and gradients


def distill_pairs(built, golden):
    """The golden pairs (number of the ViT image, number of the VAE image) as (row, latent segment, ViT segment)."""
    block = {kind: built.block[0][built.kind[0] == kind].unique().tolist() for kind in (VIT, LATENT)}
    return [(0, block[LATENT][vae], block[VIT][vit]) for vit, vae in golden["distill.distill_pairs"].tolist()]


def as_trained_here(built, pairs):
    """The same layout with the teachers as this project trains them: visible to nobody else."""
    noise = built.noise.clone()
    for row, _, vit in pairs:
        noise[row][built.block[row] == vit] = vit
    return replace(built, noise=noise)


@pytest.mark.parametrize("hidden_teacher", [False, True])
@torch.no_grad()
def test_distillation(model, golden, hidden_teacher):
    built = packed_layout(model, golden, "train")
    pairs, count = distill_pairs(built, golden), model.config.llm.layers
    if hidden_teacher:
        built = as_trained_here(built, pairs)
        assert taught_pairs(built) == pairs
    hidden = model(built, packed_contents(golden, "train")[0], collect=range(count))
    given = None if hidden_teacher else pairs
    strides = [int(k.removeprefix("distill.per_layer_kl_stride")) for k in golden if "per_layer_kl_stride" in k]
    assert strides
    for stride in strides:
        found = distillation(hidden, built, distilled_layers(count, stride), stride, given)
        close(found, golden[f"distill.per_layer_kl_stride{stride}"].mean(), 1e-5)
    close(distillation(hidden, built, [], 0, given), golden["distill.final_mse"].mean(), 1e-5)
    row, latent, vit = pairs[0]
    student, teacher = built.block[row] == latent, built.block[row] == vit
    student, teacher = student & (built.kind[row] == LATENT), teacher & (built.kind[row] == VIT)
    for i in range(count):
        raw = hidden.layers[i][row]
        close(raw[student | teacher], golden[f"distill.layer{i}_hidden"][student | teacher], 1e-4)
        if len(pairs) == 1:
            close(token_distillation(raw[student], raw[teacher]), golden["distill.layer_kl"][i], 1e-5)


def test_gradients_of_the_total_loss(golden):
    model, _, _ = load_bagel(GOLDEN)
    weights, count = CASES["grads"]["params"], model.config.llm.layers
    built = packed_layout(model, golden, "train")
    contents, velocity_target = packed_contents(golden, "train")
    hidden = model(built, contents, collect=range(count))
    for i in range(count):
        close(hidden.layers[i][0], golden[f"distill.layer{i}_hidden"], 1e-4)
    ce = F.cross_entropy(*model.scored_logits(hidden, built))
    mse = F.mse_loss(model.velocities(hidden, built), velocity_target)
    kl = distillation(hidden, built, distilled_layers(count, 1), 1, distill_pairs(built, golden))
    total = weights["ce_weight"] * ce + weights["mse_weight"] * mse + weights["distill_weight"] * kl
    total.backward()
    close(total.detach(), golden["grads.total_loss"], 2e-4)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == set(weights["names"])
    norms = torch.stack([found[name].norm() for name in weights["names"]])
    torch.testing.assert_close(norms, golden["grads.grad_norms"], rtol=1e-3, atol=1e-5)
    whole = [key for key in golden if key.startswith("grads.grad.")]
    assert whole
    for key in whole:
        expected = golden[key]
        error = (found[key.removeprefix("grads.grad.")] - expected).norm() / expected.norm()
        assert error < 1e-3, key
