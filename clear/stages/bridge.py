"""Stage `bridge`: teach the model to read its own denoised latents without decoding them."""

from dataclasses import replace
from pathlib import Path

from clear.data.io import write_json
from clear.data.records import CLEAN
from clear.model.runtime import apply_runtime
from clear.schema import Config

OWN_LATENTS = 4096
"""About how many of the model's own denoised latents are made for the distillation and the answers."""


def run(config: Config) -> None:
    """Add the configured bridge to the SFT model, distil it, and train the answers through it."""
    apply_runtime(config)
    import torch

    from clear.data.workspace import checkpoint_dir, model_folder
    from clear.model import lora
    from clear.model.bagel import FROZEN, GENERATION
    from clear.model.bridge import LatentBridge
    from clear.reasoning.answering import guidance
    from clear.reasoning.engine import Options
    from clear.training import bridge, sft
    from clear.training.load import at_work, incoming, save, trace_data, trainable
    from clear.training.loop.parallel import made_once, one_machine, rank
    from clear.training.loop.trainer import StageRun, optimise

    start = incoming(model_folder("sft", config), config, whole=not one_machine())
    model = start.model
    data = trace_data(start.tokenizer, start.vae, config)
    work = StageRun("bridge", config, ["data/models/sft", "data/traces", "data/degraded/sft"], checkpoint_dir("bridge"))
    mlp = config.bridge.kind == "mlp"
    if mlp:
        torch.manual_seed(config.seed)
        fresh = LatentBridge(model.config.latent_channels, model.config.llm.hidden)
        model.bridge = fresh.to(model.vae2llm.weight.device)
    model.config = replace(model.config, bridge=config.bridge.kind)

    degraded = [n for n in data.paired if data.rows[n].severity != CLEAN]
    chosen = degraded[:: max(1, len(degraded) // OWN_LATENTS)]
    s = config.sampling
    options = Options(flow_steps=s.flow_steps, shift=s.shift, batch=s.batch, guidance=guidance(s))

    def make() -> dict[str, torch.Tensor]:
        with at_work(model, config), lora.autocast(model):
            return {str(n): z for n, z in bridge.own_latents(model, data, chosen, options, config.seed).items()}

    found = made_once(work.folder / "own_latents.safetensors", make)
    own = {n: found[str(n)] for n in chosen}
    if mlp:
        trainable(model, only=("bridge.",))
        pairs = [(i, None) for i in range(len(data.clean))] + [(data.image[n], z) for n, z in own.items()]
        loss = bridge.imitation_loss(model, data, pairs)
        optimise(work, "distill", model, loss, len(pairs), config.bridge.distill)
    # With the direct bridge the generation expert reads the latent and is what the distillation trains.
    trainable(model, never=(*FROZEN, *GENERATION) if mlp else FROZEN)
    loss = sft.trace_loss(model, data, sft.trace_weights(config, bridge=True), own)
    optimise(work, "answer", model, loss, len(data), config.bridge.answer)
    save(Path("data/models/bridge"), start, config)
    last = {row["phase"]: row for row in work.curve}
    figures = {f"{p}_{k}": v for p, row in last.items() for k, v in row.items() if k not in ("phase", "step")}
    if rank() == 0:
        kind = config.bridge.kind
        write_json("data/metrics/bridge.json", {"kind": kind, "own_latents": len(own), "training": figures})
    work.finish("data/plots/bridge.csv")
