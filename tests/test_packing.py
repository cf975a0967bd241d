"""Packing: samples that share a row are to the model what they are alone, and so are losses, gradients and scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clear.config import compose, from_dict
from clear.model import flow
from clear.model.images import ImageBank
from clear.model.sequence import BRIDGE, IGNORE, LATENT, Text, length, pack
from clear.model.tokenizer import encode, word_tokenizer
from clear.reasoning import grammar
from clear.reasoning.engine import Options, generate
from clear.schema import Phase
from clear.sources.scenes.render import scenes
from clear.traces.oracle import trace_row
from clear.training import memory
from clear.training.build import scene_words
from clear.training.loop import parallel
from clear.training.loop.parallel import Pass, balanced, one_pass
from clear.training.loop.run import StageRun
from clear.training.loop.trainer import optimise
from clear.training.rl import scoring
from clear.training.sft import TraceData, TraceWeights, direct_loss, restoration_loss, set_trainable, trace_loss
from tests.helpers.mixed_sizes import parts
from tests.shapes import Shapes, passes, stage_loss
from tests.tiny import tiny_model, tiny_prompts

TIMES = flow.time_grid(4, 3.0).tolist()
BUDGETS = [1, 120, 190, 10**6]
"""Tokens of a row: one sample each, some alone and some not, at most two or three together, all in one."""


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 150))
def test_every_sample_has_one_place_and_rows_keep_to_the_budget(lengths, budget):
    rows = pack(lengths, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert all(total <= budget or len(row) == 1 for total, row in zip(filled, rows, strict=True))
    assert all(row == sorted(row) for row in rows) and rows == sorted(rows)
    assert sum(2 * total <= budget for total in filled) <= 1, "two rows that are half empty would have been one"
    assert pack(lengths, budget) == rows
    samples = [[Text([0] * n, bos=False, eos=False)] for n in lengths]
    assert Pass(0, budget).divide(samples) == [rows], "one process packs the whole batch"


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 9))
def test_samples_are_divided_by_their_tokens(lengths, parts):
    shares = balanced(lengths, parts)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    assert len(shares) == parts and all(share == sorted(share) for share in shares)
    assert sum(map(bool, shares)) == min(parts, len(lengths)), "nobody idles while another has two"
    tokens = [sum(lengths[i] for i in share) for share in shares]
    for share, total in zip(shares, tokens, strict=True):
        if len(share) > 1:
            assert total - min(tokens) <= min(lengths[i] for i in share)


def _objective(name, model, data):
    if name == "restoration":
        return restoration_loss(model, data)
    if name == "both paths":
        return restoration_loss(model, data, replies=True)
    if name == "direct answer":
        return direct_loss(model, data)
    feedback = BRIDGE if name == "mlp" else LATENT
    return trace_loss(model, data, TraceWeights(feedback, distill=0.5, drop_vit=0.4, drop_text=0.3))


def _traces(kind, config, images):
    """Model and traces of four pictures of three sizes; the second one answers at once."""
    model, tokenizer, _, data = parts("mlp" if kind == "mlp" else "direct", config, images)
    data.reply_1[1], data.reply_2[1] = encode(tokenizer, "<think> a b c </think> <answer> c </answer>"), None
    assert encode(tokenizer, grammar.restore_reply()) == data.reply_1[0]
    set_trainable(model)
    return model, data


def _gradients(model, loss, rows: int, budget: int):
    """Loss and gradients of one batch, in as many passes as it takes; also how many those were."""
    model.zero_grad()
    now, total = Pass(rows, budget), 0.0
    while now.number < now.passes:
        torch.manual_seed(4)
        with one_pass(now):
            part, _ = loss([0, 1, 2, 3, 1])
        part.backward()
        total, now.number = total + part.item(), now.number + 1
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, now


@pytest.mark.parametrize("kind", ["direct", "mlp", "restoration", "both paths", "direct answer"])
@pytest.mark.parametrize("rows", [0, 1])
def test_packing_changes_neither_loss_nor_gradients(config, images, kind, rows):
    """float32; the sums of a batch are taken in another order."""
    model, data = _traces(kind, config, images)
    loss = _objective(kind, model, data)
    expected, gradients, _ = _gradients(model, loss, 0, 0)
    counts = set()
    for budget in BUDGETS:
        found, others, now = _gradients(model, loss, rows, budget)
        counts.add(now.passes)
        assert found == pytest.approx(expected, rel=2e-6)
        assert others.keys() == gradients.keys()
        largest = max(value.abs().max().item() for value in gradients.values())
        for name, value in gradients.items():
            torch.testing.assert_close(others[name] / largest, value / largest, atol=2e-6, rtol=0, msg=name)
        assert rows == 0 or now.real == now.tokens, "a row of its own has no padding"
    assert counts == {1} if rows == 0 else {1, 5} <= counts


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_processes_that_pack_their_own_shares_compute_the_batch_of_one(config, images, monkeypatch, world, rows):
    """What gradients become over `world` processes: the mean of theirs. Each of them packs what is its own."""
    model, data = _traces("direct", config, images)
    loss = _objective("direct", model, data)
    expected, gradients, _ = _gradients(model, loss, 0, 0)
    monkeypatch.setattr(parallel, "world", lambda: world)
    for budget in BUDGETS[1:]:
        parts = []
        for rank in range(world):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            parts.append(_gradients(model, loss, rows, budget))
        assert len({now.passes for _, _, now in parts}) == 1, "all take part in as many forwards"
        busy = sum(now.real > 0 for _, _, now in parts)
        assert busy == min(world, 5), "also where the whole batch would fit into one row"
        assert sum(total for total, _, _ in parts) / world == pytest.approx(expected, rel=2e-6)
        largest = max(value.abs().max().item() for value in gradients.values())
        for name, value in gradients.items():
            mean = sum(found.get(name, torch.zeros_like(value)) for _, found, _ in parts) / world
            torch.testing.assert_close(mean / largest, value / largest, atol=2e-6, rtol=0, msg=name)


def test_a_packed_run_logs_its_real_tokens_and_resumes_exactly(config, images, tmp_path):
    class Interrupted(Exception):
        """Stands for the kill of the process."""

    (tmp_path / "input.txt").write_text("data")
    runtime = replace(config.runtime, precision="float32", log_every=1, checkpoint_every=2, device="cpu")

    def train(folder, budget, rows, stop=None):
        model, data = _traces("direct", config, images)
        loss, calls = _objective("direct", model, data), 0

        def counted(index):
            nonlocal calls
            calls += 1
            if calls == stop:
                raise Interrupted
            return loss(index)

        used = replace(config, runtime=replace(runtime, token_budget=budget, rows_per_pass=rows))
        run = StageRun("test", used, [tmp_path / "input.txt"], tmp_path / folder)
        torch.manual_seed(1)
        optimise(run, "phase", model, counted, len(data), Phase(steps=6, batch=3, lr=1e-3, warmup=0))
        return run.curve, {n: p.detach().clone() for n, p in model.named_parameters()}

    plain, _ = train("plain", 0, 0)
    curve, weights = train("packed", 120, 1)
    assert [row["loss"] for row in curve] == pytest.approx([row["loss"] for row in plain], rel=1e-4)
    assert all(row["real_tokens"] == 1.0 for row in curve) and max(row["passes"] for row in curve) > 1
    assert "real_tokens" not in plain[0]
    together, _ = train("together", 120, 0)
    assert min(row["real_tokens"] for row in together) < 1.0
    with pytest.raises(Interrupted):
        train("killed", 120, 1, stop=8)
    again, found = train("killed", 120, 1)
    assert again == curve and all(torch.equal(found[name], value) for name, value in weights.items())


@pytest.mark.parametrize("bridge", ["mlp", "direct"])
@pytest.mark.parametrize("budget", [1, 110, 10**6])
def test_a_packed_scoring_is_that_of_single_rows_and_of_the_rollout(bridge, budget):
    model, tokenizer = tiny_model(bridge)
    prompts = tiny_prompts(tokenizer, 4)
    options = Options(flow_steps=4, shift=3.0, sigma=0.3, temperature=1.0, max_tokens=8, batch=64)
    found = []
    for n, restore in enumerate(("always", "auto")):
        generator = torch.Generator().manual_seed(5 + n)
        found += generate(model, tokenizer, prompts, replace(options, restore=restore), 2, generator)
    owners, steps = [prompts[t.prompt] for t in found], [[n % 4, 3] if n % 4 < 3 else [1] for n in range(len(found))]
    request = (owners, found, steps, TIMES, 0.3, 1.0)
    scores, gradients = [], []
    for used in (0, budget):
        model.zero_grad()
        new = scoring.score(model, *request, used)
        (new.text.sum() + new.image.sum() + new.velocity.square().mean()).backward()
        scores.append(new)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    alone, packed = scores
    for name in ("text", "entropy", "image", "velocity"):
        torch.testing.assert_close(getattr(packed, name), getattr(alone, name), atol=1e-5, rtol=1e-5, msg=name)
    assert packed.text_row.equal(alone.text_row) and packed.image_row.equal(alone.image_row)
    largest = max(value.abs().max().item() for value in gradients[0].values())
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name] / largest, value / largest, atol=1e-5, rtol=0, msg=name)
    text, image = scoring.recorded(found, steps)
    assert (torch.exp(packed.text - text) - 1).abs().max() <= 1e-3
    assert (torch.exp(packed.image - image) - 1).abs().max() <= 1e-3
    assert packed.real == 1.0 if budget == 10**6 else packed.real < 1.0


def test_length_is_that_of_the_layout(config, images):
    model, data = _traces("direct", config, images)
    seen = []
    hook = model.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    now = Pass(0, 10**6)
    with one_pass(now), torch.no_grad():
        trace_loss(model, data, TraceWeights(LATENT))([0, 1, 2])
    hook.remove()
    assert seen[0].ids.shape[0] == 1 and seen[0].sample.max() == 2 and (seen[0].target != IGNORE).any()
    assert now.tokens == now.real == seen[0].ids.shape[1]
    prompt = data.prompt(0)
    assert length(prompt.segments(True)) == length(prompt.segments()) - len(prompt.patches) - 2


RESTORING = {"low": 0.01, "mid": 0.05, "high": 0.17}
"""Share of the degraded questions that the committed base makes restore (data/metrics/traces.json)."""


@pytest.fixture(scope="module")
def default_mix() -> TraceData:
    """Traces of generated scenes in the default shares, with the words and the grids of the default profile."""
    default = from_dict(compose([]))
    rng = np.random.default_rng(0)
    samples, rows = [], []
    for sample in scenes("sft", 240, default.seed, default.source.image_size, default.source.questions_per_image):
        severity = rng.choice(list(RESTORING), p=default.degrade.severity_weights)
        samples.append(replace(sample, degraded=b"other", corruption="dark", severity=str(severity)))
        for question in sample.questions[: default.traces.questions]:
            rows.append(trace_row(samples[-1], question, rng.random() < RESTORING[severity], False))
            if rng.random() < default.traces.clean_share:
                rows.append(trace_row(samples[-1], question, False, True, clean=True))
    one = ImageBank([samples[0].image], default.model)  # all scenes have one size
    bank = Shapes([one.latent_grid(0)] * len(samples), [one.vit_grid(0)] * len(samples))
    return TraceData(word_tokenizer(scene_words()), rows, samples, bank, bank)


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("profile", ["bagel_7b", "bagel_7b_lora"])
def test_packing_as_shipped_leaves_little_padding_of_the_default_mix(default_mix, profile, world, monkeypatch):
    """One epoch of the last objective of stage sft. The budget is as many traces of full size as in its own profile."""
    default, shipped = from_dict(compose([])), from_dict(compose([f"profile={profile}"]))
    runtime, batch = shipped.runtime, shipped.sft.traces.batch
    assert runtime.token_budget and not default.runtime.token_budget, "the small profiles do not pack"
    full = [memory.stage_batch(replace(c, runtime=default.runtime), "sft").length for c in (default, shipped)]
    budget = round(runtime.token_budget * full[0] / full[1])
    data = default_mix
    loss = stage_loss(default, "sft", data)

    def real_share(rows: int, budget: int) -> float:
        torch.manual_seed(0)
        order, real, tokens = torch.randperm(len(data)).tolist(), 0, 0
        for start in range(0, len(order), batch):
            for rank in range(world):
                now = Pass(rows, budget)
                built = list(passes(loss, order[start : start + batch], now, monkeypatch, world, rank))
                assert now.tokens == sum(one.ids.numel() for one in built)
                real, tokens = real + now.real, tokens + now.tokens
        return real / tokens

    assert real_share(runtime.rows_per_pass, budget) >= 0.95
    if world == 1:
        assert real_share(0, 0) < 0.9, "what packing is for"
        assert real_share(0, budget) < 0.95, "rows of different length in one pass would not do"
