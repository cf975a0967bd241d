"""The generation engine: batching changes nothing, and everything it records can be reproduced."""

import ctypes
import gc
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clear.errors import ClearError
from clear.model import flow
from clear.model.bagel import Bagel
from clear.model.cache import KVCache
from clear.model.tokenizer import decode, encode
from clear.reasoning import engine, grammar
from clear.reasoning.engine import Context, Options, generate, velocities
from clear.training.rl import scoring
from tests.helpers.generation import OPTIONS, decoding, forwards, ids_of
from tests.tiny import tiny_model, tiny_prompts


@pytest.mark.parametrize("restore", ["auto", "never", "plain"])
def test_greedy_decoding_of_a_batch_equals_one_by_one(restore):
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 6)
    options = replace(OPTIONS, restore=restore)
    batch = generate(model, tokenizer, prompts, options)
    single = [generate(model, tokenizer, [p], options)[0] for p in prompts]
    assert ids_of(batch) == ids_of(single)


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


def test_a_forced_restoration_where_none_is_allowed_is_refused():
    with pytest.raises(ClearError, match=r"sampling.max_restorations = 0 allows no restoration"):
        replace(OPTIONS, restore="always", max_restorations=0)


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
    assert ids_of(whole) == ids_of(parts)


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
    sizes = forwards(model)
    options = replace(OPTIONS, restore=restore, max_tokens=30, temperature=1.0)
    found = generate(model, tokenizer, tiny_prompts(tokenizer, 6), options, 4, torch.Generator().manual_seed(0))
    assert len({len(t.replies[-1].ids) for t in found}) > 10
    assert sizes[-30:] == decoding(found, model, 30)


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


@pytest.mark.parametrize("restore", ["always", "auto"])
def test_while_rows_are_restored_theirs_is_the_only_cache(monkeypatch, restore):
    """`clear memory` counts one; there were up to three: the batch's before rows left it, and copies of what stayed."""
    model, tokenizer = tiny_model("direct")
    found, real = [], engine.restore

    def restoring(model, rows, *rest):
        gc.collect()
        caches = [one for one in gc.get_objects() if type(one) is KVCache]
        stores = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for c in caches for t in (*c.keys, *c.values)
        }
        own = sum(t.untyped_storage().nbytes() for t in (*rows.cache.keys, *rows.cache.values))
        found.append(sum(stores.values()) / own)
        return real(model, rows, *rest)

    monkeypatch.setattr(engine, "restore", restoring)
    if restore == "auto":  # half of the rows ask
        asked = itertools.count()
        monkeypatch.setattr(engine.grammar, "asks_restoration", lambda text: next(asked) % 2 == 0)
        monkeypatch.setattr(engine, "_sample", _ends_at_once(model.config.special.eos))
    options = Options(flow_steps=2, max_tokens=4, restore=restore, max_restorations=2, batch=8)
    generate(model, tokenizer, tiny_prompts(tokenizer, 6), options, generator=torch.Generator().manual_seed(0))
    assert len(found) >= 1 and max(found) <= 1.01


def _ends_at_once(eos: int):
    def sample(logits, temperature, generator):
        return torch.full((len(logits),), eos), torch.zeros(len(logits))

    return sample


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


def test_questions_with_and_without_a_picture_share_a_batch():
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 4)
    prompts[1:3] = [replace(p, latent=None, patches=None) for p in prompts[1:3]]
    options = replace(OPTIONS, restore="plain")
    batch = generate(model, tokenizer, prompts, options)
    single = [generate(model, tokenizer, [p], options)[0] for p in prompts]
    assert ids_of(batch) == ids_of(single)
    seen = engine.prefill(model, prompts).cache.lengths.tolist()
    assert [n == len(p.question) + 2 for n, p in zip(seen, prompts, strict=True)] == [False, True, True, False]
