"""Attention over block masks: torch's flex_attention, which never holds a mask of all pairs of tokens.

A layout's rule (clear/model/sequence.py) is evaluated once per forward in strips of queries, which leaves for each
block of 128 × 128 pairs whether it is empty, full or mixed; the kernel skips the first, takes the second whole, and
asks the rule again inside the third. On CUDA the kernel is compiled; elsewhere torch runs it unfused, and no backward.

Published (METHOD §1 "Mask"): the same blocks, with every row padded to one length; rows here have their own.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from clear.errors import ClearError
from clear.model.sequence import Layout

BLOCK = 128
_PAIRS = 2**25
"""Pairs of tokens whose rule is evaluated at a time: some 32 MB per term of the rule."""


def wanted(choice: str, device: torch.device) -> bool:
    """Whether a forward without a cache on `device` uses block masks: `choice` is "auto", "dense" or "flex"."""
    return choice == "flex" or (choice == "auto" and device.type == "cuda")


def block_mask(layout: Layout) -> BlockMask:
    """The block mask of a layout, on its device; made once per layout."""
    if layout.blocks is None:
        layout.blocks = _block_mask(layout)
    return layout.blocks


def _block_mask(layout: Layout) -> BlockMask:
    rows, length = layout.ids.shape
    device, rule, count = layout.ids.device, layout.mask_mod(), -(-length // BLOCK)
    row = torch.arange(rows, device=device)[:, None, None]
    key = torch.arange(length, device=device)[None, None, :]
    strip = BLOCK * max(1, _PAIRS // (BLOCK * rows * length))
    some, every = [], []
    for start in range(0, length, strip):
        query = torch.arange(start, min(start + strip, length), device=device)[None, :, None]
        pairs = rule(row, row, query, key)
        tall = -(-pairs.shape[1] // BLOCK)
        # Pairs beyond the end do not count: a block that extends past it is never full.
        pairs = torch.nn.functional.pad(pairs, (0, count * BLOCK - length, 0, tall * BLOCK - pairs.shape[1]))
        pairs = pairs.reshape(rows, tall, BLOCK, count, BLOCK)
        some.append(pairs.any(4).any(2))
        every.append(pairs.all(4).all(2))
    some, every = torch.cat(some, 1), torch.cat(every, 1)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every), *_listed(every), BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=(length, length)
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(B, Q, K) bool to how many key blocks each query block has, (B, 1, Q), and their numbers first, (B, 1, Q, K)."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


@functools.cache
def _compiled() -> Callable:
    return torch.compile(flex_attention)


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """q (B, H, L, E), k/v (B, K, L, E) → (B, H, L, E); heads share keys without copies.

    Raises ClearError where a gradient is asked for on another device than CUDA.
    """
    grouped = q.shape[1] != k.shape[1]
    if q.is_cuda:
        return _compiled()(q, k, v, block_mask=mask, enable_gqa=grouped)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ClearError("params: runtime.attention = flex has a backward pass on CUDA only; set it to auto or dense.")
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
