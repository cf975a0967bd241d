"""Reading a model folder: built on the meta device, checked by the file's header, then given its tensors."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from clear.errors import ClearError
from clear.model import quantised
from clear.model.bagel import Bagel
from clear.model.checkpoint.config import load_tokenizer, read_config, read_json
from clear.model.checkpoint.format import (
    BRIDGE,
    CODED,
    INDEX,
    TYPES,
    VAE,
    Entry,
    check_entries,
    check_whole,
    missing,
    model_file,
    named_file,
    places,
    read_header,
    refuse,
)
from clear.model.runtime import without_weights
from clear.model.vae import AutoEncoder


def load_bagel(
    path: Path | str,
    dtype: torch.dtype | None = torch.float32,
    device: str = "cpu",
    base: Path | str | None = None,
    kind: str = "",
):
    """Model, autoencoder and tokenizer (None where the folder has none) of a folder in BAGEL-7B-MoT's layout.

    `path` is the folder, or one weight file in it where it holds several; a folder of weights alone is completed from
    the model folder `base` (see `places`), at which a whole one does not look. dtype None keeps each tensor's stored
    type. With the stored type on the CPU the weights stay mapped from the file (private: training does not write to
    it); on "meta" only the autoencoder has weights. `kind` quantises the decoder's linear layers, each as it is read
    (clear/model/quantised.py), and is the only one of which quantised weights are read. The autoencoder is float32
    whatever `dtype`: it runs without autocast, and its file is float32. Raises ClearError for whatever does not fit.
    """
    folder, _ = named_file(path)
    if not folder.is_dir():
        raise ClearError(f"{folder} is not a folder with model weights; run the stage that makes it or `dvc pull` it.")
    check_whole(folder)
    parts = places(path, base)
    if not parts.whole:
        check_whole(parts.shapes)
    weights = model_file(path)
    tokenizer = load_tokenizer(parts.tokenizer)
    config = read_config(path, tokenizer, base)
    _check_kind(folder, config.quantised, kind)
    quantised.require(kind, device)
    with without_weights():
        model, vae = Bagel(config), AutoEncoder(config.vae)
    bridge = getattr(model, "bridge", None)
    if bridge is not None:
        del model.bridge
        load_weights(bridge, folder / BRIDGE, dtype, device)
    load_weights(model, weights, dtype, device, kind)
    model.config = replace(config, quantised=kind)
    load_weights(vae, parts.file(VAE), torch.float32, "cpu" if torch.device(device).type == "meta" else device)
    if bridge is not None:
        model.bridge = bridge
    for table in (model.vit_pos_embed, model.latent_pos_embed):
        table.pos_embed.requires_grad_(False)
    return model.eval(), vae.eval().requires_grad_(False), tokenizer


def _check_kind(folder: Path, found: str, wanted: str) -> None:
    if not found or found == wanted:
        return
    if not wanted:
        raise ClearError(
            f"{folder} holds {found} weights, and exact ones are needed here; name the folder that they were made "
            f"from, or set runtime.weights = {found} if this is to run on them."
        )
    raise ClearError(f"{folder} holds {found} weights, runtime.weights says {wanted}; set it to {found}.")


def load_weights(module: nn.Module, file: Path, dtype: torch.dtype | None, device: str, kind: str = "") -> None:
    """Adopt the tensors of a safetensors file (or of an index's shards) into a (meta) module.

    dtype None keeps the stored type. On the CPU tensors of the wanted type stay memory-mapped; on "meta" the file is
    checked and none is read. Where the module's layers are not of the quantised `kind` yet, they become so, each weight
    as it is read: beside the codes there is never more than one weight in memory. Raises ClearError with every problem
    of a file: see `check_entries`.
    """
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    parts = _shards(file, expected) if file.name == INDEX else {file: expected}
    state, kinds = {}, quantised.kinds(module)
    coded = {f"{name}.weight" for name in quantised.layers(module)} if kind and not kinds else set()
    if coded:
        quantised.quantise(module, kind)
        # All room for codes before the first weight: taken one by one, it would pin what the weights leave behind.
        for key, dtype_of_codes in quantised.kinds(module).items():
            state[key] = torch.empty(module.get_buffer(key).shape, dtype=dtype_of_codes, device=device)
    for part, wanted in parts.items():
        entries = read_header(part)
        check_entries(part, wanted, entries, kinds=kinds)
        if torch.device(device).type == "meta":
            for key, entry in entries.items():
                if key not in coded:
                    wanted_type = kinds.get(key, dtype) or TYPES[entry.kind]
                    state[key] = torch.empty(entry.shape, dtype=wanted_type, device=device)
            continue
        for key, tensor in _tensors(part, entries, dtype, device, kinds, coded):
            if key in coded:
                for name, codes in quantised.encode(kind, tensor, f"{part}: {key}").items():
                    state[key.removesuffix("weight") + name].copy_(codes)
            else:
                state[key] = tensor
    module.load_state_dict(state, strict=True, assign=True)


def _shards(index: Path, expected: dict[str, tuple]) -> dict[Path, dict[str, tuple]]:
    """Per shard of an index the keys and shapes it must hold, all shards present."""
    places = read_json(index.parent, index.name).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) and v == Path(v).name for v in places.values()):
        raise ClearError(f"{index} has no weight_map of keys to files in its own folder; fetch it again.")
    absent = sorted({name for name in places.values() if not (index.parent / name).is_file()})
    if absent:
        raise ClearError(f"{missing(index.parent / absent[0])} {index.name} lists {len(absent)} file(s) not here.")
    problems = [f"key {key} {expected[key]} is missing" for key in sorted(expected.keys() - places.keys())]
    for key in sorted(places.keys() - expected.keys()):
        entry = read_header(index.parent / places[key]).get(key)
        found = entry.shape if entry else f"(which {places[key]} does not hold)"
        problems.append(f"key {key} {found} is not part of this model")
    refuse(index, problems)
    return {
        index.parent / name: {key: expected[key] for key, place in places.items() if place == name}
        for name in sorted(set(places.values()))
    }


def _tensors(
    file: Path,
    entries: dict[str, Entry],
    dtype: torch.dtype | None,
    device: str,
    kinds: dict[str, torch.dtype],
    coded: set[str],
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a file: mapped where type and device are the stored ones, else read and converted one by one.

    Types: that of `kinds` where a key has one, the stored one of what is to be `coded`, else `dtype`.
    """
    on_host = torch.device(device).type == "cpu"
    try:
        with safe_open(file, "pt") as mapped, file.open("rb") as source:
            for key, entry in entries.items():
                stored = (TYPES | CODED)[entry.kind]
                wanted = stored if key in coded else kinds.get(key, dtype) or stored
                if on_host and wanted == stored and key not in coded:
                    yield key, mapped.get_tensor(key)
                    continue
                # Read, not mapped: pages of the whole file would count beside the converted weights.
                source.seek(entry.start)
                raw = bytearray(entry.stop - entry.start)
                source.readinto(raw)
                tensor = torch.frombuffer(raw, dtype=stored).reshape(entry.shape)
                yield key, tensor.to(device).to(wanted)
    except SafetensorError as error:
        raise ClearError(f"{file} is not safetensors ({error}); fetch it again.") from error
