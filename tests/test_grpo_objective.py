"""The GRPO loss by hand, and its options: types of loss against trl's formulas, windows, rewards, judge, stop rule."""

import math
from dataclasses import replace

import pytest
import torch

from clear.config import compose, from_dict
from clear.data.records import Question
from clear.errors import ClearError
from clear.llm.endpoint import connect
from clear.model import flow
from clear.model.tokenizer import decode, encode
from clear.reasoning import engine, grammar
from clear.reasoning.engine import Options, Reply, Trajectory, generate
from clear.training.rl import scoring
from clear.training.rl.judging import judged, score_of
from clear.training.rl.objective import Counts, advantages, aggregate, clipped, grpo_loss, log_weights, policy_terms
from clear.training.rl.rewards import answer_rewards, rewards, weighted
from clear.training.rl.stopping import falls_while_reward_rises, measured
from tests.chat_server import completion, serving, settings, user_text
from tests.tiny import tiny_model, tiny_prompts

LN2 = math.log(2)
SDE = Options(flow_steps=4, shift=3.0, sigma=0.3, temperature=1.0, max_tokens=4, restore="always")


def reference_loss(kind, level, new, old, advantage, mask, longest, low=0.2, high=0.3):
    """trl's loss of one batch, written over padded (B, T) arrays as there."""
    gap = (new - old) * mask
    weight = gap if level == "token" else (gap.sum(1) / mask.sum(1)).unsqueeze(1)
    ratio, advantage = torch.exp(weight), advantage.unsqueeze(1)
    if kind == "cispo":
        terms = -ratio.clamp(max=1 + high).detach() * advantage * new
    elif kind == "sapo":
        temperature = torch.where(advantage > 0, 1.0, 1.05)
        terms = -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantage
    else:
        terms = -torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    terms = terms * mask
    if kind in ("grpo", "sapo"):
        return (terms.sum(1) / mask.sum(1)).mean()
    if kind == "dr_grpo":
        return terms.sum() / (len(new) * longest)
    return terms.sum(1).mean() if kind == "luspo" else terms.sum() / mask.sum()


def _slice(images: int = 2):
    """Two rows of two and one tokens whose weights are 2, 1 and ½, and `images` steps of weights 1 and 1.5."""
    old = torch.tensor([-2.0, -1.0, -1.0])
    text = (old + torch.tensor([LN2, 0.0, -LN2])).requires_grad_()
    image = (torch.tensor([0.0, math.log(1.5)])[:images]).requires_grad_()
    velocity = torch.zeros(images, 2, requires_grad=True)
    rows = torch.tensor([0, 0, 1]), torch.tensor([0, 1])[:images]
    scores = scoring.Scores(text, torch.tensor([1.0, 2.0, 6.0]), rows[0], image, rows[1], velocity)
    given = (old, torch.zeros(images)), (torch.tensor([0.5, -1.0]), torch.tensor([1.0, 2.0]))
    return scores, given


def _settings(**changed):
    weights = {"text_weight": 2.0, "image_weight": 0.5, "velocity_weight": 0.0, "beta": 0.0}
    options = {"clip": 0.2, "clip_high": 0.0, "loss_type": "dapo", "ratio_level": "token"}
    return replace(from_dict(compose(["profile=smoke"])).grpo, **weights | options | changed)


COUNTS = Counts(tokens=4, rows=2, images=2, parts=1, longest=8)


def test_the_loss_of_a_slice_by_hand():
    scores, given = _slice()
    loss, log = grpo_loss(scores, None, *given, COUNTS, _settings())
    # Text: −1.2·½ (clipped), −½ and 0.8·1 (clipped), over 4 tokens; images: −1 and −1.2·2 (clipped), over 2 steps.
    assert loss.item() == pytest.approx(2.0 * (-0.6 - 0.5 + 0.8) / 4 + 0.5 * (-1.0 - 2.4) / 2)
    assert log == pytest.approx({"image_clipped": 1 / 2, "entropy": 3.0, "clipped": 2 / 3, "ratio_error": 1.0})
    loss.backward()
    torch.testing.assert_close(scores.text.grad, torch.tensor([0.0, -2.0 * 0.5 / 4, 0.0]))
    torch.testing.assert_close(scores.image.grad, torch.tensor([-0.5 / 2, 0.0]))


def test_the_reference_adds_the_kl_of_the_text_and_the_distance_of_the_velocity_by_hand():
    scores, given = _slice()
    text = scores.text.detach() + torch.tensor([LN2, 0.0, 0.0])
    reference = replace(scores, text=text, velocity=scores.velocity.detach() + 0.1)
    plain, _ = grpo_loss(scores, None, *given, COUNTS, _settings())
    loss, log = grpo_loss(scores, reference, *given, COUNTS, _settings(beta=0.1, velocity_weight=3.0))
    kl = 2 - LN2 - 1  # of the first token; the others are as likely under the reference
    assert (loss - plain).item() == pytest.approx(2.0 * 0.1 * kl / 4 + 3.0 * 0.1**2, abs=1e-6)
    assert log["kl"] == pytest.approx(kl / 3) and log["velocity_distance"] == pytest.approx(0.1**2)
    loss.backward()
    assert scores.text.grad[0].item() == pytest.approx(2.0 * 0.1 * -1 / 4), "its policy term is clipped"
    torch.testing.assert_close(scores.velocity.grad, torch.full((2, 2), 3.0 * 2 * -0.1 / 4))
    watched, log = grpo_loss(scores, reference, *given, COUNTS, _settings())
    assert torch.equal(watched, plain) and log["kl"] > 0, "without a weight it is a figure"


def test_a_slice_without_restorations_has_the_text_term_alone():
    scores, given = _slice(images=0)
    loss, log = grpo_loss(scores, None, *given, COUNTS, _settings())
    assert loss.item() == pytest.approx(2.0 * -0.3 / 4) and log.keys() == {"entropy", "clipped", "ratio_error"}


@pytest.mark.parametrize("kind", ["dapo", "bnpo", "grpo", "dr_grpo", "luspo", "cispo", "sapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_text_loss_is_trls(kind, level):
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.float)
    new = torch.randn(3, 5).requires_grad_()
    old, advantage = new.detach() + 0.4 * torch.randn(3, 5), torch.tensor([0.5, -1.0, 0.7])
    row = torch.arange(3)[:, None].expand(3, 5)[mask.bool()]
    flat = new[mask.bool()]
    weight = log_weights(flat, old[mask.bool()], row, level)
    terms = policy_terms(kind, weight, flat, advantage[row], 0.2, 0.3)
    loss = aggregate(kind, terms, row, tokens=10, rows=3, parts=1, longest=5)
    expected = reference_loss(kind, level, new, old, advantage, mask, 5)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, new, retain_graph=True)[0] for x in (loss, expected))
    assert ours.abs().sum() > 0
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["dapo", "grpo", "cispo", "sapo"])
def test_an_element_counts_as_clipped_where_its_weight_no_longer_moves_the_loss(kind):
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.29, 1.31, 2.0]).repeat(3)
    advantage = torch.tensor([1.0, -1.0, 0.0]).repeat_interleave(7)
    weight = ratio.log().requires_grad_()
    found = clipped(kind, weight, advantage, 0.2, 0.3)
    if kind == "cispo":  # its weight has no gradient; it is clipped above, for either sign
        assert found.tolist() == ([False] * 5 + [True] * 2) * 2 + [False] * 7
        return
    policy_terms(kind, weight, torch.zeros(21), advantage, 0.2, 0.3).sum().backward()
    assert torch.equal(found, (weight.grad == 0) & (advantage != 0))
    assert found.sum() == (0 if kind == "sapo" else 4), "two above for a positive advantage, two below for a negative"


def test_advantages_by_batch_and_without_rejected_samples():
    assert advantages([1.0, 0.0, None, 0.5, 0.5, None], 3, "none") == [0.5, -0.5, 0.0, 0.0, 0.0, 0.0]
    assert advantages([None, None, 1.0, None], 2, "group") == [0.0] * 4
    scaled = advantages([3.0, 1.0, 0.0, 0.0], 2, "batch")
    assert scaled[0] == pytest.approx(1.0 / 1.4142, rel=1e-3) and scaled[2:] == [0.0, 0.0]


@pytest.mark.parametrize("bridge", ["mlp", "direct"])
def test_noise_enters_in_the_window_only_and_is_all_that_tells_a_group_apart(bridge):
    model, tokenizer = tiny_model(bridge)
    prompts = tiny_prompts(tokenizer, 3)
    options = replace(SDE, window=(1, 3), shared_noise=True)
    found = generate(model, tokenizer, prompts, options, 4, torch.Generator().manual_seed(2))
    for start in range(0, 12, 4):
        states = torch.stack([t.restorations[0].states for t in found[start : start + 4]])
        spread = states.std(dim=0).amax(dim=(1, 2))
        assert spread[:2].max() == 0.0 and spread[2:].min() > 0.01
        for t in found[start : start + 4]:
            assert t.restorations[0].log_probs.isnan().tolist() == [True, False, False, True]
    chosen = [[1, 2]] * len(found)
    owners = [prompts[t.prompt] for t in found]
    with torch.no_grad():
        new = scoring.score(model, owners, found, chosen, flow.time_grid(4, 3.0).tolist(), 0.3, 1.0)
    _, old = scoring.recorded(found, chosen)
    assert (torch.exp(new.image - old) - 1).abs().max() <= 1e-3


def test_a_shared_trunk_equals_every_row_on_its_own(monkeypatch):
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 3)
    options = replace(SDE, window=(2, 3), shared_noise=True)
    batches = []
    plain = engine.velocities

    def counted(model, context, grid, x, t):
        batches.append(len(x))
        return plain(model, context, grid, x, t)

    monkeypatch.setattr(engine, "velocities", counted)
    found = generate(model, tokenizer, prompts, options, 4, torch.Generator().manual_seed(2))
    assert batches == [3, 3, 12, 12], "until the window a group is one row"
    whole = engine.denoise
    monkeypatch.setattr(engine, "denoise", lambda *a: whole(*a[:8]))
    batches.clear()
    alone = generate(model, tokenizer, prompts, options, 4, torch.Generator().manual_seed(2))
    assert batches == [12] * 4
    for a, b in zip(found, alone, strict=True):
        torch.testing.assert_close(a.restorations[0].states, b.restorations[0].states, atol=1e-5, rtol=0)


def test_a_window_outside_the_steps_is_refused():
    for window in ((2, 2), (-1, 2), (3, 5)):
        with pytest.raises(ClearError, match=r"window = .* must lie within the 4 flow steps"):
            replace(SDE, window=window)


def test_the_answers_probability_is_that_of_the_model_reading_its_own_restoration(monkeypatch):
    monkeypatch.setattr("clear.training.rl.rewards.LIMIT", 80.0)  # a random model is very far from an answer
    model, tokenizer = tiny_model()
    prompts = tiny_prompts(tokenizer, 2)
    found = generate(model, tokenizer, prompts, SDE, 2, torch.Generator().manual_seed(1))
    owners = [prompts[t.prompt] for t in found]
    question = Question("q", "test", "a b", "c", evidence="d e")
    given = model, tokenizer, owners, found, [question] * 4
    reply = answer_rewards(*given, "reply", 64)
    assert reply == pytest.approx(answer_rewards(*given, "reply", 1), abs=1e-5)
    wanted = grammar.restore_trace("a b", "d e", "c").replies[1]
    told = [
        Trajectory(t.prompt, t.vocabulary, [t.replies[0], Reply(encode(tokenizer, wanted))], t.restorations)
        for t in found
    ]
    with torch.no_grad():
        scores = scoring.score(model, owners, told, [[]] * 4, (), 1.0, 1.0)
    for n, value in enumerate(reply):
        total = scores.text[scores.text_row == n].sum().item()
        assert value == pytest.approx(1 + total / 80, abs=1e-5)
    # After the trajectory's own thought only the answer block is scored.
    thought = encode(tokenizer, "<think> d </think> <answer> j </answer>")
    for t in found:
        t.replies[-1] = Reply([*thought, 1], [0.0] * (len(thought) + 1), 0)
    answer = answer_rewards(*given, "answer", 64)
    sure = answer_rewards(model, tokenizer, owners, found, [replace(question, answer="j")] * 4, "answer", 64)
    assert decode(tokenizer, found[0].replies[-1].ids).endswith("j </answer>"), "the trajectory stays as it was"
    assert all(0 < x < 1 for x in answer + sure + reply) and answer != sure
    assert min(answer) > max(reply), "two tokens are likelier than nine"
    monkeypatch.setattr("clear.training.rl.rewards.LIMIT", 1.0)
    assert answer_rewards(*given, "reply", 64) == [0.0] * 4, "hopeless answers are told apart no further"


def test_a_judges_score_replaces_exact_match_and_decides_what_counts_as_right():
    config = from_dict(compose(["profile=smoke", "grpo.reward_decision=1.0"])).grpo
    question = Question("q", "test", "a b", "c")
    text = ["<think> a </think> <answer> d </answer>"]
    assert rewards(text, True, question, config)["reward_accuracy"] == 0.0
    found = rewards(text, True, question, config, {"reward_answer": 0.25}, accuracy=0.8)
    assert found["reward_accuracy"] == 0.8 and found["reward_decision"] == 1.0 and found["reward_answer"] == 0.25
    assert weighted(found, config, ("reward_answer", "absent")) == config.reward_answer * 0.25


def test_a_restoration_must_bring_more_than_it_costs():
    config = from_dict(compose(["profile=smoke", "grpo.reward_direct=0.2", "grpo.reward_accuracy=0.9"])).grpo
    question, right, wrong = (
        Question("q", "test", "a b", "c"),
        ["<think> a </think> <answer> c </answer>"],
        ["<think> a </think> <answer> d </answer>"],
    )
    direct, restored = (rewards(right, how, question, config)["reward"] for how in (False, True))
    assert direct - restored == pytest.approx(0.2), "of two right answers the cheaper one is better"
    assert restored > rewards(wrong, False, question, config)["reward"] + 0.6, "and a right one beats a cheap one"
    assert advantages([direct, restored], 2, "none") == pytest.approx([0.1, -0.1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.5", 0.5), (" 1.0\n", 1.0), ("1", 1.0), (".25.", 0.25), ("1.5", None), ("right", None), ("0.9 of 1", None)],
)
def test_a_judges_reply_is_a_number_or_nothing(text, expected):
    assert score_of(text) == expected


def test_an_outage_of_the_judge_rejects_the_sample_and_a_total_one_stops(tmp_path):
    questions = [Question(str(n), "test", f"what {n}", "c") for n in range(4)]

    def answer(body, number):
        said = user_text(body)
        if "what 1" in said:
            return 503, {}, {"error": "busy"}
        return 200, {}, completion("maybe" if "what 2" in said else "0.75")

    with serving(answer) as server, connect(settings(server.url, retries=1), "judge", tmp_path / "j", 0.01) as client:
        assert judged(client, questions, ["d", "d", "d", ""]) == [0.75, None, None, 0.0]
        asked = len(server.bodies)
        assert judged(client, questions[:1], ["d"]) == [0.75] and len(server.bodies) == asked, "asked once"
        with pytest.raises(ClearError, match=r"scored none of 1 answers.*503"):
            judged(client, questions[1:2], ["d"])


def test_a_judge_reads_the_options_and_what_stands_behind_a_letter(tmp_path):
    choice = Question("q", "test", "Which?", "B", ("a red cat", "a blue dog"))
    free = Question("f", "test", "Why?", "it rains")
    with serving(lambda body, number: (200, {}, completion("1"))) as server:
        with connect(settings(server.url), "judge", tmp_path / "j") as client:
            judged(client, [choice, choice, choice, free], ["A", "a blue dog", "the second", "rain"])
        asked = sorted(user_text(body) for body in server.bodies)
    said = sorted(("Answer: A. a red cat", "Answer: B. a blue dog", "Answer: the second"))
    for text, answer in zip(sorted(t for t in asked if "Which?" in t), said, strict=True):
        assert "Which?\nA. a red cat\nB. a blue dog\n" in text and "Correct answer: B. a blue dog\n" in text
        assert answer in text
    assert sum("Question: Why?\nCorrect answer: it rains\nAnswer: rain" in text for text in asked) == 1


def test_a_falling_accuracy_under_a_rising_reward_stops():
    falling = [(0.80, 0.5), (0.85, 0.6), (0.82, 0.7), (0.81, 0.8)]
    assert falls_while_reward_rises(falling, 2, 0.0)
    assert not falls_while_reward_rises(falling, 0, 0.0), "off"
    assert not falls_while_reward_rises(falling, 2, 0.05), "within the margin"
    assert not falls_while_reward_rises(falling[:3], 2, 0.0), "one fall is not two"
    assert not falls_while_reward_rises([*falling[:3], (0.81, 0.55)], 2, 0.0), "the reward fell too"
    assert not falls_while_reward_rises([*falling[:3], (0.86, 0.9)], 2, 0.0), "it recovered"


def test_measurements_carry_the_mean_reward_since_the_one_before():
    history = [
        {"reward": 0.2, "accuracy_holdout": 0.8},
        {"reward": 0.4},
        {"other": 1.0},
        {"reward": 0.6, "accuracy_holdout": 0.7},
    ]
    assert measured(history) == [(0.8, 0.2), (0.7, pytest.approx(0.5))]
