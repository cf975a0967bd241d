"""Loading what the training stages share, and writing what they leave: model folders, degraded pairs, traces.

Which model a stage starts from is decided here and nowhere else: the folder of the stage before it, which for `base`
is `model.checkpoint` where params name one (clear/data/workspace.py); as weights or as an adapter on weights.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clear.data.records import Sample, drawn, read_samples
from clear.data.workspace import completing, latents_dir
from clear.errors import ClearError
from clear.model import lora
from clear.model.bagel import FROZEN, Bagel
from clear.model.checkpoint import fingerprint, recorded, save_bagel
from clear.model.images import ImageBank, check_geometry
from clear.model.latents import LatentStore
from clear.model.offload import wait_in_host_memory
from clear.model.runtime import device, stored
from clear.model.vae import AutoEncoder
from clear.reasoning.prompts import SYSTEM
from clear.schema import Config
from clear.traces.table import read_traces
from clear.training.loop import sharded
from clear.training.loop.parallel import rank, world
from clear.training.sft import TraceData, set_trainable

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MANIFEST = Path("data/models/base/manifest.json")
"""Written by the base stage for a given checkpoint: its files with sizes and hashes."""


@dataclass
class Incoming:
    """The model a training stage starts from, and for an adapter the folder and files with the weights under it; `rest`
    completes them where they are weights alone."""

    model: Bagel
    vae: AutoEncoder
    tokenizer: Any
    weights: Path
    files: dict[str, dict[str, Any]]
    rest: Path | None = None

    @cached_property
    def store(self) -> LatentStore:
        """The latents of this autoencoder that stages share."""
        return LatentStore(latents_dir(), self.vae)


def incoming(folder: Path, config: Config, whole: bool = True) -> Incoming:
    """Load the model folder a stage starts from, ready to be trained as `config.lora` says.

    With `lora.rank` > 0 a folder with weights gets a fresh adapter and one with an adapter continues it. Sharded
    training (FSDP) starts from weights in host memory, unless they must be `whole` only of the first process, which
    gives the others their shards (fsdp_cpu_ram_efficient_loading); these have none before. Raises ClearError if folder
    and `config.lora` or the image sizes of `config.model` disagree.
    """
    place = device(config)
    base, rest = config.model.checkpoint or None, completing(config)
    adapted = lora.is_adapter(folder)
    if adapted and not config.lora.rank:
        raise ClearError(
            f"{folder} holds an adapter and lora.rank = 0 trains all weights; set lora.rank, or `clear merge` it first."
        )
    (dtype, kind), start = stored(config), place
    if kind:
        _check_quantised(folder, config, adapted)
    elif adapted and (trained := lora.quantisation_of(folder)):
        raise ClearError(
            f"{folder} was trained on {trained} weights, params say runtime.weights = {config.runtime.weights}; set it "
            "back, or run sft again."
        )
    if config.runtime.offload:
        _check_offload(config)
        start = "cpu"
    if sharded.enabled():
        start = "meta" if rank() and not whole and sharded.from_first() else "cpu"
    model, vae, tokenizer = lora.load_model(folder, dtype, start, base, rest, kind)
    if tokenizer is None:
        raise ClearError(f"{folder}: tokenizer.json is missing; copy it from the checkpoint the model came from.")
    check_geometry(config.model, model.config, folder)
    weights, files = Path(folder), {}
    if adapted:
        _check_same(model, config, folder)
        lora.set_dropout(model, config.lora.dropout)
        weights = lora.base_of(folder, base, rest)
        rest = lora.rest_of(folder, weights, rest)
        files = recorded(Path(folder) / lora.BASE, lora.AGAIN)
    elif config.lora.rank:
        torch.manual_seed(config.seed)
        lora.attach(model, config.lora)
        given = base is not None and Path(base) == Path(folder) and MANIFEST.exists()
        files = recorded(MANIFEST, "run the base stage again") if given else fingerprint(folder, rest)
    if start == "meta":
        model.to_empty(device="cpu")  # never touched, so no memory; accelerate tells parameters apart by their address
    if config.runtime.offload:
        wait_in_host_memory(model, place)
    model.language_model.gradient_checkpointing = config.runtime.gradient_checkpointing
    model.language_model.attention = config.runtime.attention
    return Incoming(model, vae.to(place), tokenizer, weights, files, rest)


def _check_offload(config: Config) -> None:
    """Raise ClearError where the decoder's layers cannot wait in host memory while this trains."""
    said = "params: runtime.offload keeps the decoder's layers in host memory"
    if not config.lora.rank:
        raise ClearError(f"{said}, and lora.rank = 0 trains them; set lora.rank, or offload to false.")
    if not config.runtime.gradient_checkpointing:
        raise ClearError(
            f"{said}, and without runtime.gradient_checkpointing the device would keep them all for the backward pass; "
            "set it to true, or offload to false."
        )
    if world() > 1:
        raise ClearError(f"{said}, on one device; train on one, or set offload to false.")


def _check_quantised(folder: Path, config: Config, adapted: bool) -> None:
    """Raise ClearError where training cannot go on from `folder` on quantised weights."""
    kind = config.runtime.weights
    if not config.lora.rank:
        raise ClearError(
            f"params: runtime.weights = {kind} freezes the decoder, and lora.rank = 0 trains it; set lora.rank, or "
            "runtime.weights to float32."
        )
    if sharded.enabled():
        raise ClearError(
            f"params: runtime.weights = {kind} is not sharded; train on one device, or set it to bfloat16."
        )
    if adapted and (trained := lora.quantisation_of(folder)) != kind:
        raise ClearError(
            f"{folder} was trained on {trained or 'exact'} weights, params say runtime.weights = {kind}; set it back, "
            "or run sft again."
        )


def _check_same(model: Bagel, config: Config, folder: Path | str) -> None:
    """Raise ClearError if the adapter that came from `folder` is not the one `config.lora` describes."""
    held, wanted = model.peft_config[lora.TRAINED], config.lora
    pairs = {
        "rank": (held.r, wanted.rank),
        "alpha": (held.lora_alpha, wanted.alpha),
        "targets / lora.experts": (held.target_modules, lora.target_pattern(wanted.targets, wanted.experts)),
    }
    for name, (found, said) in pairs.items():
        if found != said:
            raise ClearError(
                f"{folder}: the adapter was trained with {found}, params say lora.{name} = {said}; "
                "run sft again with these params, or set them back."
            )


@contextmanager
def at_work(model: nn.Module, config: Config) -> Iterator[None]:
    """Inside, the model is where this process computes: sharded training keeps its weights in host memory before."""
    kept = next(model.parameters()).device
    model.to(device(config))
    try:
        yield
    finally:
        model.to(kept)
        if kept.type == "cpu" and torch.cuda.is_available():
            torch.cuda.empty_cache()  # what exchanges the shards takes its memory beside torch


def trainable(model: nn.Module, only: tuple[str, ...] = (), never: tuple[str, ...] = FROZEN) -> None:
    """`sft.set_trainable`; in a model with adapters only these and the bridge, under the same name rule."""
    set_trainable(model, only, never)
    if lora.has_adapter(model):
        lora.freeze_base(model)


def save(folder: Path | str, start: Incoming, config: Config) -> None:
    """Write the finished model of a stage: its adapter if it has one, else all weights. Only the first process does."""
    if rank():
        return
    if lora.has_adapter(start.model):
        lora.save_adapter(folder, start.model, start.weights, start.files, stored(config)[0], start.rest)
    else:
        save_bagel(folder, start.model, start.vae, start.tokenizer)


def trace_data(start: Incoming, config: Config) -> TraceData:
    """The traces of data/traces with the degraded and clean images of data/degraded/sft, each encoded by one stage.

    Raises ClearError where no trace is left whose answer may be learned, and for one with more positions than the
    model has.
    """
    samples, vae, store = list(read_samples("data/degraded/sft")), start.vae, start.store
    shown = ImageBank([s.seen for s in samples], config.model, [s.key for s in samples]).encode(vae, store=store)
    clean = ImageBank([s.image for s in samples], config.model, [s.id for s in samples]).encode(vae, store=store)
    system = SYSTEM if config.sampling.system_prompt else ""
    traces = list(read_traces("data/traces"))
    data = TraceData(start.tokenizer, traces, samples, shown, clean, system, labelled(samples, config))
    if not data.learned:
        raise ClearError(f"params: sft.labelled = {config.sft.labelled} leaves no trace with an answer; raise it.")
    most = start.model.config.llm.positions
    for row, taken in zip(traces, map(data.positions, range(len(data))), strict=True):
        if most and taken > most:
            raise ClearError(
                f"data/traces: question {row.question} of {row.sample} takes {taken} positions with its replies, this "
                f"model has {most} (max_position_embeddings in llm_config.json); shorten or remove it."
            )
    return data


def labelled(samples: Sequence[Sample], config: Config) -> set[int]:
    """Numbers of the samples whose answers training may know: all, or the share `sft.labelled` that their ids draw."""
    count = round(config.sft.labelled * len(samples))
    return drawn([sample.id for sample in samples], max(1, count))
