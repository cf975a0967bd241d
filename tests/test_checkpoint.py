"""Model folders: what is saved is loaded bit for bit, and a wrong or broken folder is refused by name."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clear.config import compose, from_dict
from clear.errors import ClearError
from clear.model.bagel import Bagel
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
)
from clear.model.tokenizer import MARKERS, word_tokenizer
from clear.model.vae import AutoEncoder
from clear.stages import base
from tests.tiny import WORDS, tiny_model

GOLDEN = Path(__file__).parent / "golden"
KEY = "language_model.model.layers.1.self_attn.q_proj_moe_gen.weight"


def _save(folder, bridge: str):
    model, tokenizer = tiny_model(bridge)
    torch.manual_seed(1)
    vae = AutoEncoder(model.config.vae)
    save_bagel(folder, model, vae, tokenizer)
    return model, vae, tokenizer


@pytest.fixture
def folder(tmp_path):
    """A complete folder of a model with the mlp bridge."""
    _save(tmp_path / "model", "mlp")
    return tmp_path / "model"


def _edit(file, change) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file)


def _equal(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    a, b = found.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    assert all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in b)


@pytest.mark.parametrize("bridge", ["mlp", "direct"])
def test_round_trip_is_bit_for_bit(tmp_path, bridge):
    model, vae, tokenizer = _save(tmp_path / "a", bridge)
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

with torch.device("meta"):
    Bagel(read_config(sys.argv[1]))  # torch imports the machinery of the meta device on its first use

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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_loading_holds_the_weights_once(tmp_path):
    shapes = tiny_model("direct")[0].config
    shapes = replace(shapes, llm=replace(shapes.llm, vocab=8192, hidden=1024, layers=6, heads=8, kv_heads=2, mlp=4096))
    with torch.device("meta"):
        model, vae = Bagel(shapes), AutoEncoder(shapes.vae)
    for module in (model, vae):
        state = {key: torch.rand(value.shape, dtype=torch.bfloat16) for key, value in module.state_dict().items()}
        module.load_state_dict(state, assign=True)
    save_bagel(tmp_path, model, vae)
    size = sum((tmp_path / name).stat().st_size for name in (MODEL, VAE))
    assert size >= 400e6
    del model, state
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


def _shard(folder: Path, count: int = 3) -> dict[str, str]:
    """Split the model file into shards with an index; returns the index's weight map."""
    state = load_file(folder / MODEL)
    (folder / MODEL).unlink()
    names = sorted(state)
    places = {key: f"model-{i * count // len(names) + 1:05d}-of-{count:05d}.safetensors" for i, key in enumerate(names)}
    for name in set(places.values()):
        save_file({key: state[key].clone() for key, place in places.items() if place == name}, folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def test_shards_hold_the_same_model(folder):
    expected, _, _ = load_bagel(folder)
    _shard(folder)
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
        _edit(folder / MODEL, lambda state: state["vae2llm.bias"].add_(1.0))
        _shard(folder)
        (folder / MODEL).write_bytes(whole)
    else:
        (folder / PLAIN).write_bytes(whole)
        _edit(folder / PLAIN, lambda state: state["vae2llm.bias"].add_(1.0))
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


def test_a_named_file_that_is_not_there_is_refused(folder):
    with pytest.raises(ClearError, match=r"modle\.safetensors is missing"):
        load_bagel(folder / "modle.safetensors")


TRAINING = ["optimizer.00000-of-00008.pt", "scheduler.pt", "data_status.pt"]


@pytest.mark.parametrize("file", [VAE, MODEL, "llm_config.json"])
def test_the_state_of_a_training_is_named_for_what_it_is(folder, file):
    for name in TRAINING:
        torch.save({}, folder / name)
    load_bagel(folder)
    (folder / file).unlink()
    said = r"training checkpoint holds weights alone: name" if file.endswith("json") else r"checkpoint of a training"
    with pytest.raises(ClearError, match=rf"{file} is missing.*{said}.*of the model") as refused:
        load_bagel(folder)
    assert "Convert" not in str(refused.value) and "convert" not in str(refused.value)
    assert file.endswith("json") or all(name in str(refused.value) for name in TRAINING)


def test_a_missing_shard_is_named(folder):
    name = _shard(folder)[KEY]
    (folder / name).unlink()
    with pytest.raises(ClearError, match=rf"{name} is missing"):
        load_bagel(folder)


def test_shards_without_their_index_are_refused(folder):
    _shard(folder)
    (folder / INDEX).unlink()
    with pytest.raises(ClearError, match=r"model\.safetensors\.index\.json is missing"):
        load_bagel(folder)


@pytest.mark.parametrize("content", [{}, {"weight_map": {"a": "../elsewhere.safetensors"}}, {"weight_map": {"a": 1}}])
def test_an_index_that_maps_nothing_is_refused(folder, content):
    _shard(folder)
    (folder / INDEX).write_text(json.dumps(content))
    with pytest.raises(ClearError, match="weight_map"):
        load_bagel(folder)


def test_an_index_of_another_model_is_refused(folder):
    places = _shard(folder)
    places |= {"promised.weight": places[KEY], "surplus.weight": places.pop(KEY)}
    _edit(folder / places["surplus.weight"], lambda state: state.update({"surplus.weight": torch.zeros(2, 7)}))
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ClearError) as refused:
        load_bagel(folder)
    said = str(refused.value)
    assert INDEX in said and "3 problems" in said and f"key {KEY} (32, 32) is missing" in said
    assert "key surplus.weight (2, 7) is not part of this model" in said
    assert f"key promised.weight (which {places['promised.weight']} does not hold) is not part" in said


def test_a_shard_that_lacks_what_the_index_promises_is_named(folder):
    name = _shard(folder)[KEY]
    _edit(folder / name, lambda state: state.pop(KEY))
    with pytest.raises(ClearError, match=rf"{name}.*q_proj_moe_gen.*missing"):
        load_bagel(folder)


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


@pytest.mark.parametrize(
    ("file", "key"),
    [(MODEL, KEY), (MODEL, "vit_pos_embed.pos_embed"), (VAE, "decoder.conv_out.bias"), (BRIDGE, "fc2.weight")],
)
def test_a_missing_key_is_named_with_the_expected_shape(folder, file, key):
    shape = tuple(load_file(folder / file)[key].shape)
    _edit(folder / file, lambda state: state.pop(key))
    with pytest.raises(ClearError, match=rf"{file}: key {key} {re.escape(str(shape))} is missing"):
        load_bagel(folder)


@pytest.mark.parametrize("file", [MODEL, VAE, BRIDGE])
def test_an_extra_key_is_named_with_the_found_shape(folder, file):
    _edit(folder / file, lambda state: state.update({"surplus.weight": torch.zeros(2, 7)}))
    with pytest.raises(ClearError, match=rf"{file}: key surplus\.weight \(2, 7\) is not part"):
        load_bagel(folder)


@pytest.mark.parametrize(("file", "key"), [(MODEL, KEY), (VAE, "encoder.conv_in.weight"), (BRIDGE, "mix.weight")])
def test_a_wrong_shape_is_named_with_both_shapes(folder, file, key):
    shape = tuple(load_file(folder / file)[key].shape)
    _edit(folder / file, lambda state: state.update({key: state[key][1:].clone()}))
    with pytest.raises(ClearError) as refused:
        load_bagel(folder)
    found = (shape[0] - 1, *shape[1:])
    assert f"{file}: key {key} has shape {found}, the configs say {shape}" in str(refused.value)


def test_all_problems_of_a_file_are_in_one_message(folder):
    def spoil(state):
        for key in [key for key in state if "mlp_moe_gen" in key]:
            del state[key]
        state["surplus.weight"] = torch.zeros(2)
        state["vae2llm.bias"] = torch.zeros(5)

    _edit(folder / MODEL, spoil)
    with pytest.raises(ClearError) as refused:
        load_bagel(folder)
    said = str(refused.value)
    assert "8 problems" in said and "and 3 more" in said and said.count("mlp_moe_gen") == 5


@pytest.mark.parametrize("stated", [2, 8])
def test_a_wrong_max_latent_size_is_refused_with_the_right_one(folder, stated):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"max_latent_size": stated}))
    with pytest.raises(ClearError) as refused:
        load_bagel(folder)
    said = str(refused.value)
    assert "latent_pos_embed.pos_embed has shape (16, 32)" in said and f"({stated**2}, 32)" in said
    assert "set max_latent_size to 4 in config.json" in said


def test_a_convolution_patch_embedding_is_refused_with_the_remedy(folder):
    key = "vit_model.vision_model.embeddings.patch_embedding.weight"
    _edit(folder / MODEL, lambda state: state.update({key: state[key].reshape(-1, 3, 4, 4)}))
    with pytest.raises(ClearError, match=r"permute\(0, 2, 3, 1\)"):
        load_bagel(folder)


def test_quantised_weights_are_refused(folder):
    _edit(folder / MODEL, lambda state: state.update({KEY: state[KEY].to(torch.int8)}))
    with pytest.raises(ClearError, match=r"q_proj_moe_gen.*I8.*bfloat16"):
        load_bagel(folder)


@pytest.mark.parametrize("file", [MODEL, VAE, TOKENIZER, "config.json"])
def test_a_git_lfs_pointer_is_refused(folder, file):
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 29200000000\n")
    with pytest.raises(ClearError, match=rf"{file} is .*a git-lfs pointer.*git lfs pull"):
        load_bagel(folder)


def test_a_pickle_in_place_of_the_weights_is_refused(folder):
    state = load_file(folder / MODEL)
    (folder / MODEL).unlink()
    torch.save(state, folder / "ema.pt")
    with pytest.raises(ClearError, match=r"ema\.safetensors is missing; ema\.pt is a pickle.*convert"):
        load_bagel(folder)
    (folder / "ema.pt").rename(folder / MODEL)
    with pytest.raises(ClearError, match=r"ema\.safetensors is not safetensors but a pickle"):
        load_bagel(folder)


@pytest.mark.parametrize("name", ["ema.safetensors.incomplete", ".cache/huggingface/download/abc.incomplete"])
def test_an_unfinished_download_is_refused(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / MODEL).rename(folder / name)
    with pytest.raises(ClearError, match=r"ema\.safetensors is missing: the folder is half-written"):
        load_bagel(folder)


def test_the_header_tells_shapes_and_types_without_the_data():
    entries = read_header(GOLDEN / MODEL)
    assert {key: (entry.shape, entry.kind) for key, entry in entries.items()} == {
        key: (tuple(value.shape), "F32") for key, value in load_file(GOLDEN / MODEL).items()
    }


@pytest.mark.parametrize("file", [MODEL, VAE, BRIDGE])
@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.999])
def test_a_truncated_file_is_named(folder, file, keep):
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(ClearError, match=rf"{file} is truncated"):
        load_bagel(folder)


@pytest.mark.parametrize("file", [MODEL, VAE, BRIDGE, "llm_config.json", "vit_config.json"])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(ClearError, match=rf"{file} is missing"):
        load_bagel(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ClearError, match="nowhere"):
        load_bagel(tmp_path / "nowhere")


@pytest.mark.parametrize("marker", ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"])
def test_a_tokenizer_without_a_marker_is_refused(folder, marker):
    raw = json.loads(word_tokenizer(WORDS).to_str())
    raw["model"]["vocab"]["another"] = raw["model"]["vocab"].pop(marker)
    (folder / TOKENIZER).write_text(json.dumps(raw))
    with pytest.raises(ClearError) as refused:
        load_bagel(folder)
    assert TOKENIZER in str(refused.value) and marker in str(refused.value)


def test_neither_tokenizer_nor_markers_is_refused(folder):
    (folder / TOKENIZER).unlink()
    content = json.loads((folder / "config.json").read_text())
    del content["special_tokens"]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ClearError, match="special_tokens"):
        load_bagel(folder)


def test_a_config_that_is_no_json_is_named(folder):
    (folder / "llm_config.json").write_text('{"hidden_size": ')
    with pytest.raises(ClearError, match=r"llm_config\.json is not JSON"):
        load_bagel(folder)


def test_a_config_of_another_size_is_refused_by_key_and_shape(folder):
    content = json.loads((folder / "llm_config.json").read_text())
    (folder / "llm_config.json").write_text(json.dumps(content | {"intermediate_size": 96}))
    with pytest.raises(ClearError, match=r"mlp.*\(64, 32\)|mlp.*\(32, 64\)"):
        load_bagel(folder)


def test_a_tokenizer_of_another_model_is_refused(folder):
    raw = json.loads(word_tokenizer(WORDS).to_str())
    vocabulary = raw["model"]["vocab"]
    vocabulary[MARKERS[0]], vocabulary[MARKERS[1]] = vocabulary[MARKERS[1]], vocabulary[MARKERS[0]]
    (folder / TOKENIZER).write_text(json.dumps(raw))
    with pytest.raises(ClearError, match="belongs to another model"):
        load_bagel(folder)
