"""Folders of adapters: the same model back, merged or not; another base and broken files are refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from clear.config import compose, from_dict
from clear.errors import ClearError
from clear.model import lora
from clear.model.checkpoint import MODEL, PLAIN, fingerprint, load_bagel, save_bagel
from clear.model.checkpoint import format as folder_format
from clear.model.tokenizer import encode
from clear.model.vae import AutoEncoder
from clear.training.load import incoming, save
from tests.helpers.adapters import PAIRS, TEXTS, adapted, adapter_folders, batch, outputs, qwen_folder
from tests.tiny import SIZES, tiny_model


@pytest.fixture
def folders(tmp_path):
    """A folder with weights and one with an adapter on them; also the adapted model itself."""
    return adapter_folders(tmp_path)


@pytest.fixture
def config():
    return from_dict(compose(["profile=smoke", "runtime.device=cpu", "lora.rank=2", "lora.alpha=4", *SIZES]))


def test_a_folder_gives_the_same_model_back_and_peft_reads_it_too(folders):
    base, folder, model, tokenizer = folders
    assert {p.name for p in folder.iterdir()} == {lora.ADAPTER, lora.ADAPTER_CONFIG, lora.BASE}
    given = batch(tokenizer)
    again, _, loaded = lora.load_model(folder)
    assert loaded.get_vocab() == tokenizer.get_vocab() and not again.training
    assert all(torch.equal(a, b) for a, b in zip(outputs(again, given), outputs(model, given), strict=True))
    peft = PeftModel.from_pretrained(load_bagel(base)[0], str(folder)).base_model.model.eval()
    assert all(torch.equal(a, b) for a, b in zip(outputs(peft, given), outputs(model, given), strict=True))


def test_a_folder_with_a_bridge_gives_it_back(tmp_path):
    plain, tokenizer = tiny_model("direct")
    save_bagel(tmp_path / "base", plain, AutoEncoder(plain.config.vae), tokenizer)
    model, _ = adapted("mlp")
    files = fingerprint(tmp_path / "base")
    lora.save_adapter(tmp_path / "a", model, tmp_path / "base", files, torch.float32)
    again, _, _ = lora.load_model(tmp_path / "a")
    assert again.config.bridge == "mlp"
    assert all(torch.equal(v, model.bridge.state_dict()[k]) for k, v in again.bridge.state_dict().items())


def test_merged_weights_give_the_outputs_of_base_and_adapter(folders, tmp_path):
    _, folder, model, tokenizer = folders
    lora.merge(folder, tmp_path / "merged", torch.float32)
    merged, _, _ = load_bagel(tmp_path / "merged")
    given = batch(tokenizer)
    for found, expected in zip(outputs(merged, given), outputs(model, given), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    with pytest.raises(ClearError, match="not empty"):
        lora.merge(folder, tmp_path / "merged", torch.float32)
    with pytest.raises(ClearError, match="holds no adapter"):
        lora.merge(tmp_path / "merged", tmp_path / "again", torch.float32)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_the_command_merges_onto_weights_that_have_moved(folders, tmp_path, clear, weights):
    base, folder, model, tokenizer = folders
    base.rename(tmp_path / "moved")
    status, _, stderr = clear("merge", folder, tmp_path / "merged", "--weights", weights)
    assert status == 1 and "which is not here" in stderr and not (tmp_path / "merged").exists()
    asked = ("merge", folder, tmp_path / "merged", "--base", tmp_path / "moved", "--weights", weights)
    status, stdout, _ = clear(*asked)
    assert (status, stdout) == (0, f"{tmp_path / 'merged'} written.\n") and not lora.is_adapter(tmp_path / "merged")
    assert {v.dtype for v in load_file(tmp_path / "merged" / MODEL).values()} == {getattr(torch, weights)}
    merged, _, loaded = load_bagel(tmp_path / "merged")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    given, close = batch(tokenizer), (2e-5, 1e-5) if weights == "float32" else (0.1, 0.05)
    for found, expected in zip(outputs(merged, given), outputs(model, given), strict=True):
        torch.testing.assert_close(found, expected, atol=close[0], rtol=close[1])
    status, _, stderr = clear(*asked)
    assert status == 1 and "not empty" in stderr


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_sums_on_bfloat16_weights_are_made_in_float32_and_rounded_once(tmp_path, kind):
    model, tokenizer = tiny_model("direct")
    save_bagel(tmp_path / "base", model.to(torch.bfloat16), AutoEncoder(model.config.vae), tokenizer)
    model, _ = adapted()
    lora.save_adapter(tmp_path / "a", model, tmp_path / "base", fingerprint(tmp_path / "base"), torch.float32)
    base, wide = load_file(tmp_path / "base" / MODEL), lora.load_model(tmp_path / "a", torch.float32)[0]
    lora.merge(tmp_path / "a", tmp_path / "merged", kind)
    found = load_file(tmp_path / "merged" / MODEL)
    deltas = {name + ".weight": layer.get_delta_weight(lora.TRAINED) for name, layer in lora._layers(wide)}
    assert deltas and found.keys() == base.keys()
    for key, value in base.items():
        assert torch.equal(found[key], (value.float() + deltas.get(key, 0.0)).to(kind)), key


@pytest.mark.parametrize("way", ["trained", "merged"])
def test_the_files_of_a_byte_pair_tokenizer_are_kept_for_the_published_code(config, tmp_path, way):
    from transformers import Qwen2Tokenizer

    base, out = tmp_path / "base", tmp_path / "out"
    qwen_folder(base)
    expected = Qwen2Tokenizer.from_pretrained(base)
    config.lora.rank = 2 if way == "merged" else 0
    start = incoming(base, config)
    save(tmp_path / "adapter" if way == "merged" else out, start, config)
    if way == "merged":
        lora.merge(tmp_path / "adapter", out, torch.float32)
    assert {name: (out / name).read_bytes() for name in PAIRS} == {name: (base / name).read_bytes() for name in PAIRS}
    (tmp_path / "pairs").mkdir()
    for name in PAIRS:
        (tmp_path / "pairs" / name).write_bytes((out / name).read_bytes())
    readers = [Qwen2Tokenizer.from_pretrained(folder) for folder in (out, tmp_path / "pairs")]
    for text in TEXTS:
        ids = expected.encode(text)
        assert [reader.encode(text) for reader in readers] == [ids, ids]
        assert encode(load_bagel(out)[2], text) == expected.encode(text, split_special_tokens=True)
    plain, tokenizer = tiny_model("direct")
    save_bagel(out, plain, AutoEncoder(plain.config.vae), tokenizer)
    assert not any((out / name).exists() for name in PAIRS), "another tokenizer takes their place"


def test_another_base_is_refused(folders, tmp_path):
    base, folder, _, _ = folders
    state = load_file(base / MODEL)
    state["llm2vae.bias"] += 1
    save_file(state, base / MODEL)
    with pytest.raises(ClearError, match="is not the file that"):
        lora.load_model(folder)
    with pytest.raises(ClearError, match="not here"):
        lora.load_model(folder, base=tmp_path / "elsewhere")


def test_another_base_of_the_same_size_is_refused_where_files_are_too_large_to_hash(folders, monkeypatch):
    base, _, model, _ = folders
    for module in (folder_format, lora):
        monkeypatch.setattr(module, "HASHED_ON_LOAD", 10_000)
    monkeypatch.setattr(folder_format, "_SAMPLE", 64)
    folder, file = base.parent / "large", base / MODEL
    lora.save_adapter(folder, model, base, fingerprint(base), torch.float32)
    records = json.loads((folder / lora.BASE).read_text())
    assert {name for name, known in records["files"].items() if "samples_sha256" in known} == {MODEL, "ae.safetensors"}
    lora.load_model(folder)

    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    assert header > 100 * 64, "more than the first slice holds"
    for place in (header // 2, (len(whole) - 64) * 31 // 63 + 40, len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        file.write_bytes(changed)
        with pytest.raises(ClearError, match="is not the file that"):
            lora.base_of(folder)
    for known in records["files"].values():
        known.pop("samples_sha256", None)
    (folder / lora.BASE).write_text(json.dumps(records))
    assert lora.base_of(folder) == base, "an adapter of before says the size alone"
    file.write_bytes(whole[:-1])
    with pytest.raises(ClearError, match="is not the file that"):
        lora.base_of(folder)


def test_all_keys_of_a_broken_adapter_are_named_with_their_shapes(folders):
    file = folders[1] / lora.ADAPTER
    state = load_file(file)
    missing, other, *_ = sorted(state)
    shapes = [tuple(state[key].shape) for key in (missing, other)]
    del state[missing]
    state[other] = state[other][:1].contiguous()
    save_file(state | {"surplus.weight": torch.zeros(2, 7)}, file)
    with pytest.raises(ClearError) as refused:
        lora.load_model(folders[1])
    said = str(refused.value)
    assert f"{file}: 3 problems: key {missing} {shapes[0]} is missing; " in said
    assert f"key {other} has shape {(1, *shapes[1][1:])}, the configs say {shapes[1]}; " in said
    assert "key surplus.weight (2, 7) is not part of this model. adapter_config.json, base.json or the base" in said


def test_a_truncated_adapter_is_refused_by_name(folders):
    file = folders[1] / lora.ADAPTER
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ClearError, match=rf"{lora.ADAPTER} is truncated"):
        lora.load_model(folders[1])


def test_an_adapter_says_which_of_several_weight_files_it_adapts(folders, tmp_path):
    base, folder, model, _ = folders
    (base / PLAIN).write_bytes((base / MODEL).read_bytes())
    with pytest.raises(ClearError, match=r"several models' weights"):
        lora.load_model(folder)
    lora.load_model(folder, base=base / MODEL)
    with pytest.raises(ClearError, match=rf"{PLAIN} is not what .* was trained on, but .*{MODEL}"):
        lora.load_model(folder, base=base / PLAIN)
    named = base / PLAIN
    lora.save_adapter(tmp_path / "other", model, named, fingerprint(named), torch.float32)
    lora.load_model(tmp_path / "other")
    lora.merge(tmp_path / "other", tmp_path / "merged", torch.float32)
    assert (tmp_path / "merged" / MODEL).exists()


def test_a_base_file_names_no_more_than_the_base(folders):
    base, folder, _, _ = folders
    known = json.loads((folder / lora.BASE).read_text())
    assert known["folder"] == str(base) and set(known["files"]) == {p.name for p in Path(base).iterdir()}


def test_a_save_that_breaks_leaves_the_old_adapter(folders, tmp_path, monkeypatch):
    """All files are written under temporary names and renamed at the end; a kill between the renames is refused."""
    base, folder = folders[0], tmp_path / "adapter"
    model, _ = adapted()
    lora.save_adapter(folder, model, base, fingerprint(base), torch.float32)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.add_(1.0)
    original = Path.write_text

    def full(self, text):
        if self.name.startswith("base.json"):
            raise OSError("no space left")
        return original(self, text)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space left"):
            lora.save_adapter(folder, model, base, fingerprint(base), torch.float32)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    lora.load_model(folder)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "unlink", lambda self, missing_ok=False: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lora.save_adapter(folder, model, base, fingerprint(base), torch.float32)
    with pytest.raises(ClearError, match="half-written"):
        lora.load_model(folder)
