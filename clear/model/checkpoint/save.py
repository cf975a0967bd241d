"""Writing a model folder, all of it or none: every file under a temporary name, then renamed."""

import json
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from clear.data.io import require_new, sync
from clear.errors import ClearError
from clear.model.bagel import Bagel
from clear.model.checkpoint.config import SOURCES, config_files, read_config
from clear.model.checkpoint.format import BRIDGE, MODEL, PARTIAL, SAVING, VAE, named_file, save_tensors
from clear.model.checkpoint.load import load_bagel
from clear.model.tokenizer import TOKENIZER
from clear.model.vae import AutoEncoder


def save_bagel(folder: Path | str, model: Bagel, vae: AutoEncoder, tokenizer=None) -> None:
    """Write a model folder. The bytes depend on weights, configuration and tokenizer only.

    A tokenizer of `load_tokenizer` brings the files it came from. The weights may be mapped from the very files that
    are overwritten. Until the last file is in place, the folder contains a marker that makes `load_bagel` reject it.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    bridge = {k.removeprefix("bridge."): state.pop(k) for k in list(state) if k.startswith("bridge.")}
    autoencoder = {k: v.detach().cpu().contiguous() for k, v in vae.state_dict().items()}
    writers: dict[str, Callable[[Path], object]] = {
        MODEL: lambda path: save_tensors(state, path),
        VAE: lambda path: save_tensors(autoencoder, path),
    }
    if bridge:
        writers[BRIDGE] = lambda path: save_tensors(bridge, path)
    stale = {BRIDGE, TOKENIZER}
    if tokenizer is not None:
        writers[TOKENIZER] = lambda path: path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        for name, content in getattr(tokenizer, "sources", {}).items():
            writers[name] = lambda path, content=content: path.write_bytes(content)
        stale |= {*SOURCES}
    for name, content in config_files(model.config).items():
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        writers[name] = lambda path, text=text: path.write_text(text)
    write_folder(folder, writers, stale - writers.keys())


def quantise_folder(
    path: Path | str, out: Path | str, kind: str, dtype: torch.dtype | None = None, base: Path | str | None = None
) -> None:
    """Write the model folder `out` of exact weights (as load_bagel takes them) with quantised layers of `kind`.

    Everything else gets `dtype` (None: the stored type). Raises ClearError for weights that are quantised already, and
    if `out` exists and is not empty.
    """
    require_new(Path(out))
    folder, _ = named_file(path)
    if folder.is_dir() and (held := read_config(path, base=base).quantised):
        raise ClearError(f"{folder} holds {held} weights already; name the folder that they were made from.")
    model, vae, tokenizer = load_bagel(path, dtype, base=base, kind=kind)
    save_bagel(out, model, vae, tokenizer)


def write_folder(folder: Path | str, writers: dict[str, Callable[[Path], object]], stale: Collection[str] = ()) -> None:
    """Write the files of a model folder, each by its function, all or none; then remove the `stale` ones.

    Until the last file is in place, the folder contains a marker that makes `check_whole` reject it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name, write in writers.items():
            write(folder / (name + PARTIAL))
            sync(folder / (name + PARTIAL))
    except BaseException:  # a full disk or Ctrl-C: what was there before is still whole
        for name in writers:
            (folder / (name + PARTIAL)).unlink(missing_ok=True)
        raise
    (folder / SAVING).touch()
    for name in writers:
        (folder / (name + PARTIAL)).replace(folder / name)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    (folder / SAVING).unlink()
