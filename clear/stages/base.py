"""Stage `base`: the starting model, trained from scratch on clean samples (or a manifest of given weights)."""

from pathlib import Path

import torch

from clear.data.io import write_json, write_text
from clear.data.records import read_samples
from clear.data.workspace import completing
from clear.errors import ClearError
from clear.model.runtime import apply_runtime, stored
from clear.schema import Config

OUT, METRICS, CURVE = Path("data/models/base"), Path("data/metrics/base.json"), Path("data/plots/base.csv")


def run(config: Config) -> None:
    """Train, or for a profile with `model.checkpoint` write the manifest of that folder's files."""
    apply_runtime(config)
    if config.model.checkpoint:
        _manifest(Path(config.model.checkpoint), completing(config), stored(config)[1])
        return
    if config.source.kind != "scenes":
        raise ClearError(
            f"params: source.kind = {config.source.kind} needs a pretrained model (model.checkpoint = its folder); "
            "training from scratch knows the words and labels of scenes only."
        )
    from clear.data.workspace import checkpoint_dir
    from clear.model.bagel import Bagel
    from clear.model.checkpoint import save_bagel
    from clear.model.images import ImageBank
    from clear.model.tokenizer import word_tokenizer
    from clear.model.vae import AutoEncoder
    from clear.sources.scenes.render import FACTORS, factors
    from clear.training import pretrain
    from clear.training.build import bagel_config, scene_words
    from clear.training.loop.run import StageRun
    from clear.training.loop.trainer import optimise

    samples = list(read_samples("data/samples/pretrain"))
    pairs = list(read_samples("data/degraded/sft", ["id", "degraded", "corruption", "severity"]))
    degraded, unlabelled = [s.seen for s in pairs], [s.key for s in pairs]
    work = StageRun("base", config, ["data/samples/pretrain", "data/degraded/sft"], checkpoint_dir("base"))
    names = [s.id for s in samples]
    bank = ImageBank([s.image for s in samples], config.model, names)
    tokenizer = word_tokenizer(scene_words())
    shapes = bagel_config(config, tokenizer)
    torch.manual_seed(config.seed)
    model, vae = Bagel(shapes), AutoEncoder(shapes.vae)
    model.initialise()

    probe = pretrain.DenseProbe(model.vit_model, FACTORS)
    labels = torch.tensor([factors(s.annotation) for s in samples]).unflatten(1, (3, 3))
    optimise(work, "vit", probe, pretrain.dense_label_loss(probe, bank, labels), len(bank), config.base.vit)

    share = config.base.vae_degraded
    extra = degraded[: int(len(samples) * share / max(1e-6, 1 - share))]
    mixed = ImageBank([s.image for s in samples] + extra, config.model, names + unlabelled[: len(extra)])
    optimise(work, "vae", vae, pretrain.reconstruction_loss(vae, mixed), len(mixed), config.base.vae)
    vae = pretrain.normalise_latents(vae, bank).eval().requires_grad_(False)
    model.config = bagel_config(config, tokenizer, vae.config)
    bank.encode(vae)

    data = pretrain.JointData(tokenizer, samples)
    model.vit_model.requires_grad_(False)
    loss = pretrain.joint_loss(model, bank, data, config.base)
    optimise(work, "joint", model, loss, len(bank), config.base.joint)
    save_bagel(OUT, model, vae, tokenizer)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in (("model", model), ("vae", vae))}
    last = {row["phase"]: row for row in work.curve}
    figures = {f"{phase}_{k}": v for phase, row in last.items() for k, v in row.items() if k not in ("phase", "step")}
    write_json(METRICS, {"parameters": count, "training": figures})
    work.finish(CURVE)


def _manifest(folder: Path, base: Path | None, kind: str) -> None:
    """List the files of a checkpoint folder with their hashes, with those from `base` that complete weights alone; the
    weights stay where they are. `kind` is the type of its layers, if params ask for quantised ones.

    Raises ClearError for whatever keeps the stages behind from loading it, before they are run.
    """
    from clear.model.checkpoint import fingerprint, load_bagel

    load_bagel(folder, None, "meta", base, kind)
    files = fingerprint(folder, base)
    OUT.mkdir(parents=True, exist_ok=True)
    write_json(OUT / "manifest.json", {"files": files})
    write_json(METRICS, {"files": len(files)})
    write_text(CURVE, "phase,step\n")
