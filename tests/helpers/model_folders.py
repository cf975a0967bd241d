"""Model folders of the tiny model, whole, edited and in shards."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from clear.model.bagel import Bagel
from clear.model.checkpoint import INDEX, MODEL, save_bagel
from clear.model.vae import AutoEncoder
from tests.conftest import ROOT
from tests.tiny import tiny_model

GOLDEN = ROOT / "tests/golden"
KEY = "language_model.model.layers.1.self_attn.q_proj_moe_gen.weight"


def save_tiny(folder, bridge: str):
    model, tokenizer = tiny_model(bridge)
    torch.manual_seed(1)
    vae = AutoEncoder(model.config.vae)
    save_bagel(folder, model, vae, tokenizer)
    return model, vae, tokenizer


def save_large(folder: Path) -> None:
    """A model folder of some 400 MB in bfloat16, wide enough for its weights to be most of a process."""
    shapes = tiny_model("direct")[0].config
    shapes = replace(shapes, llm=replace(shapes.llm, vocab=8192, hidden=1024, layers=6, heads=8, kv_heads=2, mlp=4096))
    with torch.device("meta"):
        model, vae = Bagel(shapes), AutoEncoder(shapes.vae)
    for module in (model, vae):
        state = {key: torch.rand(value.shape, dtype=torch.bfloat16) for key, value in module.state_dict().items()}
        module.load_state_dict(state, assign=True)
    save_bagel(folder, model, vae)


def edit(file, change) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file)


def shard(folder: Path, count: int = 3) -> dict[str, str]:
    """Split the model file into shards with an index; returns the index's weight map."""
    state = load_file(folder / MODEL)
    (folder / MODEL).unlink()
    names = sorted(state)
    places = {key: f"model-{i * count // len(names) + 1:05d}-of-{count:05d}.safetensors" for i, key in enumerate(names)}
    for name in set(places.values()):
        save_file({key: state[key].clone() for key, place in places.items() if place == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places
