"""LoRA adapters on both experts of a model folder, and folders that hold adapters instead of weights.

Adapters are peft's, injected into the decoder's linear layers in place, so a Bagel stays a Bagel. One adapter is
carried through the stages: sft starts it, bridge and grpo load it and train it further. An adapter folder holds

    adapter_model.safetensors, adapter_config.json   the adapter, in peft's own layout (PeftModel reads it)
    bridge.safetensors                               the mlp bridge, if there is one
    base.json                                        folder, sizes and hashes of the files it adapts; kind of bridge;
                                                     the type of its quantised layers, if it was trained on such

and loading it loads that base first. The vision tower and the autoencoder are never adapted. The reference of GRPO
is a second, frozen adapter with the incoming weights: no copy of the base weights is made.

Departure: METHOD §3 trains all weights; this is the single-GPU path that users of BAGEL ask for.
"""

import copy
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from clear.data.io import require_new
from clear.data.records import file_sha256
from clear.errors import ClearError
from clear.model import quantised
from clear.model.bagel import Bagel
from clear.model.bridge import LatentBridge
from clear.model.checkpoint import (
    BRIDGE,
    HASHED_ON_LOAD,
    check_entries,
    check_whole,
    json_object,
    load_bagel,
    load_weights,
    model_file,
    named_file,
    places,
    read_header,
    samples_sha256,
    save_bagel,
    save_tensors,
    write_folder,
)
from clear.model.runtime import without_weights
from clear.schema import Lora

ADAPTER, ADAPTER_CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"
TRAINED, REFERENCE = "default", "reference"
"""peft's names of the adapter that is trained and of its frozen copy."""
AGAIN = "run the stage that makes it again"
PREFIX = "base_model.model."
"""What PeftModel puts before a parameter's name; kept in the files so that peft itself can read them."""


def is_adapter(folder: Path | str) -> bool:
    """Whether a model folder holds an adapter and not weights of its own."""
    return (Path(folder) / ADAPTER_CONFIG).exists()


def has_adapter(model: nn.Module) -> bool:
    """Whether adapters have been put into the model."""
    return bool(getattr(model, "peft_config", None))


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The adapted linear layers, peft's LoraLayers, by name."""
    if not has_adapter(model):
        return []
    from peft.tuners.lora import LoraLayer  # peft takes seconds to import; a model without adapters needs none of it

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def target_pattern(targets: Sequence[str], experts: str) -> str:
    """Regular expression, as peft matches it, of the full names of the decoder's linear layers to adapt."""
    names = "|".join(re.escape(name) for name in targets)
    und, gen = rf"(self_attn|mlp)\.({names})", rf"(self_attn\.({names})_moe_gen|mlp_moe_gen\.({names}))"
    chosen = {"und": und, "gen": gen, "both": f"({und}|{gen})"}[experts]
    return rf"language_model\.model\.layers\.\d+\.{chosen}"


def _check_targets(model: Bagel, targets: Sequence[str]) -> None:
    layer = model.language_model.model.layers[0]
    linear = {name.rpartition(".")[2] for name, part in layer.named_modules() if isinstance(part, nn.Linear)}
    known = {name for name in linear if not name.endswith("_moe_gen")}
    for target in targets:
        if target not in known:
            what = f"params: lora.targets: {target!r} is not a linear layer of the decoder"
            raise ClearError(f"{what}; choose {', '.join(sorted(known))}.")


def attach(model: Bagel, lora: Lora) -> Bagel:
    """Put a fresh adapter (A random, B zero: the model's outputs do not change) into `model`, in place.

    The adapter is float32 whatever the type of the weights; everything else is frozen. Draws from torch's global
    generator. Raises ClearError if a target is not a linear layer of the decoder.
    """
    from peft import LoraConfig

    _check_targets(model, lora.targets)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target_pattern(lora.targets, lora.experts),
        bias="none",
    )
    return _inject(model, settings, TRAINED)


def _inject(model: Bagel, settings: Any, name: str) -> Bagel:
    """Put an adapter described by a peft.LoraConfig into the model, float32."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(settings, model, adapter_name=name)
    for key, value in model.named_parameters():
        if _is_adapter_key(key, name):
            value.data = value.data.float()
    return model


def _is_adapter_key(key: str, name: str) -> bool:
    return ".lora_" in key and f".{name}." in key


def _adapter_state(model: nn.Module, name: str = TRAINED) -> dict[str, Tensor]:
    """The parameters of one adapter by module name and matrix, without the adapter's name."""
    return {k.replace(f".{name}.", "."): v for k, v in model.named_parameters() if _is_adapter_key(k, name)}


def freeze_base(model: nn.Module) -> None:
    """Of the parameters that are trainable now, keep only those of the adapter and of the bridge."""
    for name, value in model.named_parameters():
        if not (_is_adapter_key(name, TRAINED) or name.startswith("bridge.")):
            value.requires_grad_(False)


def set_dropout(model: nn.Module, share: float) -> None:
    """Set the adapter's dropout; GRPO needs none, because rollout and scoring must agree."""
    for _, layer in _layers(model):
        layer.lora_dropout[TRAINED] = nn.Dropout(share) if share else nn.Identity()


def save_adapter(
    folder: Path | str,
    model: Bagel,
    base: Path | str,
    files: dict[str, dict[str, Any]],
    dtype: torch.dtype,
    rest: Path | str | None = None,
) -> None:
    """Write the adapter and the bridge of `model` in `dtype`, and what they belong to: `files` of the folder `base`.

    `rest` is the folder that completes `base` where that has weights alone (`clear.model.checkpoint.places`).
    The bytes depend on the adapter, the configuration and `base` only. All files are written or none.
    """

    def stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.detach().to(device="cpu", dtype=dtype).contiguous() for k, v in state.items()}

    state = stored({PREFIX + k: v for k, v in _adapter_state(model).items()})
    settings = copy.copy(model.peft_config[TRAINED])
    settings.base_model_name_or_path, settings.inference_mode = str(base), True
    content = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.to_dict().items()}
    known = {"folder": str(base), "bridge": model.config.bridge, "files": files}
    if model.config.quantised:
        known["quantised"] = model.config.quantised
    parts = places(base, rest)
    if not parts.whole:
        known["rest"] = str(parts.shapes)
    texts = {
        name: json.dumps(c, indent=2, sort_keys=True, default=str) + "\n"
        for name, c in ((ADAPTER_CONFIG, content), (BASE, known))
    }
    writers = {ADAPTER: lambda path: save_tensors(state, path, {"format": "pt"})}
    writers |= {name: lambda path, text=text: path.write_text(text) for name, text in texts.items()}
    if getattr(model, "bridge", None) is not None:
        bridge = stored(model.bridge.state_dict())
        writers[BRIDGE] = lambda path: save_tensors(bridge, path)
    write_folder(folder, writers, {BRIDGE} - writers.keys())


def _base(folder: Path | str) -> dict:
    """What an adapter folder says of its base, each field of its type. Raises ClearError."""
    file = Path(folder) / BASE
    known = {"bridge": "direct", "quantised": "", "rest": None} | json_object(file, AGAIN)
    for key, kind in {"folder": str, "files": dict, "bridge": str, "quantised": str, "rest": str | None}.items():
        if not isinstance(known.get(key), kind):
            raise ClearError(f"{file}: {key!r} cannot be {known.get(key)!r:.60}; {AGAIN}.")
    return known


def _is_recorded(path: Path, record: dict[str, Any]) -> bool:
    """Whether a file is the one of a `fingerprint`: by its hash, or for a large one by its size and samples."""
    if not (isinstance(record, dict) and isinstance(record.get("bytes"), int) and "sha256" in record):
        raise ClearError(f"the record of {path} lacks 'bytes' and 'sha256'; run the adapter's stage again.")
    if not path.is_file() or path.stat().st_size != record["bytes"]:
        return False
    if record["bytes"] <= HASHED_ON_LOAD:
        return file_sha256(path) == record["sha256"]
    return record.get("samples_sha256") in (None, samples_sha256(path))  # adapters of before have no samples


def rest_of(folder: Path | str, base: Path | str, rest: Path | str | None) -> Path | str | None:
    """The folder that completes the weights `base` of an adapter folder: `rest`, or the one that the adapter names."""
    known = _base(folder)["rest"]
    return rest if known is None or (rest is not None and Path(rest) != Path(base)) else known


def quantisation_of(folder: Path | str) -> str:
    """The type of the quantised layers that an adapter folder was trained on, "" if they were exact."""
    found = _base(folder)["quantised"]
    if found not in ("", *quantised.KINDS):
        raise ClearError(f"{Path(folder) / BASE}: quantised = {found!r} is unknown here; run its stage again.")
    return found


def base_of(folder: Path | str, base: Path | str | None = None, rest: Path | str | None = None) -> Path:
    """The folder (or weight file) an adapter folder belongs to (`base` overrides where it lies), checked.

    `rest` overrides where the folder lies that completes weights alone.
    Raises ClearError if it is absent or its files are not those the adapter was trained on, as far as that shows
    without reading a large file whole.
    """
    known = _base(folder)
    found, files = Path(base or known["folder"]), known["files"]
    try:
        if not named_file(found)[0].is_dir():
            what = f"{folder} adapts the weights in {found}, which is not here"
            raise ClearError(f"{what}; name their folder in model.checkpoint.")
        parts = places(found, rest_of(folder, found, rest))
        others = [file for name, record in files.items() if not _is_recorded(file := parts.file(name), record)]
    except OSError as error:  # a path that is too long to be one
        raise ClearError(f"{Path(folder) / BASE}: {error}; {AGAIN}.") from error
    if others:
        raise ClearError(f"{others[0]} is not the file that {folder} was trained on; restore it, or train again.")
    weights = model_file(found)
    if weights.name not in files and not is_adapter(found):
        raise ClearError(f"{weights} is not what {folder} was trained on, but {', '.join(files)}; name that file.")
    return found


def load_model(
    folder: Path | str,
    dtype: torch.dtype | None = torch.float32,
    device: str = "cpu",
    base: Path | str | None = None,
    rest: Path | str | None = None,
    kind: str = "",
):
    """Model, autoencoder and tokenizer of a folder with weights or with an adapter; the model is in eval mode.

    The weights get `dtype` (None: they keep the stored type), adapter and bridge of an adapter folder stay float32,
    and the autoencoder is float32 always. `base` says where the weights of an adapter folder lie, if not where it says
    itself; either may be a weight file instead of its folder. `rest` is the model folder that completes weights alone
    (`clear.model.checkpoint.places`). `kind` quantises the decoder's linear layers, as load_bagel does.
    """
    folder = Path(folder)
    if not is_adapter(folder):
        return load_bagel(folder, dtype, device, rest, kind)
    from peft import LoraConfig

    check_whole(folder)
    weights = base_of(folder, base, rest)
    if is_adapter(weights):
        raise ClearError(f"{folder} adapts {weights}, which is an adapter itself; merge that one first (clear merge).")
    model, vae, tokenizer = load_bagel(weights, dtype, device, rest_of(folder, weights, rest), kind)
    bridged = _base(folder)["bridge"]
    model.config = replace(model.config, bridge=bridged)
    if bridged == "mlp":
        with without_weights():
            bridge = LatentBridge(model.config.latent_channels, model.config.llm.hidden)
        load_weights(bridge, folder / BRIDGE, torch.float32, device)
        model.bridge = bridge
    try:
        settings = LoraConfig(**{k: v for k, v in json_object(folder / ADAPTER_CONFIG, AGAIN).items() if k in _FIELDS})
    except (TypeError, ValueError) as error:
        raise ClearError(f"{folder / ADAPTER_CONFIG} is not a LoRA configuration ({error}).") from error
    settings.inference_mode = False
    _inject(model, settings, TRAINED)
    _adopt(model, folder / ADAPTER)
    return model.to(device).eval(), vae, tokenizer


_FIELDS = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias")
"""What a folder's adapter_config.json decides; everything else keeps peft's default."""


def _adopt(model: nn.Module, file: Path) -> None:
    """Copy the adapter weights of a file into the model. Raises ClearError on any key or shape mismatch."""
    if not file.exists():
        raise ClearError(f"{file} is missing; {AGAIN}.")
    expected = {PREFIX + k: v for k, v in _adapter_state(model).items()}
    check_entries(
        file,
        {key: tuple(value.shape) for key, value in expected.items()},
        read_header(file),
        f"{ADAPTER_CONFIG}, {BASE} or the base belong to another adapter; take them all from one run.",
    )
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ClearError(f"{file} is not safetensors ({error}); run its stage again.") from error
    for key, value in expected.items():
        value.data.copy_(state[key])


def add_reference(model: Bagel) -> None:
    """Remember the adapter and the bridge as they are now, frozen, for `reference`. Costs one adapter of memory."""
    wanted = {name: value.requires_grad for name, value in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is meant
        _inject(model, copy.deepcopy(model.peft_config[TRAINED]), REFERENCE)
    device = model.vae2llm.weight.device
    trained = _adapter_state(model)
    for key, value in _adapter_state(model, REFERENCE).items():
        value.data = trained[key].detach().to(device).clone()
    for name, value in model.named_parameters():
        value.requires_grad_(wanted.get(name, False))
    _activate(model, TRAINED)  # peft has switched to the adapter it has just injected
    if getattr(model, "bridge", None) is not None:
        # Not a child module: it is neither trained nor saved.
        model.__dict__["reference_bridge"] = copy.deepcopy(model.bridge).requires_grad_(False)


def _activate(model: nn.Module, name: str) -> None:
    """Compute with this adapter. peft's own set_adapter would also change which one requires gradients."""
    for _, layer in _layers(model):
        layer._active_adapter = [name]


@contextmanager
def reference(model: Bagel) -> Iterator[Bagel]:
    """The model as it was at `add_reference`, in eval mode, for as long as the block lasts."""
    was_training, bridge = model.training, getattr(model, "bridge", None)
    _activate(model, REFERENCE)
    model.eval()
    if bridge is not None:
        model.bridge = model.reference_bridge.to(model.vae2llm.weight.device)
    try:
        yield model
    finally:
        _activate(model, TRAINED)
        if bridge is not None:
            model.bridge = bridge
        model.train(was_training)


@torch.no_grad()
def merge_adapter(model: Bagel, dtype: torch.dtype) -> Bagel:
    """Add the adapter to the weights and take it out, in place; the model is an ordinary Bagel of `dtype` again.

    Sums are made in float32 whatever the type of the weights, one layer at a time; of quantised layers with the weights
    that they compute with, so the merged model is the one that was trained, but for one rounding to `dtype`. Raises
    ClearError if a sum is not finite.
    """
    for name, layer in _layers(model):
        layer.base_layer = quantised.plain(layer.get_base_layer(), torch.float32)
        weight = layer.base_layer.weight
        try:
            layer.merge(safe_merge=True, adapter_names=[TRAINED])
        except ValueError as error:
            raise ClearError(f"layer {name}: {error}") from error
        weight.data = weight.data.to(dtype)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    quantised.dequantise(model, dtype)  # what no adapter was put beside
    model.config = replace(model.config, quantised="")
    return model.to(dtype)


def merge(folder: Path | str, out: Path | str, dtype: torch.dtype, base: Path | str | None = None) -> str:
    """Write the full model folder `out` of an adapter folder: summed in float32, stored in `dtype`.

    An adapter that was trained on quantised layers is added to the weights these stand for; returns their type, or "".
    Raises ClearError if `folder` holds no adapter or `out` exists and is not empty.
    """
    folder, out = Path(folder), Path(out)
    if not is_adapter(folder):
        raise ClearError(f"{folder} holds no adapter ({ADAPTER_CONFIG} is missing); there is nothing to merge.")
    require_new(out)
    kind = quantisation_of(folder)
    model, vae, tokenizer = load_model(folder, None, base=base, kind=kind)
    save_bagel(out, merge_adapter(model, dtype), vae, tokenizer)
    return kind
