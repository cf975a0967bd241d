"""Contract 2 and the objective: ratio 1 on a fresh policy, KL 0 at step 0, both gradients real."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from clear.config import compose, from_dict
from clear.data.records import Question, write_samples
from clear.degradation.build import degraded_samples
from clear.errors import ClearError
from clear.model import flow, lora
from clear.model.checkpoint import load_bagel, save_bagel
from clear.model.vae import AutoEncoder
from clear.reasoning.engine import Options, generate
from clear.schema import Lora
from clear.sources.scenes.render import scenes
from clear.stages.grpo import prepare
from clear.training.load import labelled, trainable
from clear.training.loop.run import StageRun
from clear.training.rl import scoring
from clear.training.rl.objective import advantages
from clear.training.rl.policy import Task
from clear.training.rl.rewards import format_reward
from tests.helpers.adapters import stirred
from tests.tiny import save_random_model, tiny_model, tiny_prompts

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


class Interrupted(Exception):
    """Stands for the kill of the process."""


def _train(folder: Path, rank: int, stop_at: int | None = None, changed: tuple[str, ...] = (), kind: str = ""):
    """A short run of the real trainer; returns its curve, the trained state and the StageRun. `kind` quantises."""
    from clear.training.rl.grpo import train

    overrides = ["profile=smoke", "runtime.checkpoint_every=2", "runtime.log_every=1", "runtime.device=cpu"]
    more = [
        "grpo.steps=4",
        "grpo.prompts=2",
        "grpo.lr=0.01",
        "grpo.warmup=0",
        "grpo.scale_advantages=group",
        "grpo.rows_per_pass=4",
    ]
    config = from_dict(compose([*overrides, *more, "grpo.holdout_every=1", "grpo.reward_format=1.0", *changed]))
    model, tokenizer = tiny_model("mlp")
    if kind:
        save_bagel(folder / "weights", model, AutoEncoder(model.config.vae), tokenizer)
        model = load_bagel(folder / "weights", kind=kind)[0]
    if rank:
        stirred(lora.attach(model, Lora(rank, 4.0, 0.0, ["q_proj", "down_proj"], "both")), std=0.2)
    trainable(model)
    prompts = tiny_prompts(tokenizer, 6)
    questions = [Question(str(i), "test", "a b", "abcdef"[i]) for i in range(6)]
    folder.mkdir(exist_ok=True)
    (folder / "input.txt").write_text("data")
    run = StageRun("grpo", config, [folder / "input.txt"], folder / "runs")
    asked = 0

    def holdout(_) -> float:
        nonlocal asked
        asked += 1
        if stop_at is not None and asked == stop_at:
            raise Interrupted
        return 0.5

    torch.manual_seed(3)
    options = replace(OPTIONS, flow_steps=3, restore="always")
    train(run, model, Task(tokenizer, prompts, questions, options, holdout))
    state = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return run.curve, state, run


@pytest.mark.parametrize(("rank", "kind"), [(0, ""), (2, ""), (2, "nf4"), (2, "int8")])
def test_training_starts_at_its_reference_and_resumes_exactly(tmp_path, rank, kind, monkeypatch):
    import clear.training.rl.grpo as module

    def uneven(texts, restored, question, config, more, accuracy):
        value = float(len(texts[-1]) % 3)
        return {"reward": value, "reward_accuracy": value}

    monkeypatch.setattr(module, "rewards", uneven)  # a random model never answers; any reward with variance will do
    curve, expected, _ = _train(tmp_path / "whole", rank, kind=kind)
    assert len(curve) == 4 and curve[0]["kl"] == 0.0 and curve[0]["ratio_error"] <= 1e-3
    assert max(row["kl"] for row in curve[1:]) > 0
    assert bool(rank) == any("lora_" in name for name in expected)
    with pytest.raises(Interrupted):
        _train(tmp_path / "killed", rank, stop_at=4, kind=kind)
    checkpoint = next((tmp_path / "killed").rglob("model.safetensors"))
    with safe_open(checkpoint, "pt") as file:
        assert {name.removeprefix("bagel.") for name in file.keys()} == set(expected), "only what is trained"  # noqa: SIM118
    again, found, _ = _train(tmp_path / "killed", rank, kind=kind)
    assert again == curve
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("off", ["text", "image"])
def test_a_term_without_weight_is_not_computed(tmp_path, monkeypatch, off):
    """Its figures are absent, the heads that only it needs learn nothing, and a NaN in it does no harm."""
    import clear.training.rl.grpo as module

    def uneven(texts, restored, question, config, more, accuracy):
        value = float(len(texts[-1]) % 3)
        return {"reward": value, "reward_accuracy": value}

    def broken(*given):
        found = scored(*given)
        noted.append((len(found.text), len(found.image)))
        part = getattr(found, off)
        setattr(found, off, part * torch.nan)
        return found

    scored, noted = scoring.score, []
    monkeypatch.setattr(module, "rewards", uneven)
    monkeypatch.setattr(scoring, "score", broken)
    zero = {"text": ["grpo.text_weight=0", "grpo.velocity_weight=0.1"], "image": ["grpo.velocity_weight=0"]}[off]
    curve, state, _ = _train(tmp_path, 0, changed=(*zero, "grpo.beta=0.1", f"grpo.{off}_weight=0"))
    model = dict(tiny_model("mlp")[0].named_parameters())
    head = {"text": "language_model.lm_head.weight", "image": "llm2vae.weight"}[off]
    other = {"image": "language_model.lm_head.weight", "text": "llm2vae.weight"}[off]
    place = ("text", "image").index(off)
    assert noted and all(pair[place] == 0 < pair[1 - place] for pair in noted)
    torch.testing.assert_close(state[head], model[head], atol=1e-5, rtol=1e-3)  # weight decay alone
    assert (state[other] - model[other]).abs().max() > 5e-3
    assert all(value.isfinite().all() for value in state.values())
    absent = {"text": {"kl", "entropy", "clipped"}, "image": {"image_clipped", "velocity_distance"}}[off]
    assert not absent & {name for row in curve for name in row}


def test_a_step_does_not_depend_on_how_it_is_sliced(tmp_path, monkeypatch):
    """In the second step nothing is restored and one slice of two teaches nothing: the first's momentum goes on."""
    import clear.training.rl.grpo as module

    states, generated = [], module.generate
    for rows in (1, 4):
        turns, number = iter(["always", "never"]), iter(range(99))

        def turned(model, tokenizer, prompts, options, *rest, turns=turns):
            return generated(model, tokenizer, prompts, replace(options, restore=next(turns)), *rest)

        def uneven(texts, restored, question, config, more, accuracy, number=number):
            value = float((0, 1, 0, 1 if restored else 0)[next(number) % 4])
            return {"reward": value, "reward_accuracy": value}

        monkeypatch.setattr(module, "generate", turned)
        monkeypatch.setattr(module, "rewards", uneven)
        sizes = "grpo.steps=2", "grpo.prompts=2", "grpo.group_size=2", f"grpo.rows_per_pass={rows}"
        states.append(_train(tmp_path / str(rows), 0, changed=(*sizes, "grpo.optimiser.weight_decay=0"))[1])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=3e-4, rtol=0, msg=name)  # steps are of 1e-2


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(("changes", "kept"), [(("grpo.beta=0", "grpo.velocity_weight=0"), False), ((), True)])
def test_the_incoming_policy_is_kept_only_where_it_is_read(tmp_path, rank, changes, kept, monkeypatch):
    import clear.training.rl.grpo as module

    made, whole = [], module.make_trainer
    monkeypatch.setattr(module, "make_trainer", lambda *given: made.append(whole(*given)) or made[-1])
    curve, _, _ = _train(tmp_path, rank, changed=("grpo.steps=1", *changes))
    held = made[0].reference is not None or any("reference" in n for n, _ in made[0].model.named_modules())
    assert held is kept and len(curve) == 1


@pytest.mark.parametrize("split", ["rl", "validation"])
def test_a_split_without_a_question_is_refused_before_the_training(tmp_path, monkeypatch, split):
    """An empty rl split was looked for prompts for ever, an empty validation split ended in a division by 0."""
    monkeypatch.chdir(tmp_path)
    config = from_dict(compose(["profile=smoke", "runtime.threads=1", "runtime.device=cpu"]))
    save_random_model(Path("data/models/bridge"), config)
    made = list(degraded_samples([(sample, "dark", "high") for sample in scenes("rl", 2, 1, 64, 1)], 0.1, 1))
    for name in ("rl", "validation"):
        write_samples(f"data/degraded/{name}", [] if name == split else made)
    with pytest.raises(ClearError, match=rf"grpo: data/degraded/{split} holds no question; raise source.{split}"):
        prepare(config)


def test_clean_prompts_are_a_share_of_the_paired_images_whatever_their_order(tmp_path, monkeypatch):
    from clear.reasoning.answering import Answerer

    monkeypatch.chdir(tmp_path)
    config = from_dict(compose(["profile=smoke", "runtime.threads=1", "runtime.device=cpu", "grpo.clean_share=0.4"]))
    save_random_model(Path("data/models/bridge"), config)
    made = list(degraded_samples([(sample, "dark", "high") for sample in scenes("rl", 10, 1, 64, 1)], 0.1, 1))
    made[3] = replace(made[3], image=made[3].degraded, paired=False)  # it came degraded: no clean image to show
    write_samples("data/degraded/validation", made[:1])
    seen, bank = [], Answerer.bank
    monkeypatch.setattr(Answerer, "bank", lambda self, images, names: seen.append(images) or bank(self, images, names))
    found = []
    for samples in (made, made[::-1]):
        write_samples("data/degraded/rl", samples)
        prepare(config)
        shown = dict(zip((s.id for s in samples), seen[-2], strict=True))
        found.append({s.id for s in samples if s.paired and shown[s.id] == s.image})
    assert len(found[0]) == 4 and found[0] == found[1] != {s.id for s in made[:4]}
    config.sft.labelled = 0.5  # a reward needs an answer
    _, task = prepare(config)
    asked = [q.id for s in (made[::-1][i] for i in sorted(labelled(made[::-1], config))) for q in s.questions]
    assert [q.id for q in task.questions] == asked and len(seen[-2]) == 5


def test_sharded_adapters_and_uneven_prompts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ClearError, match=r"grpo.prompts = 2 must divide by the 3"):
        _train(tmp_path, 0)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ClearError, match="without FSDP"):
        _train(tmp_path, 2)
