"""The generation engine: batching changes nothing, and everything it records can be reproduced."""

from dataclasses import replace

import pytest
import torch

from clear.reasoning import grammar
from clear.reasoning.engine import Options, generate
from clear.reasoning.tokenizer import decode
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
