"""Mixture-of-Transformers decoder: two complete experts that share one attention (METHOD §1 "MoT layer").

Every token belongs to the understanding expert (text, markers, ViT tokens) or to the generation expert (latent
tokens; parameters with the suffix `_moe_gen`); there is no gating. The residual stream is therefore kept as two
compact tensors, one per expert, and tokens meet only inside attention: each token costs one expert.

Shapes: B rows, L tokens per row, U/G understanding/generation tokens over all rows, D hidden, H heads, K kv heads,
E head size, S keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from clear.model.cache import CacheView, KVCache
from clear.model.flex import attend_blocks


@dataclass(frozen=True)
class LlmConfig:
    """Shapes of the language model; the defaults are Qwen2.5-7B's, as BAGEL has them.

    `positions` are the rope positions it was trained on; 0 = not stated, and nothing is refused for its length.
    """

    vocab: int = 152064
    hidden: int = 3584
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    mlp: int = 18944
    rms_eps: float = 1e-6
    rope_theta: float = 1e6
    positions: int = 0

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.hidden // self.heads


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type matrix products run in: autocast's where it is on, else x's.

    Norms hand their result over in this type: under autocast each product would otherwise cast its input again.
    """
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * h).to(compute_dtype(x))


class Attention(nn.Module):
    """Projections and per-head norms of both experts."""

    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        d, kv = config.hidden, config.kv_heads * config.head_dim
        for suffix in ("", "_moe_gen"):
            setattr(self, f"q_proj{suffix}", nn.Linear(d, d))
            setattr(self, f"k_proj{suffix}", nn.Linear(d, kv))
            setattr(self, f"v_proj{suffix}", nn.Linear(d, kv))
            setattr(self, f"o_proj{suffix}", nn.Linear(d, d, bias=False))
            setattr(self, f"q_norm{suffix}", RMSNorm(config.head_dim, config.rms_eps))
            setattr(self, f"k_norm{suffix}", RMSNorm(config.head_dim, config.rms_eps))


class Mlp(nn.Module):
    """SwiGLU; `piece` tokens at a time, if it is set.

    The hidden layer is five times as wide as the residual and so the largest activation of all. In training each piece
    is computed again for its gradient.
    """

    piece = 0

    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.mlp, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not 0 < self.piece < len(x):
            return self._product(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return torch.cat([checkpoint(self._product, some, use_reentrant=False) for some in x.split(self.piece)])
        return torch.cat([self._product(some) for some in x.split(self.piece)])

    def _product(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass
class Routing:
    """Where the tokens of a (B, L) batch go: flat indices of each expert's tokens, and the batch shape."""

    und: Tensor  # (U,) long
    gen: Tensor  # (G,) long
    rows: int
    length: int

    @classmethod
    def of(cls, is_gen: Tensor) -> "Routing":
        """From a bool mask (B, L)."""
        flat = is_gen.flatten()
        return cls((~flat).nonzero().squeeze(1), flat.nonzero().squeeze(1), *is_gen.shape)

    def split(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, …) to the two streams."""
        flat = x_BLD.flatten(0, 1)
        return flat.index_select(0, self.und), flat.index_select(0, self.gen)

    def merge(self, und: Tensor, gen: Tensor) -> Tensor:
        """The two streams (U, …), (G, …) to (B, L, …)."""
        if not len(self.gen):
            return und.reshape(self.rows, self.length, *und.shape[1:])
        out = und.new_empty(self.rows * self.length, *und.shape[1:])
        out.index_copy_(0, self.und, und).index_copy_(0, self.gen, gen.to(und.dtype))
        return out.reshape(self.rows, self.length, *und.shape[1:])


def rotary(positions_BL: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin (B, 1, L, E) of the half-rotation (NeoX) embedding, computed in float32."""
    inverse = theta ** -(torch.arange(0, dim, 2, device=positions_BL.device, dtype=torch.float32) / dim)
    angle = positions_BL.float()[..., None] * inverse
    angle = torch.cat([angle, angle], dim=-1).unsqueeze(1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to (B, H, L, E); cos and sin of x's dtype."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin


SCORES = 2**24
"""Scores of a row, over its heads, above which the CPU takes torch's fused kernel as well (`one_kernel`)."""


def one_kernel(cuda: bool, heads: int, queries: int, keys: int) -> bool:
    """Whether attention is one kernel, which keeps no scores: always on CUDA, and on a CPU where they are many."""
    return cuda or heads * queries * keys > SCORES


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """q (B, H, L, E), k/v (B, K, S, E), bias (B, 1, L or 1, S) additive → (B, H, L, E).

    Plain matmul and softmax for few scores on a CPU: forward and backward take 20 ms where the fused kernel takes 30
    (bfloat16) and filling a mask takes 43 (tests/bench/bench_attention.py). With the 28 heads and 5,046 tokens of a
    published training row they would hold 8 GiB, and the kernel is faster.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if one_kernel(q.is_cuda, *q.shape[1:3], k.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    # In place where types allow: a batch's scores are larger than its keys, and memory is what limits this.
    scores = scores.add_(bias) if scores.dtype == bias.dtype else scores + bias
    weights = scores.softmax(-1) if scores.requires_grad else torch.softmax(scores, -1, out=scores)
    return weights.to(v.dtype) @ v


class MoTLayer(nn.Module):
    """One decoder layer with both experts."""

    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.config = config
        self.always_both = False  # sharded training: both experts get gradients, if need be zeros
        self.self_attn = Attention(config)
        for suffix in ("", "_moe_gen"):
            setattr(self, f"mlp{suffix}", Mlp(config))
            setattr(self, f"input_layernorm{suffix}", RMSNorm(config.hidden, config.rms_eps))
            setattr(self, f"post_attention_layernorm{suffix}", RMSNorm(config.hidden, config.rms_eps))

    def _project(self, x: Tensor, suffix: str) -> tuple[Tensor, Tensor, Tensor]:
        attn, e = self.self_attn, self.config.head_dim
        h = getattr(self, f"input_layernorm{suffix}")(x)
        q = getattr(attn, f"q_norm{suffix}")(getattr(attn, f"q_proj{suffix}")(h).unflatten(-1, (-1, e)))
        k = getattr(attn, f"k_norm{suffix}")(getattr(attn, f"k_proj{suffix}")(h).unflatten(-1, (-1, e)))
        v = getattr(attn, f"v_proj{suffix}")(h).unflatten(-1, (-1, e))
        return q, k, v.to(q.dtype)

    def _finish(self, x: Tensor, mixed: Tensor, suffix: str) -> Tensor:
        x = x + getattr(self.self_attn, f"o_proj{suffix}")(mixed)
        return x + getattr(self, f"mlp{suffix}")(getattr(self, f"post_attention_layernorm{suffix}")(x))

    def forward(self, und, gen, routing: Routing, rope, attention):
        """Streams (U, D), (G, D); `attention(q, k, v) -> (B, H, L, E)` sees rotated q, k, v of the whole batch."""
        qkv = torch.cat(self._project(und, ""), dim=1)
        both = self.always_both or len(routing.gen)
        if both:
            qkv_gen = torch.cat(self._project(gen, "_moe_gen"), dim=1)
            qkv = routing.merge(qkv, qkv_gen)
            if self.always_both:
                qkv = qkv + 0.0 * qkv_gen[:1].sum()
        else:
            qkv = routing.merge(qkv, gen)
        heads, kv = self.config.heads, self.config.kv_heads
        q, k, v = qkv.transpose(1, 2).split([heads, kv, kv], dim=1)
        mixed = attention(rotate(q, *rope), rotate(k, *rope), v)
        mixed_und, mixed_gen = routing.split(mixed.transpose(1, 2).flatten(2))
        und = self._finish(und, mixed_und, "")
        if both:
            gen = self._finish(gen, mixed_gen, "_moe_gen")
            if self.always_both:
                und, gen = und + 0.0 * gen[:1].sum(), gen + 0.0 * und[:1].sum()
        return und, gen


class _Decoder(nn.Module):
    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(MoTLayer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.rms_eps)
        self.norm_moe_gen = RMSNorm(config.hidden, config.rms_eps)


@dataclass
class Hidden:
    """What a forward leaves: normed streams of both experts, and the raw outputs of the collected layers."""

    und: Tensor  # (U, D)
    gen: Tensor  # (G, D)
    routing: Routing
    layers: dict[int, Tensor]  # layer → (B, L, D), before the final norm


class LanguageModel(nn.Module):
    """Token embedding, MoT layers, routed final norms and the language head.

    With `gradient_checkpointing` a training forward keeps only what enters each layer and computes the layer again,
    with the same random numbers, in the backward pass; a forward with a cache never does.
    """

    def __init__(self, config: LlmConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Decoder(config)
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)
        self.gradient_checkpointing = False
        self.attention = "auto"  # without a cache: "dense" masks, "flex" block masks, or flex on CUDA only
        self.waiting: Callable | None = None  # runs a layer by its number, where layers wait in host memory

    def forward(
        self,
        x_BLD: Tensor,
        is_gen_BL: Tensor,
        rope_BL: Tensor,
        allowed_BLL: Tensor | BlockMask,
        cache: KVCache | CacheView | None = None,
        valid_BL: Tensor | None = None,
        write: bool = False,
        collect: Sequence[int] = (),
    ) -> Hidden:
        """Run all layers over embedded tokens.

        `allowed` is the attention rule among the tokens given here (a block mask only without a cache). With a cache
        every token also sees all of its row's cached entries; with `write`, not for a view, those marked `valid` are
        appended to it.
        """
        routing = Routing.of(is_gen_BL)
        und, gen = routing.split(x_BLD)
        rope = rotary(rope_BL, self.config.head_dim, self.config.rope_theta, compute_dtype(x_BLD))
        plan = _attention_plan(allowed_BLL, cache, valid_BL, write)
        kept = {}
        recompute = self.gradient_checkpointing and self.training and cache is None and torch.is_grad_enabled()
        for i, layer in enumerate(self.model.layers):
            layer = partial(self.waiting, i) if self.waiting else layer
            given = (und, gen, routing, rope, lambda q, k, v, i=i: plan(i, q, k, v))
            und, gen = checkpoint(layer, *given, use_reentrant=False) if recompute else layer(*given)
            if i in collect:
                kept[i] = routing.merge(und, gen)
        if cache is not None and write:
            cache.advance(valid_BL)
        return Hidden(self.model.norm(und), self.model.norm_moe_gen(gen), routing, kept)


def _attention_plan(allowed: Tensor | BlockMask, cache: KVCache | CacheView | None, valid: Tensor | None, write: bool):
    """The attention of one forward: (layer, q, k, v) → mixed values. The mask is built once for all layers."""
    if isinstance(allowed, BlockMask):
        return lambda _, q, k, v: attend_blocks(q, k, v, allowed)
    if cache is None:
        bias = as_bias(allowed)
        return lambda _, q, k, v: attend(q, k, v, bias)
    past = cache.visible()
    if not write:
        # The tokens of an image see each other: one line for all of them, not as many as a thousand times the cache.
        rule = allowed[:, :1] if bool(allowed.all()) else allowed
        bias = as_bias(torch.cat([past[:, None].expand(-1, rule.shape[1], -1), rule], dim=2))
        cache.reserve(allowed.shape[1])

        def read(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.beside(layer, k, v, past.shape[1])
            return attend(q, keys.to(q.dtype), values.to(q.dtype), bias)

        return read
    cache.reserve(int(valid.sum(1).max()))
    total = int((cache.lengths + valid.sum(1)).max())
    mask = allowed.new_zeros(*allowed.shape[:2], total)
    mask[:, :, : past.shape[1]] = past[:, None]
    row, column, place = places = cache.places(valid)
    mask[row, :, place] = allowed[row, :, column]
    bias = as_bias(mask)

    def append(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.append(layer, k, v, places)
        keys, values = cache.keys[layer][:, :, :total], cache.values[layer][:, :, :total]
        return attend(q, keys.to(q.dtype), values.to(q.dtype), bias)

    return append


def as_bias(allowed: Tensor) -> Tensor:
    """(B, L, S) bool to an additive float32 bias (B, 1, L, S): 0 where allowed, a large negative number elsewhere."""
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, -1e9).unsqueeze(1)
