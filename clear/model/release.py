"""A model folder for other programs: with the files and keys that BAGEL's own tools and vLLM-Omni read.

BAGEL's tools read `ema.safetensors`, `ae.safetensors`, `llm_config.json`, `vit_config.json` and Qwen2's `vocab.json` +
`merges.txt`; what else a model is they have in their code, so they read only models of BAGEL-7B's kind (`foreign`).
vLLM-Omni also reads `config.json` with the two configurations inside, `preprocessor_config.json` and the tokenizer by
its settings, and every safetensors file in the folder. An index names the two files of BAGEL, so that it leaves out
`bridge.safetensors`, which is this project's own. Small files that the weights came with are kept; where there are
none they are written. The tensors are compared with manifest.json, which was made from the reference and not from this
project's modules (METHOD §1 "Keys").
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from clear.data.io import require_new
from clear.errors import ClearError
from clear.model.bagel import BagelConfig
from clear.model.checkpoint import INDEX, MODEL, VAE, named_file, read_config, read_header, save_bagel
from clear.model.checkpoint.config import config_files, read_json
from clear.model.checkpoint.format import refuse
from clear.model.lora import base_of, is_adapter, load_model, merge_adapter, quantisation_of
from clear.model.runtime import without_weights
from clear.model.tokenizer import MARKERS, MERGES, SETTINGS, TOKENIZER, VOCABULARY
from clear.model.vae import VaeConfig

MANIFEST = Path(__file__).with_name("manifest.json")

LLM = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
VIT = {"attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_channels": 3}
WHOLE = {
    "model_type": "bagel",
    "architectures": ["BagelForConditionalGeneration"],
    "visual_gen": True,
    "visual_und": True,
    "connector_act": "gelu_pytorch_tanh",
    "interpolate_pos": False,
    "timestep_shift": 1.0,
}
"""What the reference has in its code or leaves to its libraries' defaults; readers take it from the files."""

READ = {
    "config.json": (
        *(*WHOLE, "llm_config", "vit_config", "vae_config"),
        *("latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side"),
    ),
    "llm_config.json": (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("intermediate_size", "rms_norm_eps", "rope_theta", "max_position_embeddings", "hidden_act"),
    ),
    "vit_config.json": (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "image_size"),
        "num_channels",
    ),
    "generation_config.json": ("bos_token_id", "eos_token_id"),
    "preprocessor_config.json": ("image_processor_type", "image_mean", "image_std", "size"),
    INDEX: ("weight_map",),
}
"""Files and the keys in them that BAGEL's tools, vLLM and vLLM-Omni read."""

_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def write(
    folder: Path | str, out: Path | str, dtype: torch.dtype | None = None, base: Path | str | None = None
) -> None:
    """Write the folder `out` of a model folder, or of an adapter folder with its weights added (`base` as load_model).

    `dtype` None keeps the stored type; an adapter is added in float32. Raises ClearError as load_model, if `out` exists
    and is not empty, and if what was written is not what `check` asks for.
    """
    folder, out = Path(folder), Path(out)
    require_new(out)
    adapter = is_adapter(folder)
    kind = quantisation_of(folder) if adapter else ""
    model, vae, tokenizer = load_model(folder, None, base=base, kind=kind)
    dtype = dtype or model.vae2llm.weight.dtype
    model = merge_adapter(model, dtype) if adapter else model.to(dtype)
    save_bagel(out, model, vae, tokenizer)
    origin, _ = named_file(base_of(folder, base) if adapter else Path(base or folder))
    for name, content in reader_files(model.config, origin, dtype, tokenizer).items():
        (out / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    check(out)


def reader_files(config: BagelConfig, origin: Path, dtype: torch.dtype, tokenizer: Any = None) -> dict[str, dict]:
    """JSON files by name: those of `origin`, completed, with what this model is in place of what they say of it."""
    own = config_files(config)
    kind = {"torch_dtype": _TYPES.get(dtype, str(dtype).removeprefix("torch."))}
    llm = LLM | read_json(origin, "llm_config.json", required=False) | own["llm_config.json"] | kind
    vit = VIT | read_json(origin, "vit_config.json", required=False) | own["vit_config.json"]
    nested = {"llm_config": llm, "vit_config": vit}
    vae = own["vae_config.json"] | {"downsample": config.vae.downsample, "in_channels": 3, "out_ch": 3}
    side = vit["image_size"]
    files = {
        "llm_config.json": llm,
        "vit_config.json": vit,
        "config.json": WHOLE
        | read_json(origin, "config.json", required=False)
        | own["config.json"]
        | nested
        | {"vae_config": vae}
        | kind,
        "generation_config.json": {"bos_token_id": config.special.bos, "eos_token_id": config.special.eos}
        | read_json(origin, "generation_config.json", required=False),
        "preprocessor_config.json": {
            "image_processor_type": "SiglipImageProcessor",
            "do_resize": True,
            "size": {"height": side, "width": side},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        | read_json(origin, "preprocessor_config.json", required=False),
        INDEX: _index(config),
    }
    if tokenizer is not None and SETTINGS not in getattr(tokenizer, "sources", {}):
        files[SETTINGS] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": llm["max_position_embeddings"],
            "bos_token": MARKERS[0],
            "eos_token": MARKERS[1],
        }
    return files


def _index(config: BagelConfig) -> dict:
    """The tensors of the two files; programs that load every safetensors file of a folder load what an index names."""
    from clear.model.vae import AutoEncoder

    with without_weights():
        vae = AutoEncoder(config.vae).state_dict()
    return {"metadata": {}, "weight_map": dict.fromkeys(expected(config), MODEL) | dict.fromkeys(vae, VAE)}


def expected(config: BagelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of `ema.safetensors` by the manifest."""
    llm, vit = config.llm, config.vit
    sizes = {"vocab": llm.vocab, "hidden": llm.hidden, "head": llm.head_dim, "kv": llm.kv_heads, "mlp": llm.mlp}
    sizes |= {"vit": vit.hidden, "vit_mlp": vit.mlp, "patch": vit.patch, "vit_side": vit.side}
    sizes |= {"cell": config.latent_patch, "z": config.vae.z_channels, "latent_side": config.max_latent_size}
    layers = {"{i}": llm.layers, "{v}": vit.layers}
    found = {}
    for pattern, dimensions in _manifest()[MODEL].items():
        shape = tuple(math.prod(sizes.get(name) or int(name) for name in text.split("*")) for text in dimensions)
        sign = next((sign for sign in layers if sign in pattern), None)
        names = [pattern] if sign is None else [pattern.replace(sign, str(n)) for n in range(layers[sign])]
        found |= dict.fromkeys(names, shape)
    return found


def _manifest() -> dict:
    return json.loads(MANIFEST.read_text(encoding="utf-8"))


def check(folder: Path | str) -> None:
    """Raise ClearError unless a folder has the files, JSON keys and tensors that READ and the manifest name."""
    folder = Path(folder)
    for name, keys in READ.items():
        content = read_json(folder, name, required=False)
        refuse(folder / name, [f"key {key} is missing" for key in keys if key not in content], ["Write it again."])
    config = read_config(folder)
    wanted, entries = expected(config), read_header(folder / MODEL)
    problems = [f"key {key} is missing" for key in sorted(wanted.keys() - entries.keys())]
    problems += [f"key {key} is not one of BAGEL's" for key in sorted(entries.keys() - wanted.keys())]
    problems += [
        f"key {key} has shape {entries[key].shape}, BAGEL's is {shape}"
        for key, shape in wanted.items()
        if key in entries and entries[key].shape != shape
    ]
    refuse(folder / MODEL, problems, ["Write it again."])
    known = set(_manifest()[VAE])
    odd = [key for key in sorted(read_header(folder / VAE)) if _general(key) not in known]
    refuse(folder / VAE, [f"key {key} is not one of BAGEL's" for key in odd], ["Write it again."])
    mapped = read_json(folder, INDEX, required=False)["weight_map"]
    here = {**dict.fromkeys(entries, MODEL), **dict.fromkeys(read_header(folder / VAE), VAE)}
    if mapped != here:
        raise ClearError(f"{folder / INDEX} does not name the tensors of {MODEL} and {VAE}; write it again.")


def _general(key: str) -> str:
    key = re.sub(r"\b(down|up)\.\d+", r"\1.{level}", key)
    return re.sub(r"\bblock\.\d+", "block.{j}", key)


def foreign(folder: Path | str) -> list[str]:
    """Why BAGEL's own tools and vLLM-Omni cannot run a folder of `write`, each in some words; empty if they can."""
    folder = Path(folder)
    config = read_config(folder)
    reasons = []
    if (config.latent_patch, config.max_latent_size, config.vit.side) != (2, 64, 70):
        reasons.append("their code has latents of 2 × 2 on 64 × 64 and 70 × 70 patches built in")
    if config.vae != VaeConfig():
        reasons.append("their autoencoder is FLUX's, this one has other shapes")
    if not ((folder / VOCABULARY).is_file() and (folder / MERGES).is_file()):
        reasons.append(f"the tokenizer is {TOKENIZER} alone, and not Qwen2's {VOCABULARY} and {MERGES}")
    return reasons
