"""Does the objective do what it says? Planted rewards that only one gradient can reach, and invariances of a step."""

from dataclasses import replace

import pytest
import torch

from clear.config import compose, from_dict
from clear.data.records import Question
from clear.model import flow, lora
from clear.model.bagel import GENERATION
from clear.model.tokenizer import encode
from clear.reasoning.engine import generate
from clear.schema import Lora
from clear.training.load import trainable
from clear.training.loop.run import StageRun
from clear.training.rl import grpo as module
from clear.training.rl import scoring
from clear.training.rl.policy import Task
from tests.helpers.adapters import stirred
from tests.helpers.policy import BASE, OPTIONS, restored, trainer_of
from tests.tiny import tiny_model, tiny_prompts

TIMES = flow.time_grid(4, 1.0).tolist()


def test_a_reward_for_one_answer_raises_its_probability_from_chance_to_certainty(tmp_path, monkeypatch):
    def planted(texts, restored, question, config, more, accuracy):
        value = float(texts[-1].split()[:1] == [question.answer])
        return {"reward": value, "reward_accuracy": value}

    monkeypatch.setattr(module, "rewards", planted)
    model, tokenizer = tiny_model("mlp")
    prompts = tiny_prompts(tokenizer, 4)
    wanted = encode(tokenizer, "c")[0]
    options = replace(OPTIONS, restore="plain", max_tokens=1)

    def probability() -> float:
        with torch.no_grad():
            return engine_probability(model, tokenizer, prompts, wanted)

    trainable(model)
    before = probability()
    size = "grpo.prompts=4", "grpo.group_size=16", "grpo.rows_per_pass=64"
    trainer_of(
        tmp_path, model, tokenizer, prompts, options, *size, "grpo.steps=40", "grpo.lr=0.01", "grpo.beta=0"
    ).train()
    assert before < 0.15 and probability() > 0.9


def engine_probability(model, tokenizer, prompts, wanted: int) -> float:
    """Smallest probability over the prompts that the first token of a reply is `wanted`."""
    found = generate(model, tokenizer, prompts, replace(OPTIONS, restore="plain", max_tokens=1, temperature=0.0))
    for trajectory in found:
        trajectory.replies[0].ids, trajectory.replies[0].forced = [wanted], 0
    scores = scoring.score(model, prompts, found, [[]] * len(found), TIMES, 0.3, 1.0)
    return scores.text.exp().min().item()


def brightness(model, prompts, trigger, sampled) -> torch.Tensor:
    """Mean (count,) of each of them."""
    return restored(model, prompts, trigger, sampled).mean((1, 2))


@pytest.mark.parametrize(
    "choice", ["window", pytest.param("random", marks=pytest.mark.slow), pytest.param("all", marks=pytest.mark.slow)]
)
def test_a_reward_on_the_latents_alone_is_reached_through_the_image_loss_alone(tmp_path, monkeypatch, choice):
    def planted(model, tokenizer, prompts, trajectories, questions, scored, batch):
        return [t.restorations[-1].x0.mean().item() for t in trajectories]

    monkeypatch.setattr(module, "answer_rewards", planted)
    options = replace(OPTIONS, max_tokens=1, shared_noise=choice == "window")
    shifts = {}
    for weight in (1.0, 0.0):
        model, tokenizer = tiny_model("mlp")
        prompts, trigger = tiny_prompts(tokenizer, 4), encode(tokenizer, "restore")
        trainable(model, GENERATION)
        before = brightness(model, prompts, trigger, options)
        folder = tmp_path / str(weight)
        folder.mkdir()
        more = ["grpo.text_weight=0", f"grpo.image_weight={weight}", f"grpo.sde_choice={choice}", "grpo.sde_steps=2"]
        more += ["grpo.separate_advantages=true", "grpo.reward_answer=1.0", "grpo.beta=0", "grpo.steps=25"]
        size = "grpo.prompts=4", "grpo.group_size=8", "grpo.rows_per_pass=32", "grpo.lr=0.003"
        trainer_of(folder, model, tokenizer, prompts, options, *size, *more).train()
        shifts[weight] = brightness(model, prompts, trigger, options) - before
    assert shifts[1.0].min() > 0.3, f"{shifts} and the latents have a standard deviation of about 1"
    assert shifts[0.0].abs().max() < 0.02, "weight decay is all that is left"


def gradients(trainer, inputs) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the rollout that lies in the trainer, of one slice per entry of `inputs`."""
    trainer.model.zero_grad()
    total = 0.0
    for part in inputs:
        loss = trainer._compute_loss(trainer.model, part)
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def rolled(tmp_path, *overrides, rank: int = 0, restore: str = "always", checkpointing: bool = False):
    """A trainer holding a rollout of 4 prompts × 4 with uneven rewards, and its 16 rows."""
    model, tokenizer = tiny_model("mlp")
    if rank:
        stirred(lora.attach(model, Lora(rank, 4.0, 0.0, ["q_proj", "down_proj"], "both")), std=0.2)
    trainable(model)
    model.language_model.gradient_checkpointing = checkpointing
    size = "grpo.prompts=4", "grpo.group_size=4", "grpo.steps=1"
    options = replace(OPTIONS, restore=restore)
    trainer = trainer_of(tmp_path, model, tokenizer, tiny_prompts(tokenizer, 4), options, *size, *overrides)
    inputs = trainer._generate_and_score_completions([{"prompt": str(i // 4)} for i in range(16)])
    return trainer, inputs


@pytest.fixture(autouse=True)
def uneven(monkeypatch):
    """Any reward with variance will do: a random model never answers."""

    def found(texts, restored, question, config, more, accuracy):
        value = float(sum(map(len, texts)) % 3)
        return {"reward": value, "reward_accuracy": value, **more}

    monkeypatch.setattr(module, "rewards", found)


def slices(inputs, size: int) -> list[dict]:
    return [{k: v[s : s + size] for k, v in inputs.items()} for s in range(0, len(inputs["index"]), size)]


def same(a, b) -> None:
    assert a[0] == pytest.approx(b[0], abs=1e-5)
    assert a[1].keys() == b[1].keys()
    for name, value in a[1].items():
        torch.testing.assert_close(value, b[1][name], atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", ["dapo", "grpo", "dr_grpo", "luspo", "cispo", "sapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_one_pass_of_eight_equals_eight_of_one(tmp_path, kind, level):
    trainer, inputs = rolled(tmp_path, f"grpo.loss_type={kind}", f"grpo.ratio_level={level}")
    whole = gradients(trainer, [inputs])
    assert sum(g.abs().sum() for g in whole[1].values()) > 0
    same(whole, gradients(trainer, slices(inputs, 8)))
    same(whole, gradients(trainer, slices(inputs, 1)))


def test_the_order_of_groups_and_rows_changes_nothing(tmp_path):
    trainer, inputs = rolled(tmp_path)
    turned = torch.tensor([*range(8, 16), 3, 1, 2, 0, *range(4, 8)])
    same(gradients(trainer, [inputs]), gradients(trainer, [{k: v[turned] for k, v in inputs.items()}]))


@pytest.mark.parametrize("restore", ["always", "auto"])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("size", [16, 4, 1])
def test_ratio_is_one_and_kl_zero_in_the_shapes_of_training(tmp_path, restore, rank, size):
    trainer, inputs = rolled(tmp_path, rank=rank, restore=restore, checkpointing=True)
    trainer.model.train()
    gradients(trainer, slices(inputs, size))
    log = trainer._metrics["train"]
    assert max(log["ratio_error"]) <= 1e-3 and max(log["kl"]) <= 1e-6
    assert len(log["kl"]) >= 1 and all(0 <= x <= 1 for x in log["clipped"])


def test_checkpointing_leaves_the_gradients_as_they_are(tmp_path):
    found = []
    for on in (False, True):
        folder = tmp_path / str(on)
        folder.mkdir()
        trainer, inputs = rolled(folder, checkpointing=on)
        trainer.model.train()
        found.append(gradients(trainer, [inputs]))
    same(*found)


def test_the_stop_rule_ends_the_run_with_the_best_weights(tmp_path, monkeypatch):
    count = iter(range(1000))

    def rising(texts, restored, question, config, more, accuracy):
        value = next(count) / 100
        return {"reward": value, "reward_accuracy": value}

    monkeypatch.setattr(module, "rewards", rising)
    truth = {}
    model, tokenizer = tiny_model("mlp")
    trainable(model)
    weights = model.language_model.lm_head.weight

    def holdout(_) -> float:
        n = len(truth)
        truth[n] = weights.detach().clone()
        return [0.5, 0.8, 0.7, 0.6, 0.9][n]

    overrides = "grpo.steps=5", "grpo.prompts=2", "grpo.group_size=4", "grpo.stop_after=2", "grpo.lr=0.01"
    config = from_dict(compose([*BASE, *overrides, "grpo.holdout_every=1"]))
    (tmp_path / "input.txt").write_text("data")
    run = StageRun("grpo", config, [tmp_path / "input.txt"], tmp_path / "runs")
    prompts = tiny_prompts(tokenizer, 4)
    questions = [Question(str(i), "test", "a b", "c") for i in range(4)]
    done = module.train(run, model, Task(tokenizer, prompts, questions, OPTIONS, holdout))
    assert done.stopped and done.steps == 4 and len(truth) == 4
    assert torch.equal(weights, truth[1]) and not torch.equal(truth[1], truth[3])
    assert done.seconds_per_step.keys() == {"rollout", "reward", "update", "holdout"}
    assert all(value > 0 for value in done.seconds_per_step.values())
