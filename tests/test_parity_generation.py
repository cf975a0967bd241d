"""Generation is the published mathematics: contexts, guidance, ODE and SDE, and the restored image in the context.

Numbers of the reference implementation (tests/reference.py).
"""

import itertools

import pytest
import torch

from clear.model import flow
from clear.model.bagel import Contents
from clear.model.images import resize, to_uint8, vit_patches
from clear.model.sequence import LATENT, Image, Text, layout
from clear.model.vae import unpatchify
from clear.reasoning import engine
from clear.reasoning.engine import Context, Options, join_contexts, velocities
from clear.reasoning.prompts import Prompt
from tests.reference import CASES, close, greedy, image_size, tokens, vit_input

GENERATIONS = [name for name in CASES if name.startswith("gen_ode")]


def asked(model, golden):
    """The prompt of the cases that read the image both as a latent and with the ViT."""
    latent, latent_grid = tokens(model, golden["prefill_vae_vit.vae_latent"])
    patches, vit_grid = vit_input(model, golden["inputs.vit_pixels"])
    texts = (tuple(golden[f"inputs.{name}_ids"].tolist()) for name in ("system", "question"))
    return Prompt(*texts, latent, latent_grid, patches, vit_grid)


class Vocabulary:
    """Stands for a tokenizer where ids are all that is known: the golden cases have no words."""

    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab(self, with_added_tokens: bool) -> dict[str, int]:
        """The highest id tells how many there are."""
        return {"last": self.size - 1}


def test_the_engine_says_what_the_reference_says(model, golden):
    sequence = golden["greedy_vae_vit.sequence"].tolist()
    logits = golden["greedy_vae_vit.logits"]
    options = Options(restore="plain", max_tokens=len(sequence) - 1)
    prompts = [asked(model, golden)] * 2
    for found in engine.generate(model, Vocabulary(model.config.llm.vocab), prompts, options):
        (reply,) = found.replies
        assert sequence == [model.config.special.bos, *reply.ids] and reply.forced == 0
        close(torch.tensor(reply.log_probs), logits.log_softmax(-1).amax(-1)[: len(reply.ids)], 1e-4)


def spoken(model, golden):
    """The engine's rows after prompt and thought, with the prompt."""
    prompt = asked(model, golden)
    rows = engine.prefill(model, [prompt])
    engine.text_reply(model, rows, golden["gen_context.think_ids"].tolist())
    return rows, prompt


@pytest.fixture(scope="module")
def rows_and_contexts(model, golden):
    """Rows before generation, and the three contexts (whole, without the thought, without the image)."""
    with torch.no_grad():
        rows, prompt = spoken(model, golden)
        dropped = engine.dropped_contexts(model, rows, [prompt], flow.Guidance(text=2.0, image=2.0))
    return rows, [Context(rows.cache, rows.rope), *dropped]


def test_contexts_of_guidance(rows_and_contexts, golden):
    _, contexts = rows_and_contexts
    for context, prefix in zip(contexts, ("", "cfg_text_", "cfg_img_"), strict=True):
        assert context.cache.lengths.tolist() == [int(golden[f"gen_context.{prefix}kv_len"])]
        assert context.rope.tolist() == [int(golden[f"gen_context.{prefix}rope"])]


def guidance_of(params):
    low, high = params.get("cfg_interval", (0.0, 1.0))
    renorm = params.get("cfg_renorm_type", "global"), params.get("cfg_renorm_min", 0.0)
    return flow.Guidance(params["cfg_text_scale"], params["cfg_img_scale"], low, high, *renorm)


@pytest.mark.parametrize("name", GENERATIONS)
@torch.no_grad()
def test_generation_step_by_step(model, golden, rows_and_contexts, name):
    params, grid = CASES[name]["params"], tuple(golden["gen_context.grid"].tolist())
    guidance, joint = guidance_of(params), join_contexts(rows_and_contexts[1])
    times = flow.time_grid(params["num_timesteps"] - 1, params["timestep_shift"])
    close(times[:-1], golden[f"{name}.timesteps"], 1e-6)
    assert params["cfg_text_scale"] <= 1 or any(guidance.active(t) for t in times.tolist())
    states = [*golden[f"{name}.x_t"], golden[f"{name}.final_latent"]]
    for i, (t, t_next) in enumerate(itertools.pairwise(times.tolist())):
        x = states[i][None]
        raw = velocities(model, joint, grid, x.repeat(3, 1, 1), t).chunk(3)
        for v, key in zip(raw, ("v_cond", "v_text", "v_img"), strict=True):
            if f"{name}.{key}" in golden and (key == "v_cond" or guidance.active(t)):
                close(v[0], golden[f"{name}.{key}"][i], 1e-4)
        v = flow.guide(*raw, guidance) if guidance.active(t) else raw[0]
        close(v[0], golden[f"{name}.v_t"][i], 1e-4)
        close(flow.euler_step(x, v, t, t_next)[0], states[i + 1], 1e-4)


@pytest.mark.parametrize("name", GENERATIONS)
@torch.no_grad()
def test_generation_from_noise(bagel, golden, rows_and_contexts, name):
    model, vae, _ = bagel
    params, grid = CASES[name]["params"], tuple(golden["gen_context.grid"].tolist())
    options = Options(
        flow_steps=params["num_timesteps"] - 1, shift=params["timestep_shift"], guidance=guidance_of(params)
    )
    rows, (_, *dropped) = rows_and_contexts
    noise = golden["gen_context.init_noise"][None]
    found = engine.denoise(model, rows.cache, rows.rope, grid, noise, options, dropped=dropped).x0
    close(found[0], golden[f"{name}.final_latent"], 1e-4)
    if f"{name}.decoded" in golden:
        picture = vae.decode(unpatchify(golden[f"{name}.final_latent"][None], grid, model.config.latent_patch))
        close(picture, golden[f"{name}.decoded"], 2e-5)
        pixels = torch.from_numpy(to_uint8(picture[0])).int()
        assert (pixels - golden[f"{name}.decoded_uint8"].int()).abs().max() <= 1, "the reference truncates"
        fed = model.latent_tokens(found, [0.0], places(grid))
        close(fed, golden[f"{name}.final_latent_llm"], 1e-4)


def places(grid):
    return torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1]))


@torch.no_grad()
def test_stochastic_generation_and_its_log_probabilities(model, golden, rows_and_contexts):
    params, grid = CASES["gen_sde"]["params"], tuple(golden["gen_context.grid"].tolist())
    sigma, context = params["sde_sigma"], rows_and_contexts[1][0]
    case = {name.removeprefix("gen_sde."): value for name, value in golden.items() if name.startswith("gen_sde.")}
    times = flow.time_grid(params["num_timesteps_sde"] - 1, params["timestep_shift"])
    close(times[:-1], case["timesteps"], 1e-6)
    close(times[:-1] - times[1:], case["dt"], 1e-6)
    x = golden["gen_context.init_noise"][None]
    for i, (t, t_next) in enumerate(itertools.pairwise(times.tolist())):
        close(x[0], case["x_t"][i], 1e-4)
        v = velocities(model, context, grid, x, t)
        close(v[0], case["v_t"][i], 1e-4)
        close(flow.sde_mean(x, v, t, t_next, sigma)[0], case["mean"][i], 1e-4)
        x, log_prob = flow.sde_step(x, v, case["noise"][i][None], t, t_next, sigma)
        close(x[0], case["x_next"][i], 1e-4)
        close(log_prob[0], case["log_prob"][i], 1e-5)
        other = flow.sde_mean(case["x_t"][i], case["perturbed_v"][i], t, t_next, sigma)
        found = flow.sde_log_prob(case["x_next"][i], other, sigma, t - t_next)
        close(found, case["perturbed_log_prob"][i], 1e-5)
    close(x[0], case["final_latent"], 1e-4)


@torch.no_grad()
def test_velocities_in_the_cache(model, golden, rows_and_contexts):
    grid, context = tuple(golden["gen_context.grid"].tolist()), rows_and_contexts[1][0]
    names = {key.split(".")[1] for key in golden if key.startswith("consistency.velocity")}
    assert names
    for name in names:
        t, x, v = (golden[f"consistency.{name}.{part}"] for part in ("t", "x_t", "v"))
        close(velocities(model, context, grid, x[None], t.item())[0], v, 1e-4)


# --- the restored image goes back into the context


def before_feedback(model, golden, name):
    rows, _ = spoken(model, golden)
    latents = golden[f"{CASES[name]['params']['source_case']}.final_latent"][None]
    return rows, latents, tuple(golden["gen_context.grid"].tolist())


def reencode(model, golden, name):
    patches, grid = vit_input(model, golden[f"{name}.vit_pixels"])
    return lambda *_: (patches[None], grid)


@torch.no_grad()
def test_latent_feedback(model, golden):
    name = "feedback_vae"
    rows, latents, grid = before_feedback(model, golden, name)
    before, rope = rows.cache.lengths.tolist(), rows.rope.tolist()
    one, _ = layout([[Image(LATENT, grid)]], model.config.special, rope=rope)
    contents = Contents(latent=latents, time=[0.0])
    hidden = model(one, contents, rows.cache)
    close(model.embed(one, contents)[0], golden[f"{name}.vae.embeds"], 1e-4)
    close(hidden.routing.merge(hidden.und, hidden.gen)[0], golden[f"{name}.vae.hidden"], 1e-4)
    assert torch.equal(one.rope[0], golden[f"{name}.vae.position_ids"])
    engine.feed_back(model, rows, latents, grid)
    assert rows.cache.lengths.tolist() == [int(golden[f"{name}.kv_len"])]
    assert rows.rope.tolist() == [int(golden[f"{name}.rope"])]
    # The reference writes the rows of this segment to the cache in another order, which changes nothing.
    at = torch.cat([torch.arange(before[0]), golden[f"{name}.vae.kv_index"]])
    for which, store in (("k0", rows.cache.keys), ("v0", rows.cache.values)):
        close(store[0][0, :, : len(at)].transpose(0, 1), golden[f"{name}.{which}"][at], 1e-4)
    bos, _ = layout([[Text([], eos=False)]], model.config.special, rope=rows.rope.tolist())
    after = model(bos, Contents(), rows.cache).und[-1]
    close(after, golden[f"{name}.next_hidden"], 1e-4)
    close(model.language_model.lm_head(after), golden[f"{name}.next_logits"], 1e-4)


@pytest.mark.parametrize(
    ("name", "ways"), [("feedback_vit", ["reencode"]), ("feedback_vae_vit", ["bridge", "reencode"])]
)
@torch.no_grad()
def test_feedback_by_the_vision_tower(model, golden, name, ways):
    rows, latents, grid = before_feedback(model, golden, name)
    for way in ways:
        engine.feed_back(model, rows, latents, grid, way, reencode(model, golden, name))
    assert rows.cache.lengths.tolist() == [int(golden[f"{name}.kv_len"])]
    assert rows.rope.tolist() == [int(golden[f"{name}.rope"])]
    greedy(model, rows.cache, int(rows.rope), golden, name)


@pytest.mark.parametrize("name", ["feedback_vit", "feedback_vae_vit"])
def test_the_decoded_picture_becomes_patches(model, golden, name):
    picture = golden[f"{CASES[name]['params']['source_case']}.decoded_uint8"].numpy()
    size = image_size(CASES["inputs"]["params"], "reference")
    found, grid = vit_patches(picture, size)
    patches, expected_grid = vit_input(model, golden[f"{name}.vit_pixels"])
    assert grid == expected_grid
    close(found, patches, 1e-6)
    assert resize(picture, picture.shape[:2]) is picture
