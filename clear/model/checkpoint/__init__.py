"""Model folders in the layout of BAGEL-7B-MoT: safetensors and JSON only (METHOD §1 "Checkpoint folder").

The model is `ema.safetensors`, `model.safetensors` or the shards that `model.safetensors.index.json` lists; a folder
with several of them is rejected unless one is named by its path, because the choice would be a guess. A folder with
weights alone, as trainings leave and publish them, is completed from another one (`places`); there of several files
the average counts, with which the published reinforcement learning starts (METHOD §4). The published
folder has an index without the shards it names, so an index counts only if shards exist. Next to the weights are
`ae.safetensors` (the autoencoder), `llm_config.json`, `vit_config.json` and the tokenizer's files. This project adds
`bridge.safetensors` for the mlp bridge, `vae_config.json` for autoencoders of another size than FLUX's and
`config.json`, which states what the published code hard-codes, and of what type quantised weights are
(clear/model/quantised.py; made by `quantise_folder`).

Loading builds on the meta device, checks every key, shape and type against the file's header, and adopts the
memory-mapped tensors: in the stored type nothing is copied; another type or device is read tensor by tensor. Saving
writes every file under a temporary name and renames, so the file that the weights are mapped from may be
overwritten, and a kill leaves either the old folder or one that is rejected as half-written.
"""

from clear.model.checkpoint.config import json_object, load_tokenizer, read_config, recorded, special_tokens
from clear.model.checkpoint.format import (
    BRIDGE,
    HASHED_ON_LOAD,
    INDEX,
    MODEL,
    PLAIN,
    VAE,
    check_entries,
    check_whole,
    fingerprint,
    model_file,
    named_file,
    places,
    read_header,
    samples_sha256,
    save_tensors,
)
from clear.model.checkpoint.load import load_bagel, load_weights
from clear.model.checkpoint.save import quantise_folder, save_bagel, write_folder
from clear.model.tokenizer import TOKENIZER

__all__ = [
    "BRIDGE",
    "HASHED_ON_LOAD",
    "INDEX",
    "MODEL",
    "PLAIN",
    "TOKENIZER",
    "VAE",
    "check_entries",
    "check_whole",
    "fingerprint",
    "json_object",
    "load_bagel",
    "load_tokenizer",
    "load_weights",
    "model_file",
    "named_file",
    "places",
    "quantise_folder",
    "read_config",
    "read_header",
    "recorded",
    "samples_sha256",
    "save_bagel",
    "save_tensors",
    "special_tokens",
    "write_folder",
]
