"""Model folders of the tiny model, whole, edited and in shards."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

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
