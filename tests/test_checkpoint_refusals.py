"""A wrong, broken or unfinished model folder is refused by name."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from clear.errors import ClearError
from clear.model.checkpoint import (
    BRIDGE,
    INDEX,
    MODEL,
    TOKENIZER,
    VAE,
    load_bagel,
    read_config,
)
from clear.model.tokenizer import MARKERS, word_tokenizer
from clear.model.vae import VaeConfig
from tests.helpers.model_folders import KEY, edit, save_tiny, shard
from tests.tiny import WORDS


@pytest.fixture
def folder(tmp_path):
    """A complete folder of a model with the mlp bridge."""
    save_tiny(tmp_path / "model", "mlp")
    return tmp_path / "model"


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
    name = shard(folder)[KEY]
    (folder / name).unlink()
    with pytest.raises(ClearError, match=rf"{name} is missing"):
        load_bagel(folder)


def test_shards_without_their_index_are_refused(folder):
    shard(folder)
    (folder / INDEX).unlink()
    with pytest.raises(ClearError, match=r"model\.safetensors\.index\.json is missing"):
        load_bagel(folder)


@pytest.mark.parametrize("content", [{}, {"weight_map": {"a": "../elsewhere.safetensors"}}, {"weight_map": {"a": 1}}])
def test_an_index_that_maps_nothing_is_refused(folder, content):
    shard(folder)
    (folder / INDEX).write_text(json.dumps(content))
    with pytest.raises(ClearError, match="weight_map"):
        load_bagel(folder)


def test_an_index_of_another_model_is_refused(folder):
    places = shard(folder)
    places |= {"promised.weight": places[KEY], "surplus.weight": places.pop(KEY)}
    edit(folder / places["surplus.weight"], lambda state: state.update({"surplus.weight": torch.zeros(2, 7)}))
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ClearError) as refused:
        load_bagel(folder)
    said = str(refused.value)
    assert INDEX in said and "3 problems" in said and f"key {KEY} (32, 32) is missing" in said
    assert "key surplus.weight (2, 7) is not part of this model" in said
    assert f"key promised.weight (which {places['promised.weight']} does not hold) is not part" in said


def test_a_shard_that_lacks_what_the_index_promises_is_named(folder):
    name = shard(folder)[KEY]
    edit(folder / name, lambda state: state.pop(KEY))
    with pytest.raises(ClearError, match=rf"{name}.*q_proj_moe_gen.*missing"):
        load_bagel(folder)


@pytest.mark.parametrize(
    ("file", "key"),
    [(MODEL, KEY), (MODEL, "vit_pos_embed.pos_embed"), (VAE, "decoder.conv_out.bias"), (BRIDGE, "fc2.weight")],
)
def test_a_missing_key_is_named_with_the_expected_shape(folder, file, key):
    shape = tuple(load_file(folder / file)[key].shape)
    edit(folder / file, lambda state: state.pop(key))
    with pytest.raises(ClearError, match=rf"{file}: key {key} {re.escape(str(shape))} is missing"):
        load_bagel(folder)


@pytest.mark.parametrize("file", [MODEL, VAE, BRIDGE])
def test_an_extra_key_is_named_with_the_found_shape(folder, file):
    edit(folder / file, lambda state: state.update({"surplus.weight": torch.zeros(2, 7)}))
    with pytest.raises(ClearError, match=rf"{file}: key surplus\.weight \(2, 7\) is not part"):
        load_bagel(folder)


@pytest.mark.parametrize(("file", "key"), [(MODEL, KEY), (VAE, "encoder.conv_in.weight"), (BRIDGE, "mix.weight")])
def test_a_wrong_shape_is_named_with_both_shapes(folder, file, key):
    shape = tuple(load_file(folder / file)[key].shape)
    edit(folder / file, lambda state: state.update({key: state[key][1:].clone()}))
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

    edit(folder / MODEL, spoil)
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
    edit(folder / MODEL, lambda state: state.update({key: state[key].reshape(-1, 3, 4, 4)}))
    with pytest.raises(ClearError, match=r"permute\(0, 2, 3, 1\)"):
        load_bagel(folder)


def test_quantised_weights_are_refused(folder):
    edit(folder / MODEL, lambda state: state.update({KEY: state[KEY].to(torch.int8)}))
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


@pytest.mark.parametrize(
    "changed",
    [{"shape": ["a", 32]}, {"shape": [-4, 32]}, {"shape": [2.5, 32]}, {"dtype": 5}, {"data_offsets": [0.5, 2]}],
)
def test_a_header_with_what_is_no_tensor_is_refused(folder, changed):
    """The first one reached a square root."""
    key = "vit_pos_embed.pos_embed"
    content = (folder / MODEL).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[key] |= changed
    made = json.dumps(header).encode()
    (folder / MODEL).write_bytes(len(made).to_bytes(8, "little") + made + content[8 + length :])
    with pytest.raises(ClearError, match=r"ema\.safetensors is not safetensors \(header: .* is no tensor"):
        load_bagel(folder)


@pytest.mark.parametrize("name", ["ema.safetensors.incomplete", ".cache/huggingface/download/abc.incomplete"])
def test_an_unfinished_download_is_refused(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / MODEL).rename(folder / name)
    with pytest.raises(ClearError, match=r"ema\.safetensors is missing: the folder is half-written"):
        load_bagel(folder)


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


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("llm_config.json", {"num_attention_heads": 0}, r"num_attention_heads = 0, expected a whole number from 1 to"),
        ("llm_config.json", {"hidden_size": "48"}, "hidden_size = '48', expected a whole number"),
        ("llm_config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000, expected .* to 1000;"),
        ("llm_config.json", {"vocab_size": None}, "vocab_size = None"),
        ("llm_config.json", {"num_attention_heads": 5}, "must divide by twice num_attention_heads 5"),
        ("llm_config.json", {"rope_theta": float("nan")}, "rope_theta = nan, expected a number above 0"),
        ("vit_config.json", {"patch_size": 0}, "patch_size = 0"),
        ("vit_config.json", {"num_hidden_layers": 1}, "num_hidden_layers = 1, expected a whole number from 2"),
        ("vit_config.json", {"num_attention_heads": 7}, "must divide by num_attention_heads 7"),
        ("config.json", {"latent_patch_size": True}, "latent_patch_size = True"),
        ("config.json", {"bridge": "linear"}, "bridge = 'linear', expected direct or mlp"),
        ("config.json", {"vae_config": []}, r"vae_config = \[\], expected an object"),
        ("vae_config.json", {"ch_mult": [1, 0]}, r"ch_mult\[1\] = 0"),
        ("vae_config.json", {"ch_mult": 4}, "ch_mult = 4, expected a list"),
        ("vae_config.json", {"groups": 7}, "must divide by groups 7"),
        ("vae_config.json", {"scale_factor": 0.0}, r"scale_factor = 0\.0, expected a number above 0"),
    ],
)
def test_shapes_that_no_model_has_are_refused_by_name(folder, file, change, said):
    stated = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(stated | change))
    with pytest.raises(ClearError, match=said) as error:
        load_bagel(folder)
    assert file in str(error.value) and "\n" not in str(error.value)


def _stating(folder, file, change) -> None:
    """Values of a config file of the folder changed; a value `...` takes its key out."""
    path = folder / file
    stated = (json.loads(path.read_text()) if path.exists() else {}) | change
    path.write_text(json.dumps({key: value for key, value in stated.items() if value is not ...}))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("llm_config.json", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "factor.* null alone is implemented"),
        ("llm_config.json", {"tie_word_embeddings": True}, "tie_word_embeddings = true, and false alone"),
        ("llm_config.json", {"qk_norm": False}, "qk_norm = false, and true alone"),
        ("llm_config.json", {"hidden_act": "gelu"}, 'hidden_act = "gelu", and "silu" alone is implemented'),
        ("llm_config.json", {"use_sliding_window": True}, "use_sliding_window = true, and false alone"),
        ("llm_config.json", {"qk_norm": False, "hidden_act": "relu"}, "2 problems: hidden_act.*; qk_norm = false"),
        ("vit_config.json", {"hidden_act": "gelu"}, 'hidden_act = "gelu", and "gelu_pytorch_tanh" alone'),
        ("vit_config.json", {"layer_norm_eps": 1e-5}, "layer_norm_eps = 1e-05, and 1e-06 alone"),
        ("vae_config.json", {"scale_factor": ...}, "scale_factor missing beside the autoencoder's shapes; add"),
        ("vae_config.json", {"scale_factor": ..., "shift_factor": ...}, "scale_factor and shift_factor missing"),
        ("config.json", {"bridge": ...}, r"key bridge is missing, so that .*bridge\.safetensors would not be used"),
    ],
)
def test_what_is_not_implemented_is_refused_and_not_ignored(folder, file, change, said):
    load_bagel(folder)
    _stating(folder, file, change)
    with pytest.raises(ClearError, match=said) as error:
        load_bagel(folder)
    assert file in str(error.value) and "\n" not in str(error.value)


def test_the_shapes_of_another_autoencoder_within_config_json_need_its_factors(folder):
    stated = json.loads((folder / "vae_config.json").read_text())
    (folder / "vae_config.json").unlink()
    _stating(folder, "config.json", {"vae_config": stated})
    load_bagel(folder)
    del stated["scale_factor"]
    _stating(folder, "config.json", {"vae_config": stated})
    with pytest.raises(ClearError, match="scale_factor missing"):
        load_bagel(folder)


def test_a_trained_bridge_beside_weights_alone_is_not_dropped(folder, tmp_path):
    save_tiny(tmp_path / "base", "direct")
    weights = tmp_path / "weights"
    weights.mkdir()
    (folder / MODEL).rename(weights / MODEL)
    load_bagel(weights, base=tmp_path / "base")
    (folder / BRIDGE).rename(weights / BRIDGE)
    with pytest.raises(ClearError, match=r"base/config\.json: bridge = direct, so that .*weights/bridge\.safetensors"):
        load_bagel(weights, base=tmp_path / "base")


def test_what_published_folders_state_beside_is_read_as_before(folder):
    """BAGEL-7B-MoT's own values, those of Qwen2's and SigLIP's tools, and config.json, which the reference ignores."""
    llm = {"hidden_act": "silu", "tie_word_embeddings": False, "qk_norm": True, "rope_scaling": None}
    llm |= {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28, "use_cache": True}
    _stating(folder, "llm_config.json", llm | {"layer_module": "Qwen2MoTDecoderLayer", "attention_dropout": 0.0})
    _stating(folder, "vit_config.json", {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_channels": 3})
    _stating(folder, "config.json", {"interpolate_pos": True, "vae_config": {"z_channels": 16, "downsample": 8}})
    load_bagel(folder)
    _stating(folder, "llm_config.json", {"rope_scaling": {"rope_type": "default"}})  # of transformers' newer versions
    load_bagel(folder)


def test_a_published_autoencoder_needs_no_factors(folder):
    """Without vae_config.json the autoencoder is FLUX's, whose shapes config.json may repeat."""
    for kept in ({}, {"vae_config": {"z_channels": 16, "downsample": 8, "ch_mult": [1, 2, 4, 4]}}):
        (folder / "vae_config.json").unlink(missing_ok=True)
        _stating(folder, "config.json", kept)
        assert read_config(folder).vae == VaeConfig()


def test_a_leftover_bridge_of_a_folder_that_says_direct_is_not_in_the_way(folder):
    """As early versions left one where a model without it was saved over one with it."""
    _stating(folder, "config.json", {"bridge": "direct"})
    assert load_bagel(folder)[0].config.bridge == "direct"
