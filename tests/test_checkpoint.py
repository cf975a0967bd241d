"""Model folders: what is saved is loaded bit for bit, and a wrong or broken folder is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from clear.errors import ClearError
from clear.model.checkpoint import BRIDGE, MODEL, TOKENIZER, VAE, load_bagel, save_bagel
from clear.model.vae import AutoEncoder
from clear.reasoning.tokenizer import word_tokenizer
from tests.tiny import WORDS, tiny_model

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


def test_weights_can_be_loaded_in_another_type(folder):
    model, vae, _ = load_bagel(folder, dtype=torch.bfloat16)
    assert {value.dtype for value in [*model.parameters(), *vae.parameters()]} == {torch.bfloat16}


def test_without_a_tokenizer_the_markers_come_from_the_config(folder):
    (folder / TOKENIZER).unlink()
    model, _, tokenizer = load_bagel(folder)
    assert tokenizer is None and model.config.special.image_end == 3


@pytest.mark.parametrize(
    ("file", "key"),
    [(MODEL, KEY), (MODEL, "vit_pos_embed.pos_embed"), (VAE, "decoder.conv_out.bias"), (BRIDGE, "fc2.weight")],
)
def test_a_missing_key_is_named(folder, file, key):
    _edit(folder / file, lambda state: state.pop(key))
    with pytest.raises(ClearError, match=rf"{file}.*{key}.*missing"):
        load_bagel(folder)


@pytest.mark.parametrize("file", [MODEL, VAE, BRIDGE])
def test_an_extra_key_is_named(folder, file):
    _edit(folder / file, lambda state: state.update({"surplus.weight": torch.zeros(2)}))
    with pytest.raises(ClearError, match=rf"{file}.*surplus\.weight.*not part"):
        load_bagel(folder)


@pytest.mark.parametrize(("file", "key"), [(MODEL, KEY), (VAE, "encoder.conv_in.weight"), (BRIDGE, "mix.weight")])
def test_a_wrong_shape_is_named_with_both_shapes(folder, file, key):
    shape = tuple(load_file(folder / file)[key].shape)
    _edit(folder / file, lambda state: state.update({key: state[key][1:].clone()}))
    with pytest.raises(ClearError) as refused:
        load_bagel(folder)
    said = str(refused.value)
    assert file in said and key in said and str(shape) in said and str((shape[0] - 1, *shape[1:])) in said


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
