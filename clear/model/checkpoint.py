"""Model folders in the layout of BAGEL-7B-MoT: safetensors and JSON only (METHOD §1 "Checkpoint folder").

`ema.safetensors` (the model), `ae.safetensors` (the autoencoder), `llm_config.json`, `vit_config.json`, `config.json`
and, where there is one, `tokenizer.json`. This project adds `bridge.safetensors` for the mlp bridge and
`vae_config.json` for autoencoders of another size than FLUX's. Loading builds on the meta device and adopts the
memory-mapped tensors, so the host holds the weights once; every key and shape is checked.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from clear.errors import ClearError
from clear.model.bagel import Bagel, BagelConfig
from clear.model.mot import LlmConfig
from clear.model.sequence import SpecialTokens
from clear.model.vae import AutoEncoder, VaeConfig
from clear.model.vit import VitConfig

MODEL, VAE, BRIDGE, TOKENIZER = "ema.safetensors", "ae.safetensors", "bridge.safetensors", "tokenizer.json"
_SPECIAL = {
    "bos_token_id": "<|im_start|>",
    "eos_token_id": "<|im_end|>",
    "start_of_image": "<|vision_start|>",
    "end_of_image": "<|vision_end|>",
}


def special_tokens(tokenizer) -> SpecialTokens:
    """Look the four markers up in a `tokenizers.Tokenizer`. Raises ClearError for one that is missing."""
    ids = {}
    for name, token in _SPECIAL.items():
        ids[name] = tokenizer.token_to_id(token)
        if ids[name] is None:
            raise ClearError(f"tokenizer.json: marker {token} is missing; use the tokenizer of the checkpoint.")
    return SpecialTokens(*ids.values())


def save_bagel(folder: Path | str, model: Bagel, vae: AutoEncoder, tokenizer=None) -> None:
    """Write a model folder. The bytes depend on weights and configuration only."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    bridge = {k.removeprefix("bridge."): state.pop(k) for k in list(state) if k.startswith("bridge.")}
    save_file(state, folder / MODEL)
    save_file({k: v.detach().cpu().contiguous() for k, v in vae.state_dict().items()}, folder / VAE)
    (folder / BRIDGE).unlink(missing_ok=True)
    if bridge:
        save_file(bridge, folder / BRIDGE)
    if tokenizer is not None:
        (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True))
    for name, content in _config_files(model.config).items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _config_files(config: BagelConfig) -> dict[str, dict]:
    llm, vit, special = config.llm, config.vit, config.special
    markers = dict(zip(_SPECIAL, (special.bos, special.eos, special.image_start, special.image_end), strict=True))
    return {
        "llm_config.json": {
            "model_type": "qwen2",
            "vocab_size": llm.vocab,
            "hidden_size": llm.hidden,
            "num_hidden_layers": llm.layers,
            "num_attention_heads": llm.heads,
            "num_key_value_heads": llm.kv_heads,
            "intermediate_size": llm.mlp,
            "rms_norm_eps": llm.rms_eps,
            "rope_theta": llm.rope_theta,
        },
        # One layer more than is used and stored: the published file counts a last layer that is dropped.
        "vit_config.json": {
            "model_type": "siglip_vision_model",
            "hidden_size": vit.hidden,
            "num_hidden_layers": vit.layers + 1,
            "num_attention_heads": vit.heads,
            "intermediate_size": vit.mlp,
            "patch_size": vit.patch,
            "image_size": vit.patch * vit.side,
        },
        "vae_config.json": asdict(config.vae) | {"ch_mult": list(config.vae.ch_mult)},
        "config.json": {
            "model_type": "bagel",
            "latent_patch_size": config.latent_patch,
            "max_latent_size": config.max_latent_size,
            "vit_max_num_patch_per_side": vit.side,
            "bridge": config.bridge,
            "special_tokens": markers,
        },
    }


def _read_json(folder: Path, name: str, required: bool = True) -> dict:
    path = folder / name
    if not path.exists():
        if required:
            raise ClearError(
                f"{path} is missing; a model folder has the files of BAGEL-7B-MoT (README, 'Your weights')."
            )
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ClearError(f"{path} is not JSON ({error}); fetch it again.") from error


def read_config(folder: Path | str, special: SpecialTokens | None = None) -> BagelConfig:
    """The configuration of a model folder. Markers come from the tokenizer, else from config.json."""
    folder = Path(folder)
    try:
        return _config_of(folder, special)
    except KeyError as error:
        raise ClearError(f"{folder}: key {error} is missing in the config files; fetch them again.") from error


def _config_of(folder: Path, special: SpecialTokens | None) -> BagelConfig:
    llm, vit = _read_json(folder, "llm_config.json"), _read_json(folder, "vit_config.json")
    own, vae = _read_json(folder, "config.json", False), _read_json(folder, "vae_config.json", False)
    vae = own.get("vae_config", {}) | vae
    known = {k: vae[k] for k in VaeConfig.__dataclass_fields__ if k in vae}
    if "ch_mult" in known:
        known["ch_mult"] = tuple(known["ch_mult"])
    if special is None:
        if "special_tokens" not in own:
            raise ClearError(
                f"{folder}: neither tokenizer.json nor special_tokens in config.json say which ids mark images."
            )
        special = SpecialTokens(*(own["special_tokens"][name] for name in _SPECIAL))
    return BagelConfig(
        llm=LlmConfig(
            vocab=llm["vocab_size"],
            hidden=llm["hidden_size"],
            layers=llm["num_hidden_layers"],
            heads=llm["num_attention_heads"],
            kv_heads=llm["num_key_value_heads"],
            mlp=llm["intermediate_size"],
            rms_eps=llm["rms_norm_eps"],
            rope_theta=llm["rope_theta"],
        ),
        vit=VitConfig(
            hidden=vit["hidden_size"],
            layers=vit["num_hidden_layers"] - 1,
            heads=vit["num_attention_heads"],
            mlp=vit["intermediate_size"],
            patch=vit["patch_size"],
            side=own.get("vit_max_num_patch_per_side", vit["image_size"] // vit["patch_size"]),
        ),
        vae=VaeConfig(**known),
        special=special,
        latent_patch=own.get("latent_patch_size", 2),
        max_latent_size=own.get("max_latent_size", 64),
        bridge=own.get("bridge", "direct"),
    )


def load_weights(module: nn.Module, file: Path, dtype: torch.dtype, device: str) -> None:
    """Adopt the tensors of a safetensors file into a (meta) module. Raises ClearError on any key or shape mismatch."""
    if not file.exists():
        raise ClearError(f"{file} is missing; only safetensors are read (no .bin, .pt or .pth).")
    expected = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    try:
        with safe_open(file, "pt") as source:
            found = {k: tuple(source.get_slice(k).get_shape()) for k in source.keys()}  # noqa: SIM118
            _compare(file, expected, found)
            state = {k: source.get_tensor(k).to(device=device, dtype=dtype) for k in found}
    except SafetensorError as error:
        raise ClearError(f"{file} is truncated or not safetensors ({error}); fetch it again.") from error
    module.load_state_dict(state, strict=True, assign=True)


def _compare(file: Path, expected: dict, found: dict) -> None:
    for key in sorted(expected.keys() | found.keys()):
        if key not in found:
            raise ClearError(f"{file}: key {key} {expected[key]} is missing; the configs belong to another model.")
        if key not in expected:
            raise ClearError(
                f"{file}: key {key} {found[key]} is not part of this model; the configs belong to another one."
            )
        if expected[key] != found[key]:
            raise ClearError(f"{file}: key {key} has shape {found[key]}, the configs say {expected[key]}.")


def load_tokenizer(folder: Path | str):
    """The `tokenizers.Tokenizer` of a model folder, or None."""
    path = Path(folder) / TOKENIZER
    if not path.exists():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for a file it cannot parse
        raise ClearError(f"{path} is not a tokenizer ({error}); fetch it again.") from error


def load_bagel(folder: Path | str, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """Model, autoencoder and tokenizer (None where the folder has none) of a folder in BAGEL-7B-MoT's layout."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ClearError(f"{folder} is not a folder with model weights; run the stage that makes it or `dvc pull` it.")
    tokenizer = load_tokenizer(folder)
    config = read_config(folder, special_tokens(tokenizer) if tokenizer is not None else None)
    with torch.device("meta"):
        model, vae = Bagel(config), AutoEncoder(config.vae)
    bridge = getattr(model, "bridge", None)
    if bridge is not None:
        del model.bridge
        load_weights(bridge, folder / BRIDGE, dtype, device)
    load_weights(model, folder / MODEL, dtype, device)
    load_weights(vae, folder / VAE, dtype, device)
    if bridge is not None:
        model.bridge = bridge
    for table in (model.vit_pos_embed, model.latent_pos_embed):
        table.pos_embed.requires_grad_(False)
    return model.eval(), vae.eval().requires_grad_(False), tokenizer
