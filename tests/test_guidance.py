"""Guidance: what it costs, which contexts it drops, when it is on, and what is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clear.config import compose, from_dict
from clear.errors import ClearError
from clear.model import flow, mot
from clear.model.bagel import Contents
from clear.model.cache import CacheView, KVCache
from clear.model.flow import Guidance
from clear.model.sequence import LATENT, VIT, Image, Text, layout
from clear.reasoning import engine
from clear.reasoning.answering import Answerer
from clear.reasoning.engine import Context, Options, generate, velocities
from tests.helpers.generation import OPTIONS, decoding, forwards, ids_of
from tests.tiny import tiny_model, tiny_prompts

GUIDED = replace(OPTIONS, restore="always", noise_seed=1, guidance=Guidance(3.0, 2.0, low=0.0))


def _same(a, b):
    texts = ids_of(a) == ids_of(b) and all(
        x.log_probs == y.log_probs for s, t in zip(a, b, strict=True) for x, y in zip(s.replies, t.replies, strict=True)
    )
    latents = ((s.restorations, t.restorations) for s, t in zip(a, b, strict=True))
    return texts and all(torch.equal(x.x0, y.x0) for s, t in latents for x, y in zip(s, t, strict=True))


@pytest.mark.parametrize("off", [Guidance(1.0, 1.0), Guidance(1.0, 5.0), Guidance(1.0, 1.0, 0.0, 1.0, "channel", 0.5)])
def test_guidance_off_costs_nothing_and_changes_nothing(off):
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 3)
    plain = replace(OPTIONS, restore="always", noise_seed=1)
    sizes = forwards(model)
    expected = generate(model, tokenizer, prompts, plain)
    cost = list(sizes)
    sizes.clear()
    assert _same(generate(model, tokenizer, prompts, replace(plain, guidance=off)), expected)
    assert sizes == cost


def test_guidance_is_one_batched_forward_per_step():
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 3)
    sizes = forwards(model)
    generate(model, tokenizer, prompts, replace(GUIDED, guidance=Guidance()))
    plain = list(sizes)
    for guidance, expected in ((Guidance(3.0, 2.0, low=0.0), [3, 9, 9, 9]), (Guidance(3.0, 1.0, low=0.8), [6, 6, 3])):
        sizes.clear()
        found = generate(model, tokenizer, prompts, replace(GUIDED, guidance=guidance))
        # prompt, trigger reply, then the image-free context (with image guidance) and the steps; feedback and answer
        assert sizes == [*plain[:2], *expected, 3, *decoding(found, model, OPTIONS.max_tokens)]


def test_a_guided_batch_equals_one_by_one_and_differs_from_the_plain_one():
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 3)
    batch = generate(model, tokenizer, prompts, GUIDED)
    plain = generate(model, tokenizer, prompts, replace(GUIDED, guidance=Guidance()))
    outside = generate(model, tokenizer, prompts, replace(GUIDED, guidance=Guidance(3.0, 2.0, 0.0, 1e-6)))
    assert _same(outside, plain), "no step of the grid lies in the interval"
    for i, together in enumerate(batch):
        alone = generate(model, tokenizer, [prompts[i]], replace(GUIDED, noise_seed=1 + i))[0]
        x0 = together.restorations[0].x0
        torch.testing.assert_close(x0, alone.restorations[0].x0, atol=1e-4, rtol=0)
        assert (x0 - plain[i].restorations[0].x0).abs().max() > 1e-2


@torch.no_grad()
def test_a_view_reads_what_copies_would_hold_and_keeps_none():
    """Contexts of one conversation, side by side: fewer entries of the same rows, a row twice, another cache."""
    model, tokenizer = tiny_model()
    rows = engine.prefill(model, tiny_prompts(tokenizer, 3))
    other = engine.prefill(model, tiny_prompts(tokenizer, 2))
    engine.text_reply(model, rows, [12, 13, 14])
    index, fewer = torch.tensor([2, 0, 2]), rows.cache.lengths - 5
    shorter = rows.cache.select(torch.arange(3))
    shorter.lengths = fewer
    copies = KVCache.concatenate([rows.cache.select(index), shorter, other.cache])
    view = CacheView.beside_each_other(
        [CacheView(rows.cache, index), CacheView(rows.cache, lengths=fewer), other.cache]
    )
    assert torch.equal(view.lengths, copies.lengths) and torch.equal(view.visible(), copies.visible())
    x, rope = torch.randn(8, 9, 4), torch.cat([rows.rope[index], rows.rope - 5, other.rope])
    before = [store.clone() for store in rows.cache.keys]
    found = velocities(model, Context(view, rope), (3, 3), x, 0.5)
    assert torch.equal(found, velocities(model, Context(copies, rope), (3, 3), x, 0.5))
    assert all(torch.equal(a, b) for a, b in zip(rows.cache.keys, before, strict=True)), "it is read and not written"


@torch.no_grad()
def test_an_images_tokens_need_one_line_of_bias(monkeypatch):
    """Of a restoration at 1024 px behind 20,000 tokens, (B, L, S) in float32 would be 400 MB a row."""
    model, tokenizer = tiny_model()
    rows = engine.prefill(model, tiny_prompts(tokenizer, 2))
    shapes, plain = [], mot.as_bias
    monkeypatch.setattr(mot, "as_bias", lambda allowed: shapes.append(allowed.shape) or plain(allowed))
    velocities(model, Context(rows.cache, rows.rope), (3, 3), torch.randn(2, 9, 4), 0.5)
    assert [shape[1] for shape in shapes] == [1]


@pytest.mark.parametrize("restorations", [0, 1])
@torch.no_grad()
def test_dropped_contexts_are_those_of_conversations_without_the_reply_and_without_images(restorations):
    model, tokenizer = tiny_model("direct")
    prompts = tiny_prompts(tokenizer, 2)
    rows = engine.prefill(model, prompts)
    reply, latents = [12, 13], torch.randn(2, 9, 4)
    talks = [p.segments() for p in prompts]
    texts = [[Text(p.question)] for p in prompts]
    contents = Contents([p.patches for p in prompts], [], [])
    for _ in range(restorations):
        engine.text_reply(model, rows, reply)
        engine.feed_back(model, rows, latents, (3, 3))
        talks = [[*talk, Text(reply), Image(LATENT, (3, 3))] for talk in talks]
        texts = [[*text, Text(reply)] for text in texts]
    for i, prompt in enumerate(prompts):
        contents.latent += [prompt.latent, *[latents[i]] * restorations]
        contents.time += [0.0] * (1 + restorations)
    engine.text_reply(model, rows, [14, 15, 16])
    texts = [[*text, Text([14, 15, 16])] for text in texts]
    dropped = engine.dropped_contexts(model, rows, prompts, Guidance(2.0, 2.0))
    assert VIT in {s.kind for s in talks[0] if isinstance(s, Image)}
    x = torch.randn(2, 9, 4)
    for context, talk, held in zip(dropped, (talks, texts), (contents, Contents()), strict=True):
        built, ends = layout(talk, model.config.special)
        cache = model.new_cache(2, 8)
        model(built, held, cache, write=True)
        assert context.rope.tolist() == ends and torch.equal(context.cache.lengths, cache.lengths)
        expected = velocities(model, Context(cache, torch.tensor(ends)), (3, 3), x, 0.5)
        torch.testing.assert_close(velocities(model, context, (3, 3), x, 0.5), expected, atol=1e-5, rtol=0)


def test_guidance_of_a_stochastic_rollout_is_refused():
    with pytest.raises(ClearError, match=r"sigma = 0.3 with text guidance 4.0"):
        Options(sigma=0.3, guidance=Guidance(4.0))
    with pytest.raises(ClearError, match="sigma"):
        replace(GUIDED, sigma=0.1)
    assert Options(sigma=0.3, guidance=Guidance(1.0, 2.0)).sigma == 0.3


def test_denoising_asks_for_the_contexts_that_guidance_needs():
    model, tokenizer = tiny_model()
    with torch.no_grad():
        rows = engine.prefill(model, tiny_prompts(tokenizer, 1))
        with pytest.raises(ClearError, match="needs 2 more contexts and got 0"):
            engine.denoise(model, rows.cache, rows.rope, (3, 3), torch.randn(1, 9, 4), GUIDED)


def test_the_interval_is_open_below_and_closed_above_on_the_grid():
    grid = flow.time_grid(5, 1.0).tolist()  # 1, 0.8, 0.6, 0.4, 0.2, 0 in float32
    found = [Guidance(2.0, low=0.4, high=0.8).active(t) for t in grid]
    assert found == [False, True, True, False, False, False]
    assert not any(Guidance(1.0, 9.0, 0.0, 1.0).active(t) for t in grid)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    text=st.floats(1.01, 9),
    image=st.floats(1, 5),
    renorm=st.sampled_from(flow.RENORMS),
    least=st.floats(0, 1),
)
def test_guided_velocities(seed, text, image, renorm, least):
    v, without_text, without_image = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(seed))
    guidance = Guidance(text, image, renorm=renorm, renorm_min=least)
    same = flow.guide(v, v, v, guidance)
    torch.testing.assert_close(same, v, atol=1e-5, rtol=1e-5)
    found = flow.guide(v, without_text, without_image, guidance)
    first = without_text + text * (v - without_text)
    if renorm == "text_channel":
        first = first * (v.norm(dim=-1) / first.norm(dim=-1)).clamp(least, 1.0)[..., None]
    raw = first if image <= 1 else without_image + image * (first - without_image)
    over = {"global": (-2, -1), "channel": (-1,), "text_channel": ()}[renorm]
    factor = (v.norm(dim=over, keepdim=True) / raw.norm(dim=over, keepdim=True)).clamp(least, 1.0) if over else 1.0
    torch.testing.assert_close(found, raw * factor, atol=1e-4, rtol=1e-4)
    one = flow.guide(v[:1], without_text[:1], without_image[:1], guidance)
    torch.testing.assert_close(found[:1], one, atol=1e-6, rtol=1e-6)


def test_configured_guidance_reaches_the_engine():
    set_ = {"text_guidance": 4.0, "image_guidance": 2.0, "guidance_from": 0.2, "guidance_to": 0.9}
    set_ |= {"guidance_renorm": "text_channel", "guidance_renorm_min": 0.1}
    config = from_dict(compose(["profile=smoke", *(f"sampling.{k}={v}" for k, v in set_.items())]))
    found = Answerer(None, None, None, config).options.guidance
    assert found == Guidance(4.0, 2.0, 0.2, 0.9, "text_channel", 0.1)
    assert not Answerer(None, None, None, from_dict(compose(["profile=tiny"]))).options.guidance.on


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("sampling.image_guidance=2.0", "sampling.image_guidance = 2.0 does nothing"),
        ("sampling.guidance_from=1.0", "sampling.guidance_from = 1.0 must be below sampling.guidance_to"),
        ("sampling.text_guidance=0.5", "sampling.text_guidance"),
        ("sampling.guidance_renorm=all", "sampling.guidance_renorm"),
    ],
)
def test_guidance_that_does_nothing_is_refused(override, named):
    with pytest.raises(ClearError, match=named):
        compose(["profile=smoke", override])


def test_guidance_wraps_a_velocity_inside_its_interval_only():
    guidance, x = flow.Guidance(text=2.0, low=0.4, high=0.8, renorm_min=1.0), torch.ones(1, 3, 2)
    asked = []

    def every(x, t):
        asked.append(len(x))
        return x * torch.tensor([1.0, 0.5])[:, None, None]

    velocity = flow.guided(lambda x, t: 3 * x, every, guidance)
    assert torch.equal(velocity(x, 0.9), 3 * x) and torch.equal(velocity(x, 0.4), 3 * x) and not asked
    torch.testing.assert_close(velocity(x, 0.8), 1.5 * x)
    assert asked == [2]
