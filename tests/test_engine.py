"""The generation engine: batching changes nothing, and everything it records can be reproduced."""

import ctypes
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clear.config import compose, from_dict
from clear.errors import ClearError
from clear.model import flow
from clear.model.bagel import Bagel, Contents
from clear.model.cache import KVCache
from clear.model.flow import Guidance
from clear.model.sequence import LATENT, VIT, Image, Text, layout
from clear.model.tokenizer import decode, encode
from clear.reasoning import engine, grammar
from clear.reasoning.answering import Answerer
from clear.reasoning.engine import Context, Options, generate, velocities
from clear.training.rl import scoring
from tests.tiny import tiny_model, tiny_prompts

OPTIONS = Options(flow_steps=3, shift=3.0, max_tokens=6, batch=64)


def _ids(trajectories):
    return [[reply.ids for reply in t.replies] for t in trajectories]


@pytest.mark.parametrize("restore", ["auto", "never", "plain"])
def test_greedy_decoding_of_a_batch_equals_one_by_one(restore):
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 6)
    options = replace(OPTIONS, restore=restore)
    batch = generate(model, tokenizer, prompts, options)
    single = [generate(model, tokenizer, [p], options)[0] for p in prompts]
    assert _ids(batch) == _ids(single)


@pytest.mark.parametrize("bridge", ["mlp", "direct"])
def test_forced_restoration_is_followed_by_a_second_reply(bridge):
    model, tokenizer = tiny_model(bridge)
    prompts = tiny_prompts(tokenizer, 3)
    found = generate(model, tokenizer, prompts, replace(OPTIONS, restore="always"))
    for trajectory in found:
        assert len(trajectory.replies) == 2 and len(trajectory.restorations) == 1
        first = trajectory.replies[0]
        assert decode(tokenizer, first.ids) == grammar.restore_reply()
        assert first.forced == len(first.ids)
        assert trajectory.restorations[0].x0.shape == (9, 4)


def test_a_group_shares_its_prompt_and_differs_by_sampling():
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 2)
    options = replace(OPTIONS, temperature=1.0, sigma=0.3)
    found = generate(model, tokenizer, prompts, options, group=4, generator=torch.Generator().manual_seed(0))
    assert [t.prompt for t in found] == [0] * 4 + [1] * 4
    assert len({tuple(t.replies[0].ids) for t in found}) > 1


def test_small_batches_continue_where_the_prompts_left_off():
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 5)
    whole = generate(model, tokenizer, prompts, OPTIONS)
    parts = generate(model, tokenizer, prompts, replace(OPTIONS, batch=2))
    assert [t.prompt for t in parts] == list(range(5))
    assert _ids(whole) == _ids(parts)


def test_the_feedback_reaches_the_second_reply():
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 1)
    options = replace(OPTIONS, restore="always", temperature=0.0)
    found = [
        generate(model, tokenizer, prompts, options, generator=torch.Generator().manual_seed(seed))[0]
        for seed in range(6)
    ]
    log_probs = {round(t.replies[1].log_probs[0], 6) for t in found}
    assert len(log_probs) > 1, "another starting noise gives another picture and so other log-probabilities"


def _scripted(monkeypatch, tokenizer, *replies):
    """Every row says these replies, one after the other, each with its eos."""
    eos = tiny_model()[0].config.special.eos
    ids = iter([i for reply in replies for i in (*encode(tokenizer, reply), eos)])

    def say(logits, *_):
        return torch.full((len(logits),), next(ids)), torch.zeros(len(logits))

    monkeypatch.setattr(engine, "_sample", say)


@pytest.mark.parametrize(
    ("reply", "restores"),
    [
        ("<think> a <image_restore> b </think> <answer> c </answer>", False),
        ("<answer> c </answer> <image_restore>", False),
        ("<think> a <image_restore> b </think>", True),
        ("<think> a </think> <answer> c <image_restore>", True),
    ],
)
def test_a_finished_answer_is_kept_wherever_the_trigger_stands(monkeypatch, reply, restores):
    model, tokenizer = tiny_model()
    _scripted(monkeypatch, tokenizer, reply, grammar.plain_reply("d", "e"))
    (found,) = generate(model, tokenizer, tiny_prompts(tokenizer, 1), replace(OPTIONS, max_tokens=20))
    assert len(found.restorations) == restores and len(found.replies) == 1 + restores
    assert grammar.extract_answer(found.texts(tokenizer)[-1]) == ("e" if restores else "c")


@pytest.mark.parametrize("rollout", [False, True])
def test_every_restoration_of_a_row_starts_from_a_noise_of_its_own(monkeypatch, rollout):
    """In evaluation it is the row's own whatever the batch; in a rollout a group may share it, restorations may not."""
    model, tokenizer = tiny_model("direct")
    prompts, noises, denoise = tiny_prompts(tokenizer, 3), [], engine.denoise

    def noted(model, cache, rope, grid, x, *more):
        noises.append(x)
        return denoise(model, cache, rope, grid, x, *more)

    def started(prompts, **more):
        """Noise (restorations, rows, N, C)."""
        _scripted(monkeypatch, tokenizer, *[grammar.restore_reply()] * 2, grammar.plain_reply("a", "b"))
        noises.clear()
        options = replace(OPTIONS, max_tokens=20, max_restorations=2, **more)
        found = generate(model, tokenizer, prompts, options, 2 if rollout else 1, torch.Generator().manual_seed(0))
        assert all(len(t.restorations) == 2 for t in found)
        return torch.stack(noises)

    monkeypatch.setattr(engine, "denoise", noted)
    if rollout:
        found = started(prompts, sigma=0.3, shared_noise=True)
        assert torch.equal(found[:, ::2], found[:, 1::2])
        found = found[:, ::2]
    else:
        found = started(prompts, noise_seed=5)
        alone = [started([prompt], noise_seed=5 + n) for n, prompt in enumerate(prompts)]
        assert torch.equal(found, torch.cat(alone, dim=1))
    each = found.flatten(0, 1).flatten(1)
    assert torch.corrcoef(each).fill_diagonal_(0).abs().max() < 0.9, "six different noises"


@pytest.mark.parametrize("restore", ["plain", "always"])
def test_finished_rows_leave_the_batch_at_once(restore):
    model, tokenizer = tiny_model()
    sizes = _forwards(model)
    options = replace(OPTIONS, restore=restore, max_tokens=30, temperature=1.0)
    found = generate(model, tokenizer, tiny_prompts(tokenizer, 6), options, 4, torch.Generator().manual_seed(0))
    assert len({len(t.replies[-1].ids) for t in found}) > 10
    assert sizes[-30:] == _decoding(found, model, 30)


def _filled(lengths, capacity):
    """A cache of two layers whose entries tell row, place and layer apart, with `lengths` counted."""
    cache = KVCache(2, len(lengths), 1, 2, capacity, torch.empty(0))
    for store in (cache.keys, cache.values):
        for layer in store:
            layer.copy_(torch.randn(layer.shape))
    cache.lengths = torch.tensor(lengths)
    return cache


def _entries(cache):
    stores = (*cache.keys, *cache.values)
    return [[store[row, :, :length] for store in stores] for row, length in enumerate(cache.lengths.tolist())]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_rows_kept_in_place_are_those_selected(data):
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    rows = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True))
    cache = _filled(lengths, 8)
    expected = cache.select(torch.tensor(rows, dtype=torch.long))
    cache.keep(torch.tensor(rows, dtype=torch.long))
    assert cache.rows == len(rows) == len(cache.keys[0]) and torch.equal(cache.lengths, expected.lengths)
    torch.testing.assert_close(_entries(cache), _entries(expected), atol=0, rtol=0)


def test_reading_a_cache_leaves_its_entries_as_they_were():
    model, tokenizer = tiny_model()
    with torch.inference_mode():
        rows = engine.prefill(model, tiny_prompts(tokenizer, 3))
        rows.cache.lengths = rows.cache.lengths - torch.tensor([0, 5, 2])  # rows of different lengths
        before = [[x.clone() for x in row] for row in _entries(rows.cache)]
        first = velocities(model, Context(rows.cache, rows.rope), (3, 3), torch.ones(3, 9, 4), 0.5)
        torch.testing.assert_close(_entries(rows.cache), before, atol=0, rtol=0)
        again = velocities(model, Context(rows.cache, rows.rope), (3, 3), torch.ones(3, 9, 4), 0.5)
    assert torch.equal(first, again) and first.abs().max() > 0


# --- guidance

GUIDED = replace(OPTIONS, restore="always", noise_seed=1, guidance=Guidance(3.0, 2.0, low=0.0))


def _forwards(model):
    """Batch sizes of the language model's forwards from here on."""
    sizes = []
    model.language_model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    return sizes


def _decoding(found, model, limit):
    """Batch sizes that make the last replies: all rows, then those that have not ended with their k-th token."""
    replies = [t.replies[-1].ids for t in found]
    ended = [len(ids) if ids[-1] == model.config.special.eos else math.inf for ids in replies]
    sizes = [len(found), *(sum(end > k for end in ended) for k in range(1, limit))]
    return [size for size in sizes if size]


def _same(a, b):
    texts = _ids(a) == _ids(b) and all(
        x.log_probs == y.log_probs for s, t in zip(a, b, strict=True) for x, y in zip(s.replies, t.replies, strict=True)
    )
    latents = ((s.restorations, t.restorations) for s, t in zip(a, b, strict=True))
    return texts and all(torch.equal(x.x0, y.x0) for s, t in latents for x, y in zip(s, t, strict=True))


@pytest.mark.parametrize("off", [Guidance(1.0, 1.0), Guidance(1.0, 5.0), Guidance(1.0, 1.0, 0.0, 1.0, "channel", 0.5)])
def test_guidance_off_costs_nothing_and_changes_nothing(off):
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 3)
    plain = replace(OPTIONS, restore="always", noise_seed=1)
    sizes = _forwards(model)
    expected = generate(model, tokenizer, prompts, plain)
    cost = list(sizes)
    sizes.clear()
    assert _same(generate(model, tokenizer, prompts, replace(plain, guidance=off)), expected)
    assert sizes == cost


def test_guidance_is_one_batched_forward_per_step():
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 3)
    sizes = _forwards(model)
    generate(model, tokenizer, prompts, replace(GUIDED, guidance=Guidance()))
    plain = list(sizes)
    for guidance, expected in ((Guidance(3.0, 2.0, low=0.0), [3, 9, 9, 9]), (Guidance(3.0, 1.0, low=0.8), [6, 6, 3])):
        sizes.clear()
        found = generate(model, tokenizer, prompts, replace(GUIDED, guidance=guidance))
        # prompt, trigger reply, then the image-free context (with image guidance) and the steps; feedback and answer
        assert sizes == [*plain[:2], *expected, 3, *_decoding(found, model, OPTIONS.max_tokens)]


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


# --- a vocabulary padded beyond the tokenizer


@pytest.fixture(scope="module")
def padded():
    """A model whose highest logits are ids that its tokenizer does not have."""
    small, tokenizer = tiny_model()
    llm = small.config.llm
    torch.manual_seed(0)
    model = Bagel(replace(small.config, llm=replace(llm, vocab=llm.vocab + 6))).initialise().eval()
    with torch.no_grad():
        extra = 20 * torch.randn(3, llm.hidden)
        model.language_model.lm_head.weight[llm.vocab :] = torch.cat([extra, -extra])
    return model, tokenizer


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_ids_of_the_tokenizer_are_sampled(padded, temperature):
    model, tokenizer = padded
    options = replace(OPTIONS, temperature=temperature)
    found = generate(model, tokenizer, tiny_prompts(tokenizer, 4), options, 2, torch.Generator().manual_seed(0))
    ids = [i for t in found for reply in t.replies for i in reply.ids]
    assert len(ids) > 8 and max(ids) < tokenizer.get_vocab_size() == engine.vocabulary(tokenizer)


def test_sampling_and_scoring_cut_the_logits_alike(padded):
    model, tokenizer = padded
    prompts = tiny_prompts(tokenizer, 3)
    options = replace(OPTIONS, temperature=1.0, sigma=0.3, restore="always")
    found = generate(model, tokenizer, prompts, options, 1, torch.Generator().manual_seed(0))
    steps, times = [[0]] * 3, flow.time_grid(3, 3.0).tolist()
    with torch.no_grad():
        new = scoring.score(model, prompts, found, steps, times, 0.3, 1.0)
        uncut = scoring.score(model, prompts, [replace(t, vocabulary=0) for t in found], steps, times, 0.3, 1.0)
    text, _ = scoring.recorded(found, steps)
    assert len(text) == len(new.text) > 3
    assert (torch.exp(new.text - text) - 1).abs().max() <= 1e-3
    assert (uncut.text - new.text).abs().min() > 1, "the padding ids would take the probability"


def _heap() -> int:
    """Bytes that this process has from the C allocator, from which torch takes CPU memory: glibc's own count."""

    class Counts(ctypes.Structure):
        names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keep")
        _fields_ = tuple((name, ctypes.c_size_t) for name in names)

    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Counts
    found = mallinfo2()
    return found.uordblks + found.hblkhd


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_decoding_allocates_nothing_that_grows_beyond_its_cache(monkeypatch):
    model, tokenizer = tiny_model()
    with torch.no_grad():
        model.language_model.lm_head.weight[model.config.special.eos] = 0.0
        model.language_model.lm_head.weight[:] -= model.language_model.lm_head.weight.mean(0)
    rows, steps = 32, 150
    monkeypatch.setattr(engine, "_sample", lambda logits, *_: (logits[:, 5:].argmax(-1) + 5, logits[:, 5]))  # never eos
    plain, seen = engine.feed, []

    def fed(model, state, ids):
        size = sum(x.untyped_storage().nbytes() for x in (*state.cache.keys, *state.cache.values))
        seen.append((_heap(), size))
        return plain(model, state, ids)

    monkeypatch.setattr(engine, "feed", fed)
    generate(model, tokenizer, tiny_prompts(tokenizer, rows), Options(restore="plain", max_tokens=steps, batch=rows))
    assert len(seen) == steps
    assert seen[-1][1] > seen[0][1], "the cache has grown, so its growth is told apart"
    content = steps * rows * 2 * len(model.language_model.model.layers) * 2 * 8 * 4  # keys and values of all steps
    rest = [heap - cache for heap, cache in seen]
    grown = rest[-1] - rest[20]
    assert grown < content / 4, f"{grown} bytes beyond the cache in {steps} steps, whose keys and values are {content}"


def test_one_sampler_integrates_whatever_velocity_with_whatever_step():
    x, times = torch.randn(4, 3, 2), flow.time_grid(5, 3.0).tolist()
    ode = [state for state, _ in flow.sample(lambda x, t: torch.ones_like(x), x, times, flow.stepping(0.0, 1.0, 0.0))]
    torch.testing.assert_close(ode[-1], x - 1.0)
    seen, generator = [], torch.Generator().manual_seed(4)

    def velocity(x, t):
        seen.append((len(x), t))
        return 2 * x

    one, again = torch.tensor([0, 2]), [0, 0, 1, 1]
    twins = flow.shared(velocity, velocity, one, again, until=times[2])
    window = flow.stepping(0.3, times[2], times[4], generator)
    states, log_probs = zip(*flow.sample(twins, x[one][again], times, window), strict=True)
    assert seen == [*((2, t) for t in times[:2]), *((4, t) for t in times[2:5])]
    assert torch.stack(log_probs).isnan().all(1).tolist() == [True, True, False, False, True]
    assert torch.equal(states[1][0], states[1][1]) and not torch.equal(states[2][0], states[2][1])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    expected, _ = flow.sde_step(states[1], 2 * states[1], noise, times[2], times[3], 0.3)
    assert torch.equal(states[2], expected)


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


def test_questions_with_and_without_a_picture_share_a_batch():
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 4)
    prompts[1:3] = [replace(p, latent=None, patches=None) for p in prompts[1:3]]
    options = replace(OPTIONS, restore="plain")
    batch = generate(model, tokenizer, prompts, options)
    single = [generate(model, tokenizer, [p], options)[0] for p in prompts]
    assert _ids(batch) == _ids(single)
    seen = engine.prefill(model, prompts).cache.lengths.tolist()
    assert [n == len(p.question) + 2 for n, p in zip(seen, prompts, strict=True)] == [False, True, True, False]
