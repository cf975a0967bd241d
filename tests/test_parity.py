"""The model is the published mathematics: numbers of the reference implementation on a tiny random model.

`tests/golden/` holds inputs and outputs of the reference (float32, CPU). Tolerances are those under which two
float32 implementations of the same formulas differ by rounding only.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clear.model import flow
from clear.model.bagel import Contents
from clear.model.checkpoint import load_bagel
from clear.model.sequence import LATENT, VIT, Image, Text, layout
from clear.model.vae import patchify

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "cases.safetensors")


@pytest.fixture(scope="module")
def bagel():
    return load_bagel(GOLDEN)


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_vit(bagel, golden):
    model, _, _ = bagel
    images = [golden["vit.image0"], golden["vit.image1"]]
    patches = [patchify(image[None], 14)[0] for image in images]
    close(torch.cat(patches), golden["vit.packed_tokens"], 0)
    ids = golden["vit.position_ids"]
    with torch.no_grad():
        found = model.vit_tokens(patches, torch.stack([ids // 70, ids % 70], 1))
    close(found, golden["vit.output"], 2e-5)


def test_vae(bagel, golden):
    _, vae, _ = bagel
    image = golden["inputs.vae_pixels"][None]
    with torch.no_grad():
        sampled = vae.encode(image, golden["inputs.vae_noise"])
        decoded = vae.decode(golden["vae.latent_sample"])
    close(sampled, golden["prefill_vae_vit.vae_latent"], 2e-5)
    close(decoded, golden["vae.decoded"], 2e-5)


def _train_segments(golden):
    ids, at = golden["train.packed_text_ids"], golden["train.packed_text_indexes"]
    text = dict(zip(at.tolist(), ids.tolist(), strict=True))
    segments, start = [], 0
    grids = {1: (3, 4), 2: (4, 5), 5: (3, 4), 6: (3, 4), 7: (3, 4)}
    for i, length in enumerate(golden["train.split_lens"].tolist()):
        if i in grids:
            segments.append(Image(VIT if i in (2, 7) else LATENT, grids[i], noise=i == 5))
        else:
            body = [text[j] for j in range(start + 1, start + length - 1)]
            segments.append(Text(body, scored=True if i in (4, 8) else None))
        start += length
    return segments


def test_packed_training_forward(bagel, golden):
    model, _, _ = bagel
    built, _ = layout([_train_segments(golden)], model.config.special)
    assert torch.equal(built.rope[0], golden["train.packed_position_ids"])
    assert torch.equal(built.allowed()[0], golden["train.attention_mask"])
    latents = golden["train.x_t"].split(12)
    times = [golden["train.packed_timesteps"][i].item() for i in (0, 12, 24)]
    patches = golden["train.packed_vit_tokens"].split(golden["train.vit_token_seqlens"].tolist())
    with torch.no_grad():
        hidden = model(built, Contents(vit=patches, latent=latents, time=times))
        merged = hidden.routing.merge(hidden.und, hidden.gen)[0]
        logits, target = model.scored_logits(hidden, built)
        velocity = model.velocities(hidden, built)
    close(merged, golden["train.last_hidden"], 1e-4)
    assert torch.equal(target, golden["train.packed_label_ids"])
    close(torch.nn.functional.cross_entropy(logits, target, reduction="none"), golden["train.ce"], 1e-4)
    clean = golden["train.packed_latent_clean"].split(12)
    noise = golden["train.noise"].split(12)
    which = next(i for i, t in enumerate(times) if t > 0)
    close((velocity - (noise[which] - clean[which])) ** 2, golden["train.mse"], 2e-4)


def test_prefill_then_greedy_decoding(bagel, golden):
    model, _, _ = bagel
    system, question = golden["inputs.system_ids"].tolist(), golden["inputs.question_ids"].tolist()
    latent = patchify(golden["prefill_vae_vit.vae_latent"], 2)
    patches = patchify(golden["inputs.vit_pixels"][None], 14)
    segments = [Text(system), Image(LATENT, (3, 4)), Image(VIT, (3, 5)), Text(question)]
    built, ends = layout([segments], model.config.special)
    cache = model.new_cache(1, 8)
    with torch.no_grad():
        model(built, Contents(vit=patches, latent=latent, time=[0.0]), cache, write=True)
        assert ends == [int(golden["prefill_vae_vit.rope"])]
        assert int(cache.lengths[0]) == int(golden["prefill_vae_vit.kv_len"])
        sequence = golden["greedy_vae_vit.sequence"].tolist()
        for step, token in enumerate(sequence):
            one, _ = layout([[Text([token], bos=False, eos=False)]], model.config.special, rope=[ends[0] + step])
            logits = model.language_model.lm_head(model(one, Contents(), cache, write=True).und[-1])
            close(logits, golden["greedy_vae_vit.logits"][step], 1e-4)
            assert int(logits.argmax()) == int(golden["greedy_vae_vit.argmax"][step])


def test_sde_step_and_log_probability(golden):
    for i in range(5):
        t, dt = golden["gen_sde.timesteps"][i].item(), golden["gen_sde.dt"][i].item()
        x, v, noise = (golden[f"gen_sde.{name}"][i][None] for name in ("x_t", "v_t", "noise"))
        x_next, log_prob = flow.sde_step(x, v, noise, t, t - dt, 0.3)
        close(x_next[0], golden["gen_sde.x_next"][i], 1e-5)
        close(log_prob[0], golden["gen_sde.log_prob"][i], 1e-5)
        mean = flow.sde_mean(x, golden["gen_sde.perturbed_v"][i][None], t, t - dt, 0.3)
        found = flow.sde_log_prob(golden["gen_sde.x_next"][i][None], mean, 0.3, dt)
        close(found[0], golden["gen_sde.perturbed_log_prob"][i], 1e-4)


def test_time_grid_is_the_shifted_linspace(golden):
    grid = flow.time_grid(5, 3.0)
    close(grid[:-1], golden["gen_sde.timesteps"], 1e-6)
