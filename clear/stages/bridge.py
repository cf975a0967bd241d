"""Stage `bridge`: teach the model to read its own denoised latents without decoding them."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from clear.bench.scoring import is_correct
from clear.data.io import write_json
from clear.data.records import CLEAN, drawn, read_samples
from clear.errors import ClearError
from clear.model.runtime import apply_runtime, autocast
from clear.schema import Config

if TYPE_CHECKING:
    from clear.reasoning.prompts import Prompts
    from clear.training.bridge import Decision
    from clear.training.load import Incoming
    from clear.training.loop.run import StageRun

INPUTS = ("data/models/sft", "data/traces", "data/degraded/sft", "data/degraded/rl")
OWN_LATENTS = 4096
"""About how many of the model's own denoised latents are made for the distillation and the answers."""


def run(config: Config) -> None:
    """Add the configured bridge to the SFT model, distil it, and train the answers through it and when to use it."""
    apply_runtime(config)
    import torch

    from clear.data.workspace import checkpoint_dir, model_folder
    from clear.model import lora
    from clear.model.bagel import GENERATION, frozen
    from clear.model.bridge import LatentBridge
    from clear.reasoning.answering import guidance
    from clear.reasoning.engine import Options
    from clear.training import bridge, sft
    from clear.training.load import at_work, incoming, save, trace_data, trainable
    from clear.training.loop.parallel import made_once, one_machine, rank
    from clear.training.loop.run import StageRun
    from clear.training.loop.trainer import optimise
    from clear.training.panel import panel

    start = incoming(model_folder("sft", config), config, whole=not one_machine())
    model = start.model
    data = trace_data(start, config)
    work = StageRun("bridge", config, INPUTS, checkpoint_dir("bridge"))
    work.panel = panel(start, config)
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
        bar = tqdm(total=len(chosen), desc="own latents", unit="picture", mininterval=2)
        with bar, at_work(model, config), autocast(model):
            made = bridge.own_latents(model, data, chosen, options, config.seed, bar.update)
        return {str(n): z for n, z in made.items()}

    found = made_once(work.folder / "own_latents.safetensors", make)
    own = {n: found[str(n)] for n in chosen}
    if mlp:
        trainable(model, only=("bridge.",))
        pairs = [(i, None) for i in range(len(data.clean))] + [(data.image[n], z) for n, z in own.items()]
        loss = bridge.imitation_loss(model, data, pairs)
        optimise(work, "distill", model, loss, len(pairs), config.bridge.distill)
    # With the direct bridge the generation expert reads the latent and is what the distillation trains.
    trainable(model, never=(*frozen(config.sft.train_vit), *(GENERATION if mlp else ())))
    weights = sft.trace_weights(config, bridge=True)
    optimise(work, "answer", model, sft.trace_loss(model, data, weights, own), len(data.learned), config.bridge.answer)
    measured = {}
    if config.bridge.decide.steps:
        prompts, chosen, measured = _decisions(start, config, work)
        traces = sft.trace_loss(model, data, replace(weights, decide=False), own)
        loss = bridge.decision_loss(model, start.tokenizer, prompts, chosen, traces, config.bridge.decision_share)
        if not lora.has_adapter(model):
            trainable(model, only=bridge.DECIDING)
        optimise(work, "decide", model, loss, len(data.learned), config.bridge.decide)
    save(Path("data/models/bridge"), start, config)
    last = {row["phase"]: row for row in work.curve}
    figures = {f"{p}_{k}": v for p, row in last.items() for k, v in row.items() if k not in ("phase", "step")}
    if rank() == 0:
        kind = config.bridge.kind
        found = {"kind": kind, "own_latents": len(own), "training": figures}
        write_json("data/metrics/bridge.json", found | ({"decisions": measured} if measured else {}))
    work.finish("data/plots/bridge.csv")


def _decisions(
    start: "Incoming", config: Config, work: "StageRun"
) -> "tuple[Prompts, list[Decision], dict[str, float]]":
    """Prompts of the rl split, which the model was not trained on, the labels of their decision, and their figures.

    All questions of the degraded pictures, and those of the share `grpo.clean_share` of clean ones, are answered along
    both paths, greedily and as in evaluation.
    """
    import torch

    from clear.reasoning.answering import Answerer
    from clear.training import bridge
    from clear.training.load import at_work, labelled
    from clear.training.loop import sharded
    from clear.training.loop.parallel import made_once

    sharded.require_fresh(start.model, "phase decide")  # in all processes: the others would wait for the first
    answerer = Answerer(start.model, start.vae, start.tokenizer, config, start.store)
    samples = list(read_samples("data/degraded/rl"))
    known = labelled(samples, config)
    samples = [s for i, s in enumerate(samples) if s.paired and i in known]
    clean = drawn([s.id for s in samples], round(config.grpo.clean_share * len(samples)))
    shown = [(s.key, s.seen, s) for s in samples] + [(s.id, s.image, s) for i, s in enumerate(samples) if i in clean]
    asked = [(i, q) for i, (_, _, s) in enumerate(shown) for q in s.questions]
    bank = answerer.bank([image for _, image, _ in shown], [name for name, _, _ in shown])
    prompts = answerer.prompts(bank, asked)  # one that is too long is refused before hours of answers

    def make() -> dict[str, torch.Tensor]:
        found = {}
        with at_work(start.model, config):
            for path in ("never", "always"):
                with tqdm(total=len(asked), desc=f"{path} restoring", unit="question", mininterval=2) as bar:
                    answers = zip(answerer.answers(bank, asked, path, bar.update), asked, strict=True)
                    said = [(is_correct(a.prediction, q), a.probability) for a, (_, q) in answers]
                found[path] = torch.tensor([right for right, _ in said])
                found[f"{path}_probability"] = torch.tensor([p for _, p in said], dtype=torch.float64)
        return found

    found = made_once(work.folder / "both_paths.safetensors", make)
    direct, restored = found["never"].tolist(), found["always"].tolist()
    scores = [(found[path] * found[f"{path}_probability"]).tolist() for path in ("never", "always")]
    chosen = bridge.decisions(*scores, config.bridge.price)
    if not chosen:
        raise ClearError("bridge: data/degraded/rl holds no question to learn the decision from; raise source.rl.")
    degraded = sum(len(s.questions) for s in samples)
    pairs = list(zip(direct, restored, strict=True))[:degraded]
    figures = {
        "questions": len(asked),
        "differing": sum(a != b for a, b in zip(direct, restored, strict=True)),
        "better_restored": sum(d.restore for d in chosen),
        "direct_accuracy": sum(a for a, _ in pairs) / max(1, degraded),
        "restored_accuracy": sum(b for _, b in pairs) / max(1, degraded),
        "either_accuracy": sum(a or b for a, b in pairs) / max(1, degraded),
    }
    return prompts, chosen, figures
