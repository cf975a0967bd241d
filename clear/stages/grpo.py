"""Stage `grpo`: interleaved GRPO from the bridge model on the rl split."""

from pathlib import Path

from clear.bench.scoring import is_correct
from clear.config import Config
from clear.records import read_samples, write_json
from clear.runtime import apply_runtime


def run(config: Config) -> None:
    """Train and write data/models/grpo, its curves and the first and last figures."""
    apply_runtime(config)
    from clear.model import lora
    from clear.reasoning.answering import Answerer
    from clear.reasoning.engine import Options
    from clear.reasoning.prompts import make_prompt, question_text
    from clear.stages.paths import checkpoint_dir, model_folder
    from clear.training import sharded
    from clear.training.grpo import train
    from clear.training.load import incoming, save, trainable
    from clear.training.parallel import rank
    from clear.training.trainer import StageRun

    start = incoming(model_folder("bridge", config), config, whole=False)
    model, tokenizer = start.model, start.tokenizer
    lora.set_dropout(model, 0.0)
    answerer = Answerer(model, start.vae, tokenizer, config)
    work = StageRun(
        "grpo", config, ["data/models/bridge", "data/degraded/rl", "data/degraded/validation"], checkpoint_dir("grpo")
    )
    samples = list(read_samples("data/degraded/rl"))
    clean = round(config.grpo.clean_share * len(samples))
    shown = [s.image if i < clean else s.seen for i, s in enumerate(samples)]
    bank = answerer.bank(shown, [s.key for s in samples])
    asked = [(i, q) for i, s in enumerate(samples) for q in s.questions[:1]]
    prompts = [make_prompt(tokenizer, bank, i, question_text(q), answerer.system) for i, q in asked]

    held = list(read_samples("data/degraded/validation"))
    held_bank = answerer.bank([s.seen for s in held], [s.key for s in held])
    held_asked = [(i, q) for i, s in enumerate(held) for q in s.questions[:1]]

    def holdout(policy) -> float:
        answerer.model = policy  # sharded weights cannot answer; this is a whole copy of them
        answers = answerer.answer(held_bank, held_asked)
        return sum(is_correct(a.prediction, q) for a, (_, q) in zip(answers, held_asked, strict=True)) / len(held_asked)

    s, g = config.sampling, config.grpo
    options = Options(
        flow_steps=s.flow_steps,
        shift=s.shift,
        sigma=g.sigma,
        temperature=g.temperature,
        max_tokens=s.max_think_tokens,
        max_restorations=s.max_restorations,
        batch=s.batch,
    )
    trainable(model)
    before = None if sharded.enabled() else holdout(model)
    train(work, model, tokenizer, prompts, [q for _, q in asked], options, holdout)
    save(Path("data/models/grpo"), start, config)
    first, last = work.curve[0], work.curve[-1]
    names = ("reward", "reward_accuracy", "call_rate", "groups_with_variance", "ratio_error", "kl")
    figures = {f"{when}_{n}": row.get(n) for when, row in (("first", first), ("last", last)) for n in names}
    after = holdout(model)
    before = first.get("accuracy_holdout") if before is None else before
    if rank() == 0:
        found = {"holdout_before": before, "holdout_after": after, "steps": g.steps, **figures}
        write_json("data/metrics/grpo.json", found)
    work.finish("data/plots/grpo.csv")
