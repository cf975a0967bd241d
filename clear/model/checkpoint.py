"""Model folders in the layout of BAGEL-7B-MoT: safetensors and JSON only (METHOD §1 "Checkpoint folder").

The model is `ema.safetensors`, `model.safetensors` or the shards that `model.safetensors.index.json` lists; a folder
with several of them is refused unless one is named by its path, because nothing says which is meant. The published
folder has an index without the shards it names, so an index counts only where shards are. Beside the weights lie
`ae.safetensors` (the autoencoder), `llm_config.json`, `vit_config.json` and the tokenizer's files. This project adds
`bridge.safetensors` for the mlp bridge, `vae_config.json` for autoencoders of another size than FLUX's and
`config.json`, which states what the published code hard-codes.

Loading builds on the meta device, checks every key, shape and type against the file's header, and adopts the
memory-mapped tensors: in the stored type nothing is copied; another type or device is read tensor by tensor. Saving
writes every file under a temporary name and renames, so the file that the weights are mapped from may be
overwritten, and a kill leaves either the old folder or one that is refused as half-written.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clear.data.records import file_sha256
from clear.errors import ClearError
from clear.model.bagel import Bagel, BagelConfig
from clear.model.mot import LlmConfig
from clear.model.sequence import SpecialTokens
from clear.model.tokenizer import (
    ADDED,
    LFS,
    MARKERS,
    MERGES,
    SETTINGS,
    TOKENIZER,
    VOCABULARY,
    read_text,
    read_tokenizer,
)
from clear.model.vae import AutoEncoder, VaeConfig
from clear.model.vit import VitConfig

MODEL, VAE, BRIDGE = "ema.safetensors", "ae.safetensors", "bridge.safetensors"
PLAIN, INDEX = "model.safetensors", "model.safetensors.index.json"
_SPECIAL = dict(zip(("bos_token_id", "eos_token_id", "start_of_image", "end_of_image"), MARKERS, strict=True))
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TABLES = {
    "latent_pos_embed.pos_embed": ("max_latent_size", "config.json"),
    "vit_pos_embed.pos_embed": ("vit_max_num_patch_per_side", "config.json"),
    "vit_model.vision_model.embeddings.position_embedding.weight": ("vit_max_num_patch_per_side", "config.json"),
}
"""Position tables, and the setting that says how many rows they have (its square)."""
_PARTIAL, _SAVING = ".partial", "saving.partial"
_UNFINISHED = (_PARTIAL, ".incomplete", ".part", ".crdownload", ".aria2", ".tmp")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TRAINING = re.compile(r"(optim|scheduler|scaler|rng_state|random_states|data_status|trainer_state|training_args)")
"""How the names of the files begin with which a training resumes; of no use to anybody who loads the model."""
_SOURCES = (VOCABULARY, MERGES, SETTINGS, ADDED, "special_tokens_map.json")
"""Tokenizer files beside tokenizer.json; the published code reads them, so they are kept when a model is saved."""
HASHED_ON_LOAD = 2**28
"""Files up to this size (bytes) are hashed to be compared; of larger ones size, header and slices are."""
_SAMPLES, _SAMPLE = 64, 2**16  # number and bytes of the slices; other values would not match what adapters record
_SHOWN = 5
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: shape, stored type (F32, BF16, …) and its bytes' place in the file."""

    shape: tuple[int, ...]
    kind: str
    start: int
    stop: int


def save_bagel(folder: Path | str, model: Bagel, vae: AutoEncoder, tokenizer=None) -> None:
    """Write a model folder. The bytes depend on weights, configuration and tokenizer only.

    A tokenizer of `load_tokenizer` brings the files it came from. The weights may be mapped from the very files that
    are overwritten. Until the last file is in place, the folder contains a marker that makes `load_bagel` reject it.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    bridge = {k.removeprefix("bridge."): state.pop(k) for k in list(state) if k.startswith("bridge.")}
    autoencoder = {k: v.detach().cpu().contiguous() for k, v in vae.state_dict().items()}
    writers: dict[str, Callable[[Path], object]] = {
        MODEL: lambda path: save_file(state, path),
        VAE: lambda path: save_file(autoencoder, path),
    }
    if bridge:
        writers[BRIDGE] = lambda path: save_file(bridge, path)
    stale = {BRIDGE, TOKENIZER}
    if tokenizer is not None:
        writers[TOKENIZER] = lambda path: path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        for name, content in getattr(tokenizer, "sources", {}).items():
            writers[name] = lambda path, content=content: path.write_bytes(content)
        stale |= {*_SOURCES}
    for name, content in _config_files(model.config).items():
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        writers[name] = lambda path, text=text: path.write_text(text)
    write_folder(folder, writers, stale - writers.keys())


def write_folder(folder: Path | str, writers: dict[str, Callable[[Path], object]], stale: Collection[str] = ()) -> None:
    """Write the files of a model folder, each by its function, all or none; then remove the `stale` ones.

    Until the last file is in place, the folder contains a marker that makes `check_whole` reject it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, write in writers.items():
            write(folder / (name + _PARTIAL))
    except BaseException:  # a full disk or Ctrl-C: what was there before is still whole
        for name in writers:
            (folder / (name + _PARTIAL)).unlink(missing_ok=True)
        raise
    (folder / _SAVING).touch()
    for name in writers:
        (folder / (name + _PARTIAL)).replace(folder / name)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    (folder / _SAVING).unlink()


def check_whole(folder: Path) -> None:
    """Raise ClearError if the folder was left in the middle of a save."""
    if (folder / _SAVING).exists():
        raise ClearError(f"{folder} is half-written ({_SAVING} is still there); run the stage that makes it again.")


def fingerprint(folder: Path | str) -> dict[str, dict[str, Any]]:
    """{file name: {"bytes", "sha256"}} of a model folder's files, as the manifest of the base stage lists them.

    Files over HASHED_ON_LOAD bytes also have "samples_sha256", with which they are compared without being read whole.
    Where `folder` is a weight file (see `named_file`), the folder's other weights are left out.
    """
    folder, named = named_file(folder)
    others = set()
    if named is not None:
        others = {*_weight_files(folder), *([] if named.name == INDEX else _shard_files(folder))} - {named}
    found = {}
    for path in sorted(p for p in folder.glob("[!.]*.*") if p.is_file() and p not in others):
        found[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        if found[path.name]["bytes"] > HASHED_ON_LOAD:
            found[path.name]["samples_sha256"] = samples_sha256(path)
    return found


def samples_sha256(path: Path) -> str:
    """Digest of a safetensors header and of slices spread evenly from the first to the last byte of a file."""
    digest, last = hashlib.sha256(), path.stat().st_size - _SAMPLE
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            digest.update(file.read(min(int.from_bytes(file.read(8), "little"), _LONGEST_HEADER)))
        for i in range(_SAMPLES):
            file.seek(max(0, last * i // (_SAMPLES - 1)))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


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


def special_tokens(tokenizer) -> SpecialTokens:
    """Look the four markers up in a `tokenizers.Tokenizer`. Raises ClearError for one that is missing."""
    ids = [tokenizer.token_to_id(marker) for marker in MARKERS]
    if None in ids:
        raise ClearError(
            f"{TOKENIZER}: marker {MARKERS[ids.index(None)]} is missing; use the tokenizer of the checkpoint."
        )
    return SpecialTokens(*ids)


def _read_json(folder: Path, name: str, required: bool = True) -> dict:
    path = folder / name
    if not path.exists():
        if required:
            raise ClearError(
                f"{path} is missing; a model folder has the files of BAGEL-7B-MoT (README, 'With BAGEL-7B'). "
                "A training checkpoint holds weights alone: copy the JSON files, ae.safetensors and the tokenizer of "
                "the model it came from into its folder, or put it into that model's folder and name its file as "
                "model.checkpoint."
            )
        return {}
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ClearError(f"{path} is not JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise ClearError(f"{path} holds a {type(content).__name__}, not a JSON object; fetch it again.")
    return content


def read_config(folder: Path | str, tokenizer=None) -> BagelConfig:
    """The configuration of a model folder (or weight file). Markers come from its tokenizer, else config.json.

    `tokenizer` is the folder's own if it has been loaded already. Raises ClearError where the files disagree.
    """
    folder, _ = named_file(folder)
    tokenizer = tokenizer or load_tokenizer(folder)
    try:
        config = _config_of(folder, None if tokenizer is None else special_tokens(tokenizer))
    except KeyError as error:
        raise ClearError(f"{folder}: key {error} is missing in the config files; fetch them again.") from error
    if tokenizer is not None:
        _check_tokenizer(folder, tokenizer, config)
    return config


def _config_of(folder: Path, special: SpecialTokens | None) -> BagelConfig:
    llm, vit = _read_json(folder, "llm_config.json"), _read_json(folder, "vit_config.json")
    own, vae = _read_json(folder, "config.json", False), _read_json(folder, "vae_config.json", False)
    vae = own.get("vae_config", {}) | vae
    known = {k: vae[k] for k in VaeConfig.__dataclass_fields__ if k in vae}
    if "ch_mult" in known:
        known["ch_mult"] = tuple(known["ch_mult"])
    special = special or _stated_markers(folder)
    if special is None:
        raise ClearError(f"{folder}: neither a tokenizer nor special_tokens in config.json say which ids mark images.")
    config = BagelConfig(
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
    if config.llm.hidden % config.llm.heads or config.llm.heads % config.llm.kv_heads:
        raise ClearError(
            f"{folder / 'llm_config.json'}: hidden_size {config.llm.hidden} must divide by num_attention_heads "
            f"{config.llm.heads}, and that by num_key_value_heads {config.llm.kv_heads}; fetch the file again."
        )
    return config


def load_tokenizer(folder: Path | str):
    """The `tokenizers.Tokenizer` of a model folder, or None (see `clear.model.tokenizer.read_tokenizer`).

    Its attribute `sources` holds the folder's other tokenizer files, for `save_bagel`: the folder may be overwritten.
    """
    tokenizer = read_tokenizer(folder)
    if tokenizer is not None:
        files = [Path(folder) / name for name in _SOURCES]
        tokenizer.sources = {file.name: file.read_bytes() for file in files if file.is_file()}
    return tokenizer


def _stated_markers(folder: Path) -> SpecialTokens | None:
    stated = _read_json(folder, "config.json", False).get("special_tokens")
    if stated is None:
        return None
    if not isinstance(stated, dict) or stated.keys() < _SPECIAL.keys():
        raise ClearError(f"{folder / 'config.json'}: special_tokens must name {', '.join(_SPECIAL)}; fetch it again.")
    return SpecialTokens(*(stated[name] for name in _SPECIAL))


def _check_tokenizer(folder: Path, tokenizer, config: BagelConfig) -> None:
    """The tokenizer belongs to the weights, as far as the configs tell: ids fit the embedding, markers agree."""
    last, token = max((number, text) for text, number in tokenizer.get_vocab(with_added_tokens=True).items())
    if last >= config.llm.vocab:
        raise ClearError(
            f"{folder}: the tokenizer ({TOKENIZER} or vocab.json) gives token {token} the id {last}, but the "
            f"embedding has {config.llm.vocab} rows (vocab_size in llm_config.json); take both from one checkpoint."
        )
    stated = _stated_markers(folder)
    if stated not in (None, config.special):
        raise ClearError(
            f"{folder}: the tokenizer gives the markers the ids {asdict(config.special)}, config.json says "
            f"{asdict(stated)}; the tokenizer belongs to another model, copy the one this model was trained with."
        )
    # A model whose embedding was grown for appended markers ends with them. One with rows to spare had them elsewhere.
    if stated is None and tokenizer.undefined and config.llm.vocab > last + 1:
        raise ClearError(
            f"{folder}: no file defines {', '.join(tokenizer.undefined)}, and with {config.llm.vocab} rows (vocab_size "
            f"in llm_config.json) the embedding does not end with them; copy {SETTINGS} or {TOKENIZER} from the model "
            "the weights came from."
        )


def read_header(file: Path) -> dict[str, Entry]:
    """Keys, shapes and types of a safetensors file, without its data.

    Raises ClearError for a missing or truncated file, a git-lfs pointer, and a pickle under a safetensors name.
    """
    if not file.is_file():
        raise ClearError(_missing(file))
    size = file.stat().st_size
    with file.open("rb") as source:
        start = source.read(8)
        length = int.from_bytes(start, "little")
        if len(start) == 8 and length > _LONGEST_HEADER:
            raise ClearError(f"{file} is not safetensors{_what(start, file)}")
        if len(start) < 8 or 8 + length > size:
            raise ClearError(f"{file} is truncated: it has {size} bytes and not even its whole header; fetch it again.")
        try:
            raw = json.loads(source.read(length))
            raw.pop("__metadata__", None)
            first = 8 + length
            entries = {
                key: Entry(tuple(value["shape"]), value["dtype"], *(first + at for at in value["data_offsets"]))
                for key, value in raw.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ClearError(f"{file} is not safetensors (header: {error!r}); fetch it again.") from error
    end = max((entry.stop for entry in entries.values()), default=first)
    if size < end:
        raise ClearError(f"{file} is truncated: it has {size} bytes, its header says {end}; fetch it again.")
    return entries


def _what(start: bytes, file: Path) -> str:
    """What a file is that is no safetensors, from its first bytes, and the remedy."""
    if LFS.encode().startswith(start):
        return f" but a git-lfs pointer; run `git lfs pull` in {file.parent}."
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return f" but a pickle, whatever its name. {_CONVERT}"
    return "; fetch it again."


_CONVERT = (
    "Take the safetensors release, or convert it: torch.load(…, weights_only=True), then safetensors.torch.save_file."
)


def _missing(file: Path) -> str:
    """Why a file is not there, as far as the folder tells."""
    text = f"{file} is missing"
    folders = (file.parent, file.parent / ".cache/huggingface/download")  # the second is where `hf download` works
    here = sorted(path.name for folder in folders if folder.is_dir() for path in folder.iterdir())
    unfinished = [name for name in here if name.endswith(_UNFINISHED)]
    if unfinished:
        return f"{text}: the folder is half-written ({', '.join(unfinished)}); finish the download or stage again."
    if state := [name for name in here if _TRAINING.match(name)]:
        listed = ", ".join(state[:_SHOWN]) + (" …" if len(state) > _SHOWN else "")
        return (
            f"{text}: the folder is a checkpoint of a training ({listed} are the state it resumes with, which is not "
            f"read); copy {file.name} from the folder of the model that was trained."
        )
    pickles = [name for name in here if name.endswith(_PICKLES)]
    if pickles:
        return f"{text}; {', '.join(pickles)} is a pickle, and only safetensors are read. {_CONVERT}"
    return f"{text}; copy it from the model folder or release that the other files came from (only safetensors)."


def load_weights(module: nn.Module, file: Path, dtype: torch.dtype | None, device: str) -> None:
    """Adopt the tensors of a safetensors file (or of an index's shards) into a (meta) module.

    dtype None keeps the stored type. On the CPU tensors of the wanted type stay memory-mapped; on "meta" the file is
    checked and none is read. Raises ClearError with every problem of a file: see `check_entries`.
    """
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    parts = _shards(file, expected) if file.name == INDEX else {file: expected}
    state = {}
    for part, wanted in parts.items():
        entries = read_header(part)
        check_entries(part, wanted, entries)
        if torch.device(device).type == "meta":
            state |= {k: torch.empty(e.shape, dtype=dtype or _TYPES[e.kind], device=device) for k, e in entries.items()}
            continue
        state |= dict(_tensors(part, entries, dtype, device))
    module.load_state_dict(state, strict=True, assign=True)


def _shards(index: Path, expected: dict[str, tuple]) -> dict[Path, dict[str, tuple]]:
    """Per shard of an index the keys and shapes it must hold, all shards present."""
    places = _read_json(index.parent, index.name).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) and v == Path(v).name for v in places.values()):
        raise ClearError(f"{index} has no weight_map of keys to files in its own folder; fetch it again.")
    absent = sorted({name for name in places.values() if not (index.parent / name).is_file()})
    if absent:
        raise ClearError(f"{_missing(index.parent / absent[0])} {index.name} lists {len(absent)} file(s) not here.")
    problems = [f"key {key} {expected[key]} is missing" for key in sorted(expected.keys() - places.keys())]
    for key in sorted(places.keys() - expected.keys()):
        entry = read_header(index.parent / places[key]).get(key)
        found = entry.shape if entry else f"(which {places[key]} does not hold)"
        problems.append(f"key {key} {found} is not part of this model")
    _refuse(index, problems)
    return {
        index.parent / name: {key: expected[key] for key, place in places.items() if place == name}
        for name in sorted(set(places.values()))
    }


def check_entries(file: Path, expected: dict[str, tuple], entries: dict[str, Entry], remedy: str = "") -> None:
    """Raise one ClearError for all keys of a file that are missing, surplus, mis-shaped or of a type that is no float.

    `remedy` says what to do where no key has a remedy of its own.
    """
    problems, hints = [], []
    for key in sorted(expected.keys() | entries.keys()):
        if key not in entries:
            problems.append(f"key {key} {expected[key]} is missing")
        elif key not in expected:
            problems.append(f"key {key} {entries[key].shape} is not part of this model")
        elif expected[key] != entries[key].shape:
            problems.append(f"key {key} has shape {entries[key].shape}, the configs say {expected[key]}")
            hints += _hint(key, entries[key].shape, expected[key])
        elif entries[key].kind not in _TYPES:
            problems.append(f"key {key} has type {entries[key].kind}, expected one of {', '.join(_TYPES)}")
            hints.append("Quantised weights are not read; take the bfloat16 release.")
    _refuse(file, problems, hints or [remedy])


def _hint(key: str, found: tuple, expected: tuple) -> list[str]:
    """The remedy of a shape that is wrong for a known reason."""
    if key in _TABLES and len(found) == 2 and found[1] == expected[1] and math.isqrt(found[0]) ** 2 == found[0]:
        name, place = _TABLES[key]
        sides = math.isqrt(expected[0]), math.isqrt(found[0])
        return [f"{name} is {sides[0]}, but the file's table is {sides[1]}²: set {name} to {sides[1]} in {place}."]
    if key.endswith("patch_embedding.weight") and len(found) == 4:
        return ["The patch embedding is a convolution; store weight.permute(0, 2, 3, 1).reshape(len(weight), -1)."]
    return []


def _refuse(file: Path, problems: list[str], hints: list[str] = ()) -> None:
    """Raise one ClearError for all problems of a file, if there are any."""
    if not problems:
        return
    more = len(problems) - _SHOWN
    listed = "; ".join(problems[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
    remedy = " ".join(dict.fromkeys(hints)) or (
        "The weights and the config files (llm_config.json, vit_config.json, config.json, vae_config.json) belong to "
        "different models; take both from one folder."
    )
    count = f"{len(problems)} problems: " if len(problems) > 1 else ""
    raise ClearError(f"{file}: {count}{listed}. {remedy}")


def _tensors(file: Path, entries: dict[str, Entry], dtype, device) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a file: mapped where type and device are the stored ones, else read and converted one by one."""
    on_host = torch.device(device).type == "cpu"
    try:
        with safe_open(file, "pt") as mapped, file.open("rb") as source:
            for key, entry in entries.items():
                stored = _TYPES[entry.kind]
                if on_host and dtype in (None, stored):
                    yield key, mapped.get_tensor(key)
                    continue
                # Read, not mapped: pages of the whole file would count beside the converted weights.
                source.seek(entry.start)
                raw = bytearray(entry.stop - entry.start)
                source.readinto(raw)
                tensor = torch.frombuffer(raw, dtype=stored).reshape(entry.shape)
                yield key, tensor.to(device).to(dtype or stored)
    except SafetensorError as error:
        raise ClearError(f"{file} is not safetensors ({error}); fetch it again.") from error


def named_file(path: Path | str) -> tuple[Path, Path | None]:
    """(folder, weight file) of a path that names a model: its folder (no file), or one of the weight files in it."""
    path = Path(path)
    is_file = (path.suffix == ".safetensors" or path.name == INDEX) and not path.is_dir()
    return (path.parent, path) if is_file else (path, None)


def _shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*-of-*.safetensors"))


def _weight_files(folder: Path) -> list[Path]:
    """The files of model weights in a folder; an index stands for its shards and counts only where shards are."""
    found = [folder / name for name in (MODEL, PLAIN, INDEX) if (folder / name).is_file()]
    shards = _shard_files(folder)
    if shards and not found:
        raise ClearError(f"{folder / INDEX} is missing, but {shards[0].name} is here; fetch the index of the shards.")
    return found if shards else [file for file in found if file.name != INDEX]


def model_file(path: Path | str) -> Path:
    """The file of the model weights of a folder, or the one that `path` names itself.

    A folder with none gives the name of the file that is missed. Raises ClearError for a folder with several.
    """
    folder, named = named_file(path)
    if named is not None:
        return named
    found = _weight_files(folder)
    if len(found) > 1:
        raise ClearError(
            f"{folder} holds several models' weights ({', '.join(file.name for file in found)}); say which one by the "
            f"path of its file, such as model.checkpoint={found[-1]}, or move the others away."
        )
    return found[0] if found else folder / MODEL


def load_bagel(path: Path | str, dtype: torch.dtype | None = torch.float32, device: str = "cpu"):
    """Model, autoencoder and tokenizer (None where the folder has none) of a folder in BAGEL-7B-MoT's layout.

    `path` is the folder, or one weight file in it where it holds several. dtype None keeps each tensor's stored type.
    With the stored type on the CPU the weights stay mapped from the file (private: training does not write to it); on
    "meta" only the autoencoder has weights. The autoencoder is float32 whatever `dtype`: it runs without autocast, and
    its file is float32. Raises ClearError for whatever does not fit.
    """
    folder, _ = named_file(path)
    if not folder.is_dir():
        raise ClearError(f"{folder} is not a folder with model weights; run the stage that makes it or `dvc pull` it.")
    check_whole(folder)
    weights = model_file(path)
    tokenizer = load_tokenizer(folder)
    config = read_config(folder, tokenizer)
    with torch.device("meta"):
        model, vae = Bagel(config), AutoEncoder(config.vae)
    bridge = getattr(model, "bridge", None)
    if bridge is not None:
        del model.bridge
        load_weights(bridge, folder / BRIDGE, dtype, device)
    load_weights(model, weights, dtype, device)
    load_weights(vae, folder / VAE, torch.float32, "cpu" if torch.device(device).type == "meta" else device)
    if bridge is not None:
        model.bridge = bridge
    for table in (model.vit_pos_embed, model.latent_pos_embed):
        table.pos_embed.requires_grad_(False)
    return model.eval(), vae.eval().requires_grad_(False), tokenizer
