"""Model folders: what is saved is loaded bit for bit, in the types of its files, and held in memory once."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clear.config import compose, from_dict
from clear.errors import ClearError
from clear.model.checkpoint import (
    BRIDGE,
    INDEX,
    MODEL,
    PLAIN,
    TOKENIZER,
    VAE,
    fingerprint,
    load_bagel,
    read_header,
    save_bagel,
    save_tensors,
)
from clear.model.vae import AutoEncoder
from clear.stages import base
from tests.helpers.model_folders import GOLDEN, edit, save_large, save_tiny, shard
from tests.tiny import tiny_model


@pytest.fixture
def folder(tmp_path):
    """A complete folder of a model with the mlp bridge."""
    save_tiny(tmp_path / "model", "mlp")
    return tmp_path / "model"


def _equal(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    a, b = found.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    assert all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in b)


@pytest.mark.parametrize("bridge", ["mlp", "direct"])
def test_round_trip_is_bit_for_bit(tmp_path, bridge):
    model, vae, tokenizer = save_tiny(tmp_path / "a", bridge)
    again, vae_again, tokenizer_again = load_bagel(tmp_path / "a")
    _equal(again, model)
    _equal(vae_again, vae)
    assert again.config == model.config and vae_again.config == vae.config
    assert tokenizer_again.get_vocab() == tokenizer.get_vocab()
    assert not again.training and not any(p.is_meta for p in [*again.parameters(), *vae_again.parameters()])
    assert (tmp_path / "a" / BRIDGE).exists() == (bridge == "mlp")
    save_bagel(tmp_path / "b", again, vae_again, tokenizer_again)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_what_is_frozen_after_loading(folder):
    model, vae, _ = load_bagel(folder)
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    assert frozen == {"vit_pos_embed.pos_embed", "latent_pos_embed.pos_embed"}
    assert not any(value.requires_grad for value in vae.parameters())


def _same_files(a: Path, b: Path) -> None:
    for name in (MODEL, VAE):
        found, expected = load_file(b / name), load_file(a / name)
        assert found.keys() == expected.keys()
        assert all(found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in expected.items())


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_reference_files_survive_load_and_save(tmp_path, dtype):
    model, vae, tokenizer = load_bagel(GOLDEN, dtype)
    assert tokenizer is None
    save_bagel(tmp_path, model, vae)
    _same_files(GOLDEN, tmp_path)


def test_a_bfloat16_folder_keeps_its_type_and_bits(folder, tmp_path):
    model, vae, tokenizer = load_bagel(folder, torch.bfloat16)
    save_bagel(tmp_path / "a", model, vae, tokenizer)
    again, vae_again, _ = load_bagel(tmp_path / "a", dtype=None)
    assert {value.dtype for value in again.parameters()} == {torch.bfloat16}
    save_bagel(tmp_path / "b", again, vae_again, tokenizer)
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in (MODEL, VAE, BRIDGE))


def test_saving_over_the_files_the_weights_are_mapped_from(folder):
    model, vae, tokenizer = load_bagel(folder)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model.vae2llm.bias.add_(1.0)  # writes to the private mapping, not to the file
    assert torch.equal(load_file(folder / MODEL)["vae2llm.bias"], expected["vae2llm.bias"])
    save_bagel(folder, model, vae, tokenizer)
    again, _, _ = load_bagel(folder)
    assert torch.equal(again.vae2llm.bias, expected.pop("vae2llm.bias") + 1.0)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in expected.items())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())


def test_a_save_that_fails_leaves_the_old_folder(folder, monkeypatch):
    model, vae, tokenizer = load_bagel(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        model.vae2llm.bias.add_(1.0)

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)  # the tensors are written first, the texts fail
        with pytest.raises(OSError, match="No space"):
            save_bagel(folder, model, vae, tokenizer)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_every_file_has_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    """The weights, too: safetensors makes a private file, which the others of a shared folder could not read."""
    before = os.umask(umask)
    try:
        model, vae, tokenizer = save_tiny(tmp_path / "model", "mlp")
        (tmp_path / "model" / MODEL).chmod(0o640)
        save_bagel(tmp_path / "model", model, vae, tokenizer)  # each by a new file that takes the old one's place
        save_tensors({"a": torch.zeros(1)}, tmp_path / "alone.safetensors")
        (tmp_path / "alone.safetensors").chmod(0o640)
        save_tensors({"a": torch.ones(1)}, tmp_path / "alone.safetensors")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()} == {mode}
    assert stat.S_IMODE((tmp_path / "alone.safetensors").stat().st_mode) == 0o640, "as writing into it leaves it"
    assert load_file(tmp_path / "alone.safetensors")["a"] == 1


def test_weights_that_cannot_be_written_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"contiguous"):
        save_tensors({"a": torch.zeros(2, 2).t()[:, :1].expand(2, 3)}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match=str(tmp_path / "none")):
        save_tensors({"a": torch.zeros(1)}, tmp_path / "none" / "a.safetensors")


def test_a_kill_between_the_files_is_refused_until_saved_again(folder, monkeypatch):
    model, vae, tokenizer = load_bagel(folder)
    rename = Path.replace

    def killed(self, target):
        if Path(target).name == VAE:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save_bagel(folder, model, vae, tokenizer)
    with pytest.raises(ClearError, match="half-written"):
        load_bagel(folder)
    save_bagel(folder, model, vae, tokenizer)
    _equal(load_bagel(folder)[0], model)
    assert not [path.name for path in folder.iterdir() if "partial" in path.name]


def test_the_bridge_and_tokenizer_of_an_earlier_model_do_not_stay(folder):
    model, tokenizer = tiny_model("direct")
    save_bagel(folder, model, AutoEncoder(model.config.vae))
    assert not (folder / BRIDGE).exists() and load_bagel(folder)[2] is None


PEAKS = """
import os, sys
import torch
from clear.model.bagel import Bagel
from clear.model.checkpoint import load_bagel, read_config
from clear.model.runtime import without_weights

with without_weights():
    Bagel(read_config(sys.argv[1]))  # what is imported on the way is no weight

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

for kind in ("none", "stored", "float32"):
    if os.fork() == 0:
        if kind != "none":
            model, vae, _ = load_bagel(sys.argv[1], None if kind == "stored" else torch.float32)
            loaded = peak()
            for value in [*model.parameters(), *vae.parameters()]:
                value.view(torch.int16).max()  # touch every page
            print(kind, loaded, peak(), flush=True)
        else:
            print(kind, 0, peak(), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_loading_holds_the_weights_once(tmp_path):
    save_large(tmp_path)
    size = sum((tmp_path / name).stat().st_size for name in (MODEL, VAE))
    assert size >= 400e6
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=GOLDEN.parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found = {kind: (int(a), int(b)) for kind, a, b in (line.split() for line in done.stdout.splitlines())}
    base = found["none"][1]
    assert found["stored"][0] - base < 0.1 * size  # nothing is read before it is used
    assert 0.9 * size < found["stored"][1] - base <= 1.1 * size
    assert 1.9 * size < found["float32"][1] - base <= 2.2 * size  # the converted weights once, not the stored ones too


LOADS = """
import sys
from clear.model.checkpoint import load_bagel
model, _, _ = load_bagel(sys.argv[1])
assert not [name for name, value in model.state_dict().items() if value.is_meta]
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"pandas", "sympy"}))
"""


def test_loading_does_not_bring_in_torchs_compiler(folder):
    """Two to three seconds of every command, and nothing of it is used."""
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(folder)], capture_output=True, text=True, check=True, cwd=GOLDEN.parent.parent
    )
    assert done.stdout.strip() == ""


def test_the_stored_type_is_mapped_from_the_file(folder):
    model, _, _ = load_bagel(folder, dtype=None)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(MODEL)]
    ranges = [tuple(int(x, 16) for x in line[0].split("-")) for line in maps if str(folder) in line[-1]]
    outside = [
        name
        for name, value in model.named_parameters()
        if "bridge." not in name and not any(a <= value.data_ptr() < b for a, b in ranges)
    ]
    assert ranges and not outside


def test_shards_hold_the_same_model(folder):
    expected, _, _ = load_bagel(folder)
    shard(folder)
    _equal(load_bagel(folder)[0], expected)


def test_an_index_without_its_shards_does_not_hide_the_whole_file(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    load_bagel(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_of_several_models_in_a_folder_one_must_be_named(folder, sharded):
    """A run's own weights put into the released folder were ignored without a word."""
    expected, _, _ = load_bagel(folder)
    whole = (folder / MODEL).read_bytes()
    other = INDEX if sharded else PLAIN
    if sharded:
        edit(folder / MODEL, lambda state: state["vae2llm.bias"].add_(1.0))
        shard(folder)
        (folder / MODEL).write_bytes(whole)
    else:
        (folder / PLAIN).write_bytes(whole)
        edit(folder / PLAIN, lambda state: state["vae2llm.bias"].add_(1.0))
    with pytest.raises(ClearError, match=r"several models' weights \(ema\.safetensors, model") as refused:
        load_bagel(folder)
    assert f"such as model.checkpoint={folder / other}, or" in str(refused.value)
    _equal(load_bagel(folder / MODEL)[0], expected)
    found = load_bagel(folder / other)[0]
    assert torch.equal(found.vae2llm.bias, expected.vae2llm.bias + 1.0)
    shards = {path.name for path in folder.glob("model-*")}
    assert fingerprint(folder / MODEL).keys() == fingerprint(folder).keys() - shards - {other}
    assert fingerprint(folder / other).keys() == fingerprint(folder).keys() - {MODEL}
    (folder / MODEL).unlink()
    _equal(load_bagel(folder)[0], found)


def test_the_base_stage_registers_what_can_be_loaded_and_nothing_else(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = from_dict(compose(["profile=bagel_7b_lora", f"model.checkpoint={folder}", "runtime.device=cpu"]))
    (folder / PLAIN).write_bytes((folder / MODEL).read_bytes())
    with pytest.raises(ClearError, match="several models' weights"):
        base.run(config)
    assert not base.OUT.exists()
    base.run(replace(config, model=replace(config.model, checkpoint=str(folder / PLAIN))))
    files = json.loads((base.OUT / "manifest.json").read_text())["files"]
    assert PLAIN in files and VAE in files and MODEL not in files


def test_weights_can_be_loaded_in_another_type(folder):
    model, _, _ = load_bagel(folder, dtype=torch.bfloat16)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_autoencoder_has_the_values_of_its_file_whatever_the_type_of_the_weights(folder, dtype, device):
    _, vae, _ = load_bagel(folder, dtype, device)
    expected = load_file(folder / VAE)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in expected.values())
    assert all(value.dtype == torch.float32 for value in vae.parameters())
    assert all(torch.equal(value, expected[key]) for key, value in vae.state_dict().items())


def test_without_a_tokenizer_the_markers_come_from_the_config(folder):
    (folder / TOKENIZER).unlink()
    model, _, tokenizer = load_bagel(folder)
    assert tokenizer is None and model.config.special.image_end == 3


def test_the_header_tells_shapes_and_types_without_the_data():
    entries = read_header(GOLDEN / MODEL)
    assert {key: (entry.shape, entry.kind) for key, entry in entries.items()} == {
        key: (tuple(value.shape), "F32") for key, value in load_file(GOLDEN / MODEL).items()
    }
