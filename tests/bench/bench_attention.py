"""How fast the attention of the language model is on CPU, against torch's fused kernel with the same additive mask.

Forward and backward in the type that `runtime.precision: auto` takes on this processor, at the size of one training
step of the default profile: elsewhere bfloat16 is emulated, and no stage uses it. The allocator is set as in every
stage (`clear.model.runtime`): freed activations are reused instead of paged in anew.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from clear.errors import ClearError
from clear.model import runtime
from clear.model.mot import as_bias, attend

ROWS, HEADS, LENGTH, CHANNELS = 32, 4, 225, 32
IMAGE = slice(20, 58)  # tokens that see each other in both directions, as those of a picture do
WARMUP, REPEATS = 3, 15
KIND = torch.bfloat16 if runtime.has_bfloat16("cpu") else torch.float32


def allowed() -> Tensor:
    """The attention rule (ROWS, LENGTH, LENGTH) of a text with one picture in it."""
    rule = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    rule[IMAGE, IMAGE] = True
    return rule.expand(ROWS, -1, -1)


def autocast() -> torch.autocast:
    """As in training."""
    return torch.autocast("cpu", torch.bfloat16, enabled=KIND is torch.bfloat16)


def seconds(attention: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], gradient: Tensor) -> float:
    """Seconds of one forward and backward; the gradients of the inputs are dropped."""
    start = time.perf_counter()
    with autocast():
        mixed = attention(*inputs)
    mixed.backward(gradient)
    taken = time.perf_counter() - start
    for x in inputs:
        x.grad = None
    return taken


def bench_attention() -> dict[str, dict]:
    """Forward + backward passes per second. Raises ClearError if the two give different values."""
    runtime.tune_allocator()
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, HEADS, LENGTH, CHANNELS)
    draws = [torch.randn(shape, generator=generator).to(KIND) for _ in range(4)]
    inputs, gradient = [x.requires_grad_() for x in draws[:3]], draws[3]
    bias = as_bias(allowed())
    fused_bias = bias.to(KIND)  # the kernel wants the inputs' type; cast once, as the mask of a forward is

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, bias)

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=fused_bias)

    with torch.no_grad(), autocast():
        off = (ours(*inputs).float() - fused(*inputs).float()).abs().max().item()
    if off > 0.05:
        raise ClearError(f"attend differs from scaled_dot_product_attention by {off:.3f}, beyond bfloat16's rounding.")
    pairs = [(seconds(ours, inputs, gradient), seconds(fused, inputs, gradient)) for _ in range(WARMUP + REPEATS)]
    rate, baseline = (1 / statistics.median(p[side] for p in pairs[WARMUP:]) for side in (0, 1))
    return {"attention_cpu": {"value": rate, "unit": "passes/s", "baseline": baseline, "ratio": rate / baseline}}
