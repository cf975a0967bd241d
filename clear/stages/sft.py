"""Stages `sft` (restore, then answer) and `sft_direct` (the baseline): one module, same data and parameters."""

from dataclasses import replace
from pathlib import Path

from clear.data.io import write_json
from clear.model.runtime import apply_runtime
from clear.schema import Config, Phase


def run(config: Config, direct: bool = False) -> None:
    """Fine-tune the base on the traces.

    `direct` answers every trace directly, for as many optimiser steps as the restoring model takes in all of its
    stages: those of bridge and GRPO follow as one more phase, at the learning rate of the answers through the bridge.
    With `sft.both_paths` both models learn replies from the first step, and so under the same learning rates; where
    `sft.labelled` leaves pictures without answers, the warm-up of the restoring one trains its generation alone.
    """
    apply_runtime(config)
    from clear.data.workspace import checkpoint_dir, model_folder
    from clear.model.bagel import GENERATION, VISION, frozen
    from clear.training import sft
    from clear.training.load import incoming, save, trace_data, trainable
    from clear.training.loop.parallel import rank
    from clear.training.loop.run import StageRun
    from clear.training.loop.trainer import optimise
    from clear.training.panel import panel
    from clear.training.robust import robust_loss

    name = "sft_direct" if direct else "sft"
    start = incoming(model_folder("base", config), config, whole=False)
    model, ema = start.model, config.sft.ema
    data = trace_data(start, config)
    work = StageRun(name, config, ["data/models/base", "data/traces", "data/degraded/sft"], checkpoint_dir(name))
    feedback = "reencode" if config.bridge.kind == "mlp" else "bridge"  # as in evaluation: that bridge comes later
    work.panel = panel(start, config, "plain" if direct else "always", feedback)
    warm, traces, both = config.sft.restoration, config.sft.traces, config.sft.both_paths
    never = frozen(config.sft.train_vit)
    if config.sft.robust_vit.steps:
        trainable(model, only=(VISION,), never=())
        optimise(work, "robust_vit", model, robust_loss(model, data), 2 * len(data.shown), config.sft.robust_vit)
    if direct:
        trainable(model, never=never)
        phases = [warm, traces] if both else [Phase(warm.steps + traces.steps, traces.batch, traces.lr, traces.warmup)]
        phases.append(_later(config))
        for n, phase in enumerate(phases):
            optimise(
                work,
                f"direct_{n}" if n else "direct",
                model,
                sft.direct_loss(model, data),
                len(data.learned),
                phase,
                ema,
            )
    else:
        # Where most pictures have no answer, the velocity alone would train what answers, and it forgets.
        both = both and config.sft.labelled == 1
        trainable(model, () if both else GENERATION, never)
        optimise(work, "restoration", model, sft.restoration_loss(model, data, both), len(data.paired), warm, ema)
        trainable(model, never=never)
        loss = sft.trace_loss(model, data, sft.trace_weights(config))
        optimise(work, "traces", model, loss, len(data.learned), traces, ema)
    model.config = replace(model.config, bridge="direct")
    save(Path("data/models") / name, start, config)
    if rank() == 0:
        steps = warm.steps + traces.steps + (_later(config).steps if direct else 0)
        write_json(f"data/metrics/{name}.json", {"traces": len(data.learned), "steps": steps})
    work.finish(f"data/plots/{name}.csv")


def _later(config: Config) -> Phase:
    """What the restoring model still trains after its fine-tuning, as a phase of the baseline."""
    b = config.bridge
    steps = b.distill.steps + b.answer.steps + b.decide.steps + config.grpo.steps
    return Phase(steps, b.answer.batch, b.answer.lr, b.answer.warmup)
