"""Stages `sft` (restore, then answer) and `sft_direct` (the baseline): one module, same data, steps and parameters."""

from dataclasses import replace
from pathlib import Path

from clear.config import Config, Phase
from clear.records import write_json
from clear.runtime import apply_runtime


def run(config: Config, direct: bool = False) -> None:
    """Fine-tune the base on the traces. `direct` answers every trace directly for as many steps as both phases."""
    apply_runtime(config)
    from clear.model.checkpoint import load_bagel, save_bagel
    from clear.model.sequence import LATENT, VIT
    from clear.stages.paths import checkpoint_dir, model_folder
    from clear.training import sft
    from clear.training.load import trace_data
    from clear.training.trainer import StageRun, optimise

    name = "sft_direct" if direct else "sft"
    model, vae, tokenizer = load_bagel(model_folder("base", config))
    data = trace_data(tokenizer, vae, config)
    work = StageRun(name, config, ["data/models/base", "data/traces", "data/degraded/sft"], checkpoint_dir(name))
    warm, traces = config.sft.restoration, config.sft.traces
    if direct:
        both = Phase(warm.steps + traces.steps, traces.batch, traces.lr, traces.warmup)
        sft.set_trainable(model)
        optimise(work, "direct", model, sft.direct_loss(model, data), len(data), both)
    else:
        sft.set_trainable(model, only=sft.GENERATION)
        optimise(work, "restoration", model, sft.restoration_loss(model, data), len(data), warm)
        sft.set_trainable(model)
        weights = sft.TraceWeights(
            feedback=VIT if config.bridge.kind == "mlp" else LATENT,
            ce=config.sft.ce_weight,
            mse=config.sft.mse_weight,
            distill=config.sft.distill_weight,
            stride=config.sft.distill_stride,
            drop_vit=config.sft.drop_vit,
            other_path=config.sft.other_path,
        )
        optimise(work, "traces", model, sft.trace_loss(model, data, weights), len(data), traces)
    model.config = replace(model.config, bridge="direct")
    save_bagel(Path("data/models") / name, model, vae, tokenizer)
    write_json(f"data/metrics/{name}.json", {"traces": len(data), "steps": warm.steps + traces.steps})
    work.finish(f"data/plots/{name}.csv")
