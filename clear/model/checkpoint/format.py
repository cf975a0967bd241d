"""The files of a model folder: their names, which of them holds the weights, their headers, and their fingerprints."""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from clear.data.records import file_sha256
from clear.errors import ClearError, quoted
from clear.model.tokenizer import ADDED, LFS, MERGES, SETTINGS, TOKENIZER, VOCABULARY

MODEL, VAE, BRIDGE = "ema.safetensors", "ae.safetensors", "bridge.safetensors"
PLAIN, INDEX = "model.safetensors", "model.safetensors.index.json"
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODED = {"U8": torch.uint8, "I8": torch.int8}
"""Types of quantised weights."""
SHAPES = ("llm_config.json", "vit_config.json", "vae_config.json", "config.json")
"""What says how large a model is. A folder without the first of them has weights alone."""
WORDS = (TOKENIZER, VOCABULARY, MERGES, SETTINGS, ADDED, "special_tokens_map.json")
"""The tokenizer's files. The published code reads all but the first, so they are kept when a model is saved."""
_TABLES = {
    "latent_pos_embed.pos_embed": ("max_latent_size", "config.json"),
    "vit_pos_embed.pos_embed": ("vit_max_num_patch_per_side", "config.json"),
    "vit_model.vision_model.embeddings.position_embedding.weight": ("vit_max_num_patch_per_side", "config.json"),
}
"""Position tables, and the setting that says how many rows they have (its square)."""
PARTIAL, SAVING = ".partial", "saving.partial"
_UNFINISHED = (PARTIAL, ".incomplete", ".part", ".crdownload", ".aria2", ".tmp")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TRAINING = re.compile(r"(optim|scheduler|scaler|rng_state|random_states|data_status|trainer_state|training_args)")
"""How the names of the files begin with which a training resumes; of no use to anybody who loads the model."""
HASHED_ON_LOAD = 2**28
"""Files up to this size (bytes) are hashed to be compared; of larger ones size, header and slices are."""
_SAMPLES, _SAMPLE = 64, 2**16  # number and bytes of the slices; other values would not match what adapters record
_SHOWN = 5
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_CONVERT = (
    "Take the safetensors release, or convert it: torch.load(…, weights_only=True), then safetensors.torch.save_file."
)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, with the mode of any file written here. Raises OSError with the path, which the library
    only says, for what the system refuses."""
    try:
        with _usual_mode(path):
            save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        if (number := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error


@contextmanager
def _usual_mode(path: Path) -> Iterator[None]:
    """Give the file that the block puts at `path` the mode of a new file, or of the one that is there.

    safetensors makes a private file (0600) and renames it: in a folder that several people share, nobody else could
    read the weights. The umask can only be asked by setting it, for all threads, so a file is made that follows it.
    """
    new = not path.exists()
    if new:
        path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        yield
        path.chmod(mode)
    except BaseException:
        if new:
            path.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: shape, stored type (F32, BF16, …) and its bytes' place in the file."""

    shape: tuple[int, ...]
    kind: str
    start: int
    stop: int


@dataclass(frozen=True)
class Places:
    """The folders that the parts of a model are read from; the same one for all parts of a whole model folder."""

    weights: Path
    shapes: Path
    autoencoder: Path
    tokenizer: Path

    @property
    def whole(self) -> bool:
        """Whether the folder with the weights has its own description."""
        return self.shapes == self.weights

    def file(self, name: str) -> Path:
        """Where the file of this name is, or would be."""
        folders = dict.fromkeys(SHAPES, self.shapes) | dict.fromkeys(WORDS, self.tokenizer) | {VAE: self.autoencoder}
        return folders.get(name, self.weights) / name


def is_whole(folder: Path) -> bool:
    """Whether a folder describes its model; else it has weights alone, as trainings leave them."""
    return (folder / SHAPES[0]).is_file()


def places(path: Path | str, base: Path | str | None = None) -> Places:
    """Where the parts of the model at `path` are: a folder of weights alone takes what it lacks from `base`.

    The config files come together and from `base`; the autoencoder and the tokenizer are the folder's own if it has
    them. Raises ClearError if `base` is needed and is no model folder; without one, what lacks is missed in `path`.
    """
    folder, _ = named_file(path)
    other, _ = named_file(path if base is None else base)
    if other == folder or is_whole(folder):
        return Places(folder, folder, folder, folder)
    if not is_whole(other):
        raise ClearError(
            f"{folder} has weights alone, and {other} is not the model folder to complete them: {SHAPES[0]} is missing "
            "there; name the folder of BAGEL-7B-MoT (--base, or model.base in params)."
        )
    has_words = any((folder / name).is_file() for name in (TOKENIZER, VOCABULARY, MERGES))
    return Places(folder, other, folder if (folder / VAE).is_file() else other, folder if has_words else other)


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

    A folder with none gives the name of the file that is missed. Of several in a folder of weights alone, which are one
    training's, the average counts (`ema.safetensors`, with which the published reinforcement learning starts). In a
    whole model folder the other file may be of another training: there ClearError asks for its path.
    """
    folder, named = named_file(path)
    if named is not None:
        return named
    found = _weight_files(folder)
    if len(found) > 1 and is_whole(folder):
        raise ClearError(
            f"{folder} holds several models' weights ({', '.join(file.name for file in found)}); say which one by the "
            f"path of its file, such as model.checkpoint={found[-1]}, or move the others away."
        )
    return found[0] if found else folder / MODEL


def check_whole(folder: Path) -> None:
    """Raise ClearError if the folder was left in the middle of a save."""
    if (folder / SAVING).exists():
        raise ClearError(f"{folder} is half-written ({SAVING} is still there); run the stage that makes it again.")


def fingerprint(folder: Path | str, base: Path | str | None = None) -> dict[str, dict[str, Any]]:
    """{file name: {"bytes", "sha256"}} of a model folder's files, as the manifest of the base stage lists them.

    Files over HASHED_ON_LOAD bytes also have "samples_sha256", with which they are compared without being read whole.
    Where `folder` is a weight file (see `named_file`), the folder's other weights are left out. Of a folder of weights
    alone, the files that complete it (see `places`) are listed too, and the state of its training is not.
    """
    parts, (folder, named) = places(folder, base), named_file(folder)
    if not parts.whole and named is None:
        named = model_file(folder)
    others = set()
    if named is not None:
        others = {*_weight_files(folder), *([] if named.name == INDEX else _shard_files(folder))} - {named}
    files = [path for path in folder.glob("[!.]*.*") if path not in others]
    if not parts.whole:
        files = [path for path in files if parts.file(path.name) == path and not _TRAINING.match(path.name)]
        files += [parts.file(name) for name in (*SHAPES, *WORDS, VAE) if parts.file(name) not in files]
    found = {}
    for path in sorted((p for p in files if p.is_file()), key=lambda path: path.name):
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


def read_header(file: Path) -> dict[str, Entry]:
    """Keys, shapes and types of a safetensors file, without its data.

    Raises ClearError for a missing or truncated file, a git-lfs pointer, and a pickle under a safetensors name.
    """
    if not file.is_file():
        raise ClearError(missing(file))
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
            entries = {key: _entry(value, first) for key, value in raw.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ClearError(f"{file} is not safetensors (header: {error!r}); fetch it again.") from error
    end = max((entry.stop for entry in entries.values()), default=first)
    if size < end:
        raise ClearError(f"{file} is truncated: it has {size} bytes, its header says {end}; fetch it again.")
    return entries


def _entry(value: dict, first: int) -> Entry:
    """One tensor of a header whose data begin at byte `first`. Raises KeyError or TypeError for what is none."""
    shape, offsets = tuple(value["shape"]), tuple(value["data_offsets"])
    if not isinstance(value["dtype"], str) or not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
        raise TypeError(f"{quoted(value)} is no tensor")
    return Entry(shape, value["dtype"], *(first + at for at in offsets))


def _what(start: bytes, file: Path) -> str:
    """What a file other than safetensors is, from its first bytes, and the remedy."""
    if LFS.encode().startswith(start):
        return f" but a git-lfs pointer; run `git lfs pull` in {file.parent}."
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return f" but a pickle, whatever its name. {_CONVERT}"
    return "; fetch it again."


def missing(file: Path) -> str:
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


def check_entries(
    file: Path,
    expected: dict[str, tuple],
    entries: dict[str, Entry],
    remedy: str = "",
    kinds: dict[str, torch.dtype] | None = None,
) -> None:
    """Raise one ClearError for all keys of a file that are missing, surplus, mis-shaped or of a wrong type: that of
    `kinds` where a key has one, else a floating-point type.

    `remedy` says what to do where no key has a remedy of its own.
    """
    kinds = kinds or {}
    problems, hints = [], []
    for key in sorted(expected.keys() | entries.keys()):
        if key not in entries:
            problems.append(f"key {key} {expected[key]} is missing")
        elif key not in expected:
            problems.append(f"key {key} {entries[key].shape} is not part of this model")
        elif expected[key] != entries[key].shape:
            problems.append(f"key {key} has shape {entries[key].shape}, the configs say {expected[key]}")
            hints += _hint(key, entries[key].shape, expected[key])
        elif key in kinds and (TYPES | CODED).get(entries[key].kind) != kinds[key]:
            problems.append(f"key {key} has type {entries[key].kind}, its quantisation says {kinds[key]}")
            hints.append("Make the folder again with `clear quantise`.")
        elif key not in kinds and entries[key].kind not in TYPES:
            problems.append(f"key {key} has type {entries[key].kind}, expected one of {', '.join(TYPES)}")
            hints.append(
                "Weights that other programs quantised are not read; take the bfloat16 release and set runtime.weights."
            )
    refuse(file, problems, hints or [remedy])


def _hint(key: str, found: tuple, expected: tuple) -> list[str]:
    """The remedy of a shape that is wrong for a known reason."""
    if key in _TABLES and len(found) == 2 and found[1] == expected[1] and math.isqrt(found[0]) ** 2 == found[0]:
        name, place = _TABLES[key]
        sides = math.isqrt(expected[0]), math.isqrt(found[0])
        return [f"{name} is {sides[0]}, but the file's table is {sides[1]}²: set {name} to {sides[1]} in {place}."]
    if key.endswith("patch_embedding.weight") and len(found) == 4:
        return ["The patch embedding is a convolution; store weight.permute(0, 2, 3, 1).reshape(len(weight), -1)."]
    return []


def refuse(file: Path, problems: list[str], hints: list[str] = ()) -> None:
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
