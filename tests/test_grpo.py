"""Contract 2 and the objective: ratio 1 on a fresh policy, KL 0 at step 0, both gradients real."""

from dataclasses import replace

import pytest
import torch

from clear.model import flow
from clear.reasoning.engine import Options, generate
from clear.training import scoring
from clear.training.rewards import advantages, format_reward
from tests.tiny import tiny_model, tiny_prompts

OPTIONS = Options(flow_steps=4, shift=3.0, sigma=0.3, temperature=1.0, max_tokens=8, batch=64)
TIMES = flow.time_grid(4, 3.0).tolist()


def _rollout(bridge, restore="always", count=4, group=2):
    model, tokenizer = tiny_model(bridge)
    prompts = tiny_prompts(tokenizer, count)
    generator = torch.Generator().manual_seed(5)
    found = generate(model, tokenizer, prompts, replace(OPTIONS, restore=restore), group, generator)
    return model, [prompts[t.prompt] for t in found], found


@pytest.mark.parametrize("bridge", ["mlp", "direct"])
@pytest.mark.parametrize("restore", ["always", "auto"])
@pytest.mark.parametrize("steps", [[0], [1, 3], [0, 1, 2, 3]])
def test_a_fresh_policy_has_ratio_one(bridge, restore, steps):
    model, prompts, found = _rollout(bridge, restore)
    chosen = [steps] * len(found)
    with torch.no_grad():
        new = scoring.score(model, prompts, found, chosen, TIMES, OPTIONS.sigma, OPTIONS.temperature)
    text, image = scoring.recorded(found, chosen)
    assert len(text) == len(new.text) == sum(len(r.ids) - r.forced for t in found for r in t.replies)
    assert len(image) == len(new.image) == len(steps) * sum(len(t.restorations) for t in found)
    assert (torch.exp(new.text - text) - 1).abs().max() <= 1e-3
    if len(image):
        assert (torch.exp(new.image - image) - 1).abs().max() <= 1e-3


def test_scoring_does_not_depend_on_the_batch():
    model, prompts, found = _rollout("mlp")
    chosen = [[1, 2]] * len(found)
    with torch.no_grad():
        whole = scoring.score(model, prompts, found, chosen, TIMES, 0.3, 1.0)
        parts = [
            scoring.score(model, [p], [t], [c], TIMES, 0.3, 1.0) for p, t, c in zip(prompts, found, chosen, strict=True)
        ]
    torch.testing.assert_close(whole.text, torch.cat([p.text for p in parts]), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.image, torch.cat([p.image for p in parts]), atol=1e-5, rtol=0)


def test_the_image_term_reaches_the_velocity_head_and_the_text_term_the_language_head():
    model, prompts, found = _rollout("mlp")
    chosen = [[1]] * len(found)
    new = scoring.score(model, prompts, found, chosen, TIMES, 0.3, 1.0)
    new.image.sum().backward(retain_graph=True)
    assert model.llm2vae.weight.grad.abs().sum() > 0
    assert model.language_model.lm_head.weight.grad is None
    model.zero_grad()
    new.text.sum().backward()
    assert model.language_model.lm_head.weight.grad.abs().sum() > 0
    assert model.bridge.fc2.weight.grad.abs().sum() > 0, "reply 2 reads the latent through the bridge"


def test_advantages_are_centred_and_equal_rewards_give_none():
    found = advantages([1.0, 0.0, 0.5, 0.5], 2, "none")
    assert found == [0.5, -0.5, 0.0, 0.0]
    scaled = advantages([3.0, 1.0, 0.5, 0.5], 2, "group")
    assert scaled[0] == pytest.approx(1.0 / (2**0.5 + 1e-4)) and scaled[2:] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think> a </think> <answer> b </answer>", 1.0),
        ("<think> a </think>", 0.35),
        ("<answer> b </answer>", 0.35),
        ("<answer> b </answer> <think> a </think>", 0.7),
        ("nothing", 0.0),
    ],
)
def test_format_reward(text, expected):
    assert format_reward([text]) == pytest.approx(expected)
