"""The codes of quantised weights: nearest values, error and size, refusals, and that bitsandbytes reads the same."""

import pytest
import torch
import torch.nn.functional as F

from clear.errors import ClearError
from clear.model import quantised

KINDS = list(quantised.KINDS)


@pytest.mark.parametrize("shape", [(64, 128), (5, 13), (3, 64), (700, 100), (1100, 1000)])
def test_every_nf4_weight_is_the_nearest_value_of_its_block(shape):
    """(1100, 1000) has more weights than are coded at once, and its last block and group are not full."""
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.rand(shape[0], 1)
    weight[0] = 0
    held = quantised.encode("nf4", weight)
    assert {k: (tuple(v.shape), v.dtype) for k, v in held.items()} == quantised.parts("nf4", *shape)
    found = quantised.decode("nf4", held, *shape, torch.float32)
    assert found.shape == weight.shape and not found[0].any()
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    scales = quantised._decode_scales(held["scale"], held["scale_range"])[:, None]
    assert (scales - largest).abs().max() <= largest.max() / 255, "of a scale at most half a step of its group is lost"
    nearest = ((blocks[..., None] / scales.clamp_min(1e-30)[..., None]) - quantised._CODES).abs().argmin(-1)
    expected = (quantised._CODES[nearest] * scales).flatten()[: weight.numel()].view(shape)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    rounded = quantised.decode("nf4", held, *shape, torch.bfloat16)
    assert torch.equal(rounded, found.to(torch.bfloat16)), "rounded once"


@pytest.mark.parametrize(("kind", "error", "bits"), [("nf4", (0.090, 0.094), 4.13), ("int8", (0.007, 0.010), 8.02)])
def test_the_error_and_the_size_of_normal_weights(kind, error, bits):
    torch.manual_seed(0)
    weight = torch.randn(1024, 2048) * 0.02
    held = quantised.encode(kind, weight)
    found = quantised.decode(kind, held, *weight.shape, torch.float32)
    assert error[0] < (found - weight).norm() / weight.norm() < error[1]
    assert sum(value.nbytes for value in held.values()) == quantised.size(kind, *weight.shape)
    assert 8 * quantised.size(kind, *weight.shape) / weight.numel() == pytest.approx(bits, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(kind, value):
    weight = torch.randn(8, 64)
    weight[3, 5] = value
    with pytest.raises(ClearError, match=r"a\.weight holds values that are not finite; fetch"):
        quantised.encode(kind, weight, "a.weight")


def test_bitsandbytes_reads_the_same_weights():
    """Its kernels decode on CUDA what torch decodes here: the packed order, the sixteen values, the rounding."""
    bnb = pytest.importorskip("bitsandbytes")
    for shape in ((512, 512), (96, 64)):
        weight = torch.randn(shape)
        held = quantised.encode("nf4", weight)
        for dtype in (torch.float32, torch.bfloat16):
            state = quantised._library_state(held, *shape, dtype)
            found = bnb.functional.dequantize_4bit(held["weight"].view(-1, 1), state)
            assert torch.equal(found, quantised.decode("nf4", held, *shape, dtype))
            one = torch.randn(1, shape[1]).to(dtype)
            torch.testing.assert_close(quantised._library_row(held, one, shape[0]), F.linear(one, found))
