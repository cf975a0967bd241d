"""From encoded images to model inputs: sizes, normalisation, patches, and images that are not whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clear.config import compose, from_dict
from clear.data.images import encode_image
from clear.errors import ClearError
from clear.model import images
from clear.model.images import (
    MAX_PIXELS,
    ImageBank,
    posterior_generator,
    resize,
    target_size,
    to_uint8,
    vae_array,
    vit_array,
    vit_patches,
)
from clear.model.tokenizer import word_tokenizer
from clear.model.vae import AutoEncoder, VaeConfig, patchify, unpatchify
from clear.training.build import bagel_config, scene_words

SIDE = st.integers(1, 8000)


@pytest.fixture(scope="module")
def size():
    """Shapes of the smallest profile, with inputs large enough for images of different grids."""
    model = from_dict(compose(["profile=smoke", "model.vae_min=16", "model.vit_min=16"])).model
    assert (model.vae_size, model.vit_size, model.vit_patch) == (48, 48, 8)
    return model


def _image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(height=SIDE, width=SIDE, stride=st.sampled_from([8, 14, 16, 28]), long=st.integers(1, 64), data=st.data())
def test_target_size_is_whole_strides_within_the_caps(height, width, stride, long, data):
    max_side = long * stride
    min_side = data.draw(st.integers(1, max_side))
    for side in target_size(height, width, max_side, min_side, stride):
        assert isinstance(side, int) and side % stride == 0
        assert stride <= side <= max_side


@given(height=SIDE, width=SIDE)
def test_the_pixel_cap_holds_up_to_the_rounding(height, width):
    h, w = target_size(height, width, 4096, 224, 14)
    # Each side is rounded to whole px and to the nearest stride, or raised to one stride where the image is a line.
    assert (h - 7.5) * (w - 7.5) <= MAX_PIXELS or 14 in (h, w)


@given(height=SIDE, width=SIDE)
def test_target_size_treats_rows_and_columns_alike(height, width):
    assert target_size(height, width, 1024, 512, 16) == target_size(width, height, 1024, 512, 16)[::-1]


@pytest.mark.parametrize(
    ("shape", "vae", "vit"),
    [
        ((480, 640), (512, 688), (392, 518)),  # the short side is raised to 512
        ((1024, 1024), (1024, 1024), (518, 518)),
        ((3000, 2000), (1024, 688), (518, 350)),
        ((100, 100), (512, 512), (224, 224)),
    ],
)
def test_target_size_of_the_published_settings(shape, vae, vit):
    assert target_size(*shape, 1024, 512, 16) == vae
    assert target_size(*shape, 518, 224, 14) == vit


def test_resize_keeps_flat_colours_and_equal_sizes():
    flat = np.full((31, 17, 3), (10, 200, 77), np.uint8)
    found = resize(flat, (48, 24))
    assert found.shape == (48, 24, 3) and found.dtype == np.uint8
    assert (found == (10, 200, 77)).all()
    assert resize(flat, (31, 17)) is flat


def test_resize_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.ptp(resize(stripes, (16, 16))[4:12, 4:12].astype(int)) <= 8, "fine stripes turn grey, not into others"


def test_pixels_survive_the_way_to_a_tensor_and_back():
    array = _image(5, 7)
    tensor = torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1
    assert tensor.shape == (3, 5, 7) and tensor.min() >= -1 and tensor.max() <= 1
    assert (to_uint8(tensor) == array).all()
    beyond = torch.tensor([-2.0, 2.0]).reshape(1, 1, 2).expand(3, -1, -1)
    assert to_uint8(beyond)[0].tolist() == [[0, 0, 0], [255, 255, 255]]


@settings(max_examples=30)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    patch=st.integers(1, 4),
    channels=st.integers(1, 4),
    b=st.integers(1, 2),
)
def test_unpatchify_inverts_patchify(rows, columns, patch, channels, b):
    z = torch.arange(b * channels * rows * columns * patch**2).reshape(b, channels, rows * patch, columns * patch)
    tokens = patchify(z, patch)
    assert tokens.shape == (b, rows * columns, patch**2 * channels)
    assert torch.equal(unpatchify(tokens, (rows, columns), patch), z)


def test_patches_run_along_rows_and_features_are_row_column_channel():
    z = torch.tensor(
        [[[[row * 100 + column * 10 + channel for column in range(6)] for row in range(4)] for channel in range(3)]]
    )
    tokens = patchify(z, 2)[0]
    assert tokens[1].tolist() == [20, 21, 22, 30, 31, 32, 120, 121, 122, 130, 131, 132]
    assert tokens[3, 0] == 200, "the second row of patches follows the first"


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("keep", [0, 20, 400])
def test_a_truncated_image_is_named(size, kind, keep):
    whole = encode_image(_image(64, 64), kind)
    assert len(whole) > 400
    with pytest.raises(ClearError, match="scene-17"):
        ImageBank([whole, whole[:keep]], size, ["scene-16", "scene-17"])


def test_without_names_the_number_of_the_bad_image_is_given(size):
    with pytest.raises(ClearError, match="image 0"):
        ImageBank([b"not an image"], size)


def test_a_bank_of_different_grids(size):
    shapes = [(64, 64), (64, 32), (24, 72), (64, 64)]
    arrays = [_image(*shape, seed=i) for i, shape in enumerate(shapes)]
    bank = ImageBank([encode_image(a) for a in arrays], size)
    torch.manual_seed(0)
    vae = AutoEncoder(VaeConfig(8, tuple(size.vae_mult), 1, 4, 4)).eval()
    bank.encode(vae)
    assert len(bank) == 4
    assert [bank.latent_grid(i) for i in range(4)] == [(6, 6), (6, 3), (2, 6), (6, 6)]
    for i in range(4):
        rows, columns = bank.latent_grid(i)
        assert bank.latents[i].shape == (rows * columns, 4)
        assert bank.pixels(i).shape == (3, rows * bank.latent_stride, columns * bank.latent_stride)
        assert (bank.uint8(i) == to_uint8(bank.pixels(i))).all()
        assert bank.patches(i).shape == (bank.vit_grid(i)[0] * bank.vit_grid(i)[1], 3 * size.vit_patch**2)
        alone = patchify(vae.encode(bank.pixels(i)[None]), size.latent_patch)[0].detach()
        torch.testing.assert_close(bank.latents[i], alone, atol=1e-5, rtol=0)
    assert not torch.equal(bank.latents[0], bank.latents[3]), "images of one size keep their order"


def _vae(size):
    torch.manual_seed(0)
    return AutoEncoder(VaeConfig(8, tuple(size.vae_mult), 1, 4, 4)).eval()


def test_a_sampled_posterior_depends_on_the_image_alone(size):
    arrays = [_image(64, 64, seed) for seed in range(3)]
    encoded, vae = [encode_image(a) for a in arrays], _vae(size)
    sampled = ImageBank(encoded, replace(size, posterior="sample")).encode(vae)
    again = ImageBank(encoded[::-1], replace(size, posterior="sample")).encode(vae)
    mean = ImageBank(encoded, size).encode(vae)
    noises = []
    for i in range(3):
        torch.testing.assert_close(sampled.latents[i], again.latents[2 - i], atol=1e-5, rtol=0)
        noise = torch.randn(
            1, 4, 6, 6, generator=posterior_generator(torch.from_numpy(sampled.uint8(i)).permute(2, 0, 1))
        )
        with torch.no_grad():
            expected = patchify(vae.encode(sampled.pixels(i)[None], noise), size.latent_patch)[0]
        torch.testing.assert_close(sampled.latents[i], expected, atol=1e-5, rtol=0)
        assert (sampled.latents[i] - mean.latents[i]).abs().max() > 1e-2
        noises.append(noise)
    assert not torch.equal(noises[0], noises[1])


def test_the_reference_way_to_the_vision_tower_resizes_twice(size):
    array = _image(90, 60)
    direct = ImageBank([encode_image(array)], replace(size, vit_size=32))
    twice = ImageBank([encode_image(array)], replace(size, vit_size=32, resize="reference"))
    assert torch.equal(direct.pixels(0), twice.pixels(0))
    once = vit_array(array, direct.size)
    assert (resize(array, once.shape[:2]) == once).all()
    assert (vit_array(array, twice.size) == resize(vae_array(array, size), (32, 24))).all()
    assert twice.vit_grid(0) == (4, 3)
    assert not torch.equal(direct.patches(0)[:1], twice.patches(0)[:1])
    patches, grid = vit_patches(array, twice.size)
    assert grid == twice.vit_grid(0) and torch.equal(patches, twice.patches(0))


@pytest.mark.parametrize("way", ["direct", "reference"])
def test_paired_patches_stand_on_the_latent_grid(size, way, monkeypatch):
    arrays = [_image(64, 32), _image(48, 48, 1)]
    bank = ImageBank([encode_image(a) for a in arrays], replace(size, vit_size=24, resize=way))
    for i, array in enumerate(arrays):
        grid = bank.latent_grid(i)
        assert grid != bank.vit_grid(i)
        source = vae_array(array, size) if way == "reference" else array
        expected = torch.from_numpy(resize(source, (grid[0] * 8, grid[1] * 8)).copy()).permute(2, 0, 1)
        assert torch.equal(bank.paired_patches(i), patchify(expected[None].float() / 127.5 - 1, 8)[0])
    kept = bank.paired_patches(0)
    monkeypatch.setattr("clear.model.images.decode_image", None)
    assert torch.equal(bank.paired_patches(0), kept), "made once and kept"


def test_equal_grids_need_no_second_copy(size):
    bank = ImageBank([encode_image(_image(64, 64))], size)
    assert bank.latent_grid(0) == bank.vit_grid(0)
    assert torch.equal(bank.paired_patches(0), bank.patches(0))


def test_a_latent_grid_beyond_the_position_table_is_refused(size):
    bank = ImageBank([encode_image(_image(64, 64))], replace(size, vit_size=16, vit_side=2), ["photo-1"])
    with pytest.raises(ClearError, match=r"photo-1: .*6 x 6 .*model.vit_side = 2"):
        bank.paired_patches(0)


@pytest.mark.parametrize("kept", [0, 10_000, 10**6])
def test_a_bank_without_room_gives_the_same_as_one_that_keeps_all(size, monkeypatch, kept):
    size, vae = replace(size, vit_size=24, vit_side=6, posterior="sample"), _vae(size)
    encoded = [encode_image(_image(*shape)) for shape in ((64, 64), (64, 96), (32, 64))]
    whole = ImageBank(encoded, size).encode(vae)
    monkeypatch.setattr(images, "KEPT_BYTES", kept)
    bank = ImageBank(encoded, size).encode(vae)
    for i in range(3):
        assert bank.vit_grid(i) == whole.vit_grid(i) and bank.latent_grid(i) == whole.latent_grid(i)
        for name in ("pixels", "patches", "paired_patches"):
            assert torch.equal(getattr(bank, name)(i), getattr(whole, name)(i)), name
        assert np.array_equal(bank.uint8(i), whole.uint8(i)) and torch.equal(bank.latents[i], whole.latents[i])
    held = {id(t): t.nbytes for t in (*(t for pair in bank._kept.values() for t in pair), *bank._paired.values())}
    assert sum(held.values()) <= kept and len(bank._kept) == {0: 0, 10_000: 1, 10**6: 3}[kept]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_latent_size", 32),
        ("vit_side", 5),
        ("vit_patch", 4),
        ("latent_patch", 2),
        ("vae_mult", [1, 2]),
        ("vae_z", 4),
    ],
)
def test_a_model_that_cuts_images_otherwise_is_refused(name, value):
    config = from_dict(compose(["profile=smoke"]))
    model = bagel_config(config, word_tokenizer(scene_words()))
    images.check_geometry(config.model, model, "data/models/base")
    found = getattr(config.model, name)
    with pytest.raises(ClearError) as error:
        images.check_geometry(replace(config.model, **{name: value}), model, "data/models/base")
    assert f"data/models/base: params have model.{name} = {value}, the model there has {found}" in str(error.value)
