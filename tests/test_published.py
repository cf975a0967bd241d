"""The BAGEL profiles hold the published values, and every such setting reaches what it sets (METHOD §1-§6)."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from clear.config import CONF_DIR, compose, from_dict
from clear.model.sequence import IGNORE, LATENT
from clear.model.tokenizer import encode
from clear.reasoning.answering import guidance
from clear.reasoning.grammar import TRIGGER
from clear.schema import Optimiser, Phase
from clear.stages.grpo import rollout_options
from clear.training.loop.run import StageRun
from clear.training.loop.trainer import training_arguments
from clear.training.sft import TraceWeights, trace_loss
from tests.helpers.mixed_sizes import parts

BAGEL = ("bagel_7b_lora", "bagel_7b")

PUBLISHED = {
    "model": {"hidden": 3584, "layers": 28, "heads": 28, "kv_heads": 4, "mlp": 18944},
    "source": {"min_side": 64, "max_aspect": 5.0, "skip_cjk": True},
    "degrade": {"size_scale": 1.0, "severity_weights": [0.2, 0.3, 0.5]},
    "optimiser": {"beta1": 0.9, "beta2": 0.95, "eps": 1e-15, "weight_decay": 0.01, "clip": 1.0, "lr_floor": 0.01},
    "sft": {"ce_weight": 1.0, "mse_weight": 1.0, "distill_weight": 0.4, "distill_stride": 1}
    | {"drop_vit": 0.4, "drop_text": 0.1, "traces": {"steps": 8000, "batch": 8, "lr": 1e-5, "warmup": 500}},
    "bridge": {"kind": "direct"},
    "grpo": {"steps": 400, "prompts": 32, "group_size": 8, "lr": 5e-6, "warmup": 0, "flow_steps": 19}
    | {"temperature": 1.0, "clip": 0.2, "beta": 0.04, "image_weight": 0.5, "sde_steps": 1, "sigma": 0.3}
    | {"reward_accuracy": 0.75, "reward_format": 0.1, "reward_decision": 0.15, "scale_advantages": "none"}
    | {"optimiser": Optimiser(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, clip=1.0, lr_floor=0.0)},
    "sampling": {"flow_steps": 49, "shift": 3.0, "text_guidance": 3.0, "image_guidance": 1.5, "max_restorations": 2}
    | {"guidance_from": 0.4, "guidance_to": 1.0, "guidance_renorm": "text_channel", "guidance_renorm_min": 0.0}
    | {"system_prompt": True},
}
"""By section; the evaluation is the benchmark's own, of 50 grid points, a rollout has 20: a step fewer each."""


@pytest.mark.parametrize("profile", BAGEL)
def test_a_bagel_profile_holds_the_published_values(profile):
    composed = from_dict(compose([f"profile={profile}"]))
    for section, values in PUBLISHED.items():
        for name, value in values.items():
            wanted = Phase(**value) if name == "traces" else value
            assert getattr(getattr(composed, section), name) == wanted, f"{section}.{name}"
    assert composed.sft.ema == {"bagel_7b": 0.995, "bagel_7b_lora": 0.0}[profile]
    assert composed.runtime.threads == 0, "all cores, not a laptop's two"
    rollout = rollout_options(composed)
    assert rollout.flow_steps == 19 and not rollout.guidance.on and rollout.sigma == 0.3
    assert guidance(composed.sampling).contexts == 3


@pytest.mark.parametrize("profile", BAGEL)
def test_every_value_of_a_bagel_profile_names_its_source_or_reason(profile):
    sections: dict[int, bool] = {}  # by indentation: whether the line of the section has a comment
    for line in (CONF_DIR / f"profile/{profile}.yaml").read_text().splitlines():
        text = line.split("#")[0].rstrip()
        if not text or re.match(r"defaults:|profile:|\s*- ", text):
            continue
        depth = len(text) - len(text.lstrip())
        sections = {above: said for above, said in sections.items() if above < depth}
        if text.endswith(":"):
            sections[depth] = "#" in line
        else:
            assert "#" in line or any(sections.values()), f"{profile}.yaml: {text.strip()} says not why"


@pytest.mark.parametrize(
    "optimiser",
    [Optimiser(0.9, 0.95, 1e-8, 0.01, 1.0, 0.1), Optimiser(0.8, 0.999, 1e-15, 0.0, 0.5, 0.01)],
    ids=["neutral", "other"],
)
def test_the_settings_reach_optimiser_and_schedule(config, tmp_path, optimiser):
    run = StageRun("test", config, [], tmp_path)
    phase = Phase(steps=10, batch=2, lr=0.02, warmup=2)
    args = training_arguments(TrainingArguments, run, tmp_path, 2, phase, optimiser)
    trainer = Trainer(model=nn.Linear(3, 3), args=args)
    trainer.create_optimizer_and_scheduler(phase.steps)
    groups = trainer.optimizer.param_groups
    assert {(*group["betas"], group["eps"]) for group in groups} == {(optimiser.beta1, optimiser.beta2, optimiser.eps)}
    assert max(group["weight_decay"] for group in groups) == optimiser.weight_decay
    assert args.max_grad_norm == optimiser.clip
    rates = []
    for _ in range(phase.steps):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
    assert max(rates) == pytest.approx(phase.lr) and rates[-1] == pytest.approx(optimiser.lr_floor * phase.lr)


@pytest.mark.slow
def test_other_optimiser_settings_train_other_weights(config, tmp_path):
    """Through the loop itself: the section of the parameters is the one that is used."""
    from clear.training.loop.trainer import optimise

    def trained(**settings) -> torch.Tensor:
        torch.manual_seed(5)
        module, data = nn.Linear(4, 1), torch.randn(8, 4)
        used = replace(config, optimiser=replace(config.optimiser, **settings))
        run = StageRun("test", used, [], tmp_path / str(settings))
        optimise(run, "p", module, lambda i: (module(data[i]).pow(2).mean(), {}), 8, Phase(6, 4, 0.05, 0))
        return module.weight.detach()

    plain = trained()
    assert torch.equal(plain, trained(beta1=0.9))
    for other in ({"beta1": 0.5}, {"beta2": 0.5}, {"eps": 0.1}, {"weight_decay": 1.0}, {"lr_floor": 0.9}):
        assert not torch.equal(plain, trained(**other)), other


def _step(config, images, drop_text: float, thought: str, **weights):
    """Figures of one step and its layout, of traces whose first reply thinks `thought`."""
    model, tokenizer, _, data = parts("direct", config, images)
    data.reply_1 = [encode(tokenizer, f"<think> {thought} </think> {TRIGGER}") for _ in data.reply_1]
    built = []
    hook = model.register_forward_pre_hook(lambda _, args: built.append(args[0]))
    torch.manual_seed(3)
    _, figures = trace_loss(model, data, TraceWeights(LATENT, drop_text=drop_text, **weights))([0, 1, 2, 3])
    hook.remove()
    return figures, built[0], data


def test_dropped_text_hides_the_first_reply_beside_the_direct_path_too(config, images):
    both = {"both_paths": True, "other_path": 1.0}
    shown, other = (_step(config, images, 0.0, thought, **both)[0] for thought in ("a", "c"))
    hidden, again = (_step(config, images, 1.0, thought, **both)[0] for thought in ("a", "c"))
    assert shown["mse"] != other["mse"] and hidden["mse"] == pytest.approx(again["mse"], rel=1e-6)


def test_dropped_text_leaves_every_reply_and_hides_the_first_from_the_velocity(config, images):
    (shown, whole, data), (other, _, _) = (_step(config, images, 0.0, thought) for thought in ("a", "c"))
    assert shown["mse"] != other["mse"], "the velocity reads the reply"
    (hidden, dropped, _), (again, _, _) = (_step(config, images, 1.0, thought) for thought in ("a", "c"))
    assert hidden["mse"] == pytest.approx(again["mse"], rel=1e-6), "as guidance's context without the reply"
    assert hidden["mse"] != shown["mse"]
    assert (dropped.target != IGNORE).sum() == (whole.target != IGNORE).sum(), "every reply is learned still"
    prompt, rows = data.prompt(0), len(data.rows)
    texts = [text for text in (prompt.system, prompt.question) if text]
    assert ((whole.sample >= 0).sum() - (dropped.sample >= 0).sum()) == rows * sum(len(text) + 2 for text in texts)
