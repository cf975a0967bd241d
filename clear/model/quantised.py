"""The decoder's linear layers with frozen weights of 4 or 8 bits, for cards that are smaller than the model.

`nf4` is the type of QLoRA (Dettmers et al. 2023): the weights of a layer in blocks of 64 in the order of their rows,
each weight the nearest of sixteen normal quantiles times its block's largest magnitude. These scales take 8 bits
themselves, in groups of 256: 4.13 bits per weight. `int8` has one scale per output channel: 8 bits per weight and a
five-hundredth more. In both the products run in the type of the activations on weights that are decoded for the
product and again for its gradient, so nothing is kept for the backward pass. Activations are never quantised: LLM.int8
does that, with outliers found per batch, and then a rollout and its scoring would disagree (contract 2).

The packed weights have bitsandbytes' order, whose kernels decode them on CUDA (`require`). On the CPU plain torch does,
as fast as bitsandbytes without AVX-512 (docs/LOG.md).

Departure: QLoRA's scales of scales are 8-bit floats around one mean; here a group has its own minimum and step, whose
error is half as large (docs/LOG.md).
"""

import importlib.util
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clear.errors import ClearError
from clear.model.mot import Mlp
from clear.model.runtime import without_weights
from clear.schema import QUANTISED

KINDS = QUANTISED
EXTRA = "quantised"
"""The optional dependency group with the kernels for CUDA."""
BLOCK, GROUP = 64, 256
"""Weights per scale of nf4, and scales per minimum and step."""
PIECE = 2048
"""Tokens that the SwiGLU of a quantised model computes at a time."""
_CHUNK = 2**20  # weights coded or decoded at once, a multiple of BLOCK: bounds the memory beside the result
_ROWS = "language_model.model.layers."

_CODES = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
"""NF4's sixteen values: quantiles of a normal distribution that hold -1, 0 and 1 exactly (QLoRA, appendix E)."""
_BETWEEN = (_CODES[1:] + _CODES[:-1]) / 2
_PAIRS = torch.stack([_CODES.repeat_interleave(16), _CODES.repeat(16)], dim=1)
"""The two values of a packed byte, the first of them in its upper half (256, 2)."""


def require(kind: str, device: str) -> None:
    """Raise ClearError if `kind` cannot be computed on `device`: nf4 on CUDA needs the kernels of bitsandbytes."""
    if kind == "nf4" and torch.device(device).type == "cuda" and importlib.util.find_spec("bitsandbytes") is None:
        raise ClearError(
            "runtime.weights = nf4 on a GPU needs bitsandbytes, which is not installed; "
            f"pip install 'clear-mllm[{EXTRA}]', or set runtime.weights to int8 or bfloat16."
        )


def parts(kind: str, outputs: int, inputs: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and types of the tensors that stand for a weight (outputs, inputs) of `kind`."""
    if kind == "int8":
        return {"weight": ((outputs, inputs), torch.int8), "scale": ((outputs,), torch.float32)}
    blocks = -(-outputs * inputs // BLOCK)
    return {
        "weight": ((blocks * BLOCK // 2,), torch.uint8),
        "scale": ((blocks,), torch.uint8),
        "scale_range": ((-(-blocks // GROUP), 2), torch.float32),
    }


def size(kind: str, outputs: int, inputs: int) -> int:
    """Bytes of a weight (outputs, inputs) of `kind`."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in parts(kind, outputs, inputs).values())


def encode(kind: str, weight: Tensor, name: str = "") -> dict[str, Tensor]:
    """A weight (outputs, inputs) as the tensors of `parts`, on its device. Raises ClearError if it is not finite."""
    found = _encode_int8(weight) if kind == "int8" else _encode_nf4(weight)
    if not found["scale_range" if kind == "nf4" else "scale"].isfinite().all():
        raise ClearError(f"{name or 'a weight'} holds values that are not finite; fetch the file again.")
    return found


def _encode_int8(weight: Tensor) -> dict[str, Tensor]:
    coded = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), device=weight.device)
    rows = max(1, _CHUNK // weight.shape[1])
    for at in range(0, len(weight), rows):
        some = weight[at : at + rows].float()
        scale[at : at + rows] = some.abs().amax(1) / 127
        step = scale[at : at + rows, None].clamp_min(torch.finfo(torch.float32).tiny)
        coded[at : at + rows] = (some / step).round_().clamp_(-127, 127)
    return {"weight": coded, "scale": scale}


def _encode_nf4(weight: Tensor) -> dict[str, Tensor]:
    flat, device = weight.reshape(-1), weight.device
    blocks = -(-len(flat) // BLOCK)
    packed, largest = torch.empty(blocks * BLOCK // 2, dtype=torch.uint8, device=device), []
    for _, some in _blocks(flat):
        largest.append(some.abs().amax(1))
    scale, ranges = _encode_scales(torch.cat(largest))
    decoded = _decode_scales(scale, ranges).clamp_min_(torch.finfo(torch.float32).tiny)
    between = _BETWEEN.to(device)
    for first, some in _blocks(flat):
        share = (some / decoded[first : first + len(some), None]).view(-1)
        code = torch.bucketize(share, between, out_int32=True)
        at = first * BLOCK // 2
        packed[at : at + len(code) // 2] = 16 * code[::2] + code[1::2]
    return {"weight": packed, "scale": scale, "scale_range": ranges}


def _blocks(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(number of the first block, blocks (N, 64) in float32) in pieces; the last block is filled up with zeros."""
    for at in range(0, len(flat), _CHUNK):
        some = flat[at : at + _CHUNK].float()
        yield at // BLOCK, F.pad(some, (0, -len(some) % BLOCK)).view(-1, BLOCK)


def _encode_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (N,) as uint8 codes (N,) and the minimum and step (N / 256, 2) of each group."""
    filled = F.pad(scales[None], (0, -len(scales) % GROUP), mode="replicate").view(-1, GROUP)
    low, high = filled.aminmax(dim=1)
    step = (high - low) / 255
    coded = ((filled - low[:, None]) / step.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_().clamp_(0, 255)
    return coded.to(torch.uint8).view(-1)[: len(scales)].clone(), torch.stack([low, step], dim=1)


def _decode_scales(coded: Tensor, ranges: Tensor) -> Tensor:
    low, step = (part.repeat_interleave(GROUP)[: len(coded)] for part in ranges.unbind(1))
    return torch.addcmul(low, coded.float(), step)


def decode(kind: str, held: dict[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """The weight (outputs, inputs) in `dtype` that the tensors of `parts` stand for: computed in float32, rounded once.

    On CUDA nf4 is decoded by bitsandbytes.
    """
    if kind == "int8":
        return (held["weight"] * held["scale"][:, None]).to(dtype)
    packed, scales = held["weight"], _decode_scales(held["scale"], held["scale_range"])
    if packed.is_cuda:
        import bitsandbytes.functional as kernels

        return kernels.dequantize_4bit(packed.view(-1, 1), _library_state(held, outputs, inputs, dtype))
    out, pairs = torch.empty(2 * len(packed), dtype=dtype, device=packed.device), _PAIRS.to(packed.device)
    for at in range(0, len(out), _CHUNK):
        values = F.embedding(packed[at // 2 : (at + _CHUNK) // 2].int(), pairs).view(-1, BLOCK)
        out[at : at + _CHUNK] = (values * scales[at // BLOCK : (at + _CHUNK) // BLOCK, None]).view(-1)
    return out[: outputs * inputs].view(outputs, inputs)


def _library_state(held: dict[str, Tensor], outputs: int, inputs: int, dtype: torch.dtype):
    """What bitsandbytes' kernels must know of an nf4 weight beside its packed values."""
    import bitsandbytes.functional as kernels

    return kernels.QuantState(
        absmax=_decode_scales(held["scale"], held["scale_range"]),
        shape=torch.Size((outputs, inputs)),
        code=_CODES.to(held["weight"].device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )


def _library_row(held: dict[str, Tensor], x: Tensor, outputs: int) -> Tensor:
    """One row x (…, inputs) times an nf4 weight, which bitsandbytes reads as it is: what decoding a reply does most."""
    import bitsandbytes

    state = _library_state(held, outputs, x.shape[-1], x.dtype)
    return bitsandbytes.matmul_4bit(x, held["weight"].view(-1, 1).t(), quant_state=state)


class _Product(torch.autograd.Function):
    """x (N, inputs) times a coded weight, which is decoded once more for the gradient of x and never kept."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: "QuantisedLinear") -> Tensor:
        # The codes of this forward: those of a layer that waits in host memory are gone from it by then.
        ctx.layer, ctx.held = layer, layer.held()
        return layer.product(x, ctx.held)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return ctx.layer.product(grad, ctx.held, transposed=True), None


class QuantisedLinear(nn.Linear):
    """A linear layer with a coded weight, which is frozen; inputs, bias and outputs are ordinary tensors.

    A subclass of nn.Linear, so that adapters are put beside it as beside any other (peft). Its coded tensors are
    buffers: they are stored and moved with the model, and keep their types when the model's is changed.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, kind: str, device=None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = inputs, outputs, kind
        for name, (shape, dtype) in parts(kind, outputs, inputs).items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(outputs, device=device), requires_grad=False) if bias else None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"

    def held(self) -> dict[str, Tensor]:
        """The coded tensors by name."""
        return {name: self.get_buffer(name) for name in parts(self.kind, self.out_features, self.in_features)}

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The weight (outputs, inputs) that this layer computes with."""
        return self._decoded(self.held(), dtype)

    def _decoded(self, held: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        return decode(self.kind, held, self.out_features, self.in_features, dtype)

    def product(self, x: Tensor, held: dict[str, Tensor], transposed: bool = False) -> Tensor:
        """x (…, inputs) to (…, outputs), or `transposed` the other way, in x's type, outside autograd."""
        if self.kind == "int8":  # whole numbers up to 127 are exact in bfloat16, and the scales act on the smaller side
            weight, scale = held["weight"].to(x.dtype), held["scale"]
            return ((x * scale).to(x.dtype) @ weight) if transposed else (F.linear(x, weight) * scale).to(x.dtype)
        if x.is_cuda and x.numel() == self.in_features and not transposed:
            return _library_row(held, x, self.out_features)
        weight = self._decoded(held, x.dtype)
        return x @ weight if transposed else F.linear(x, weight)

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) to (…, outputs) in the type of autocast, or else of x."""
        where = x.device.type
        x = x.to(torch.get_autocast_dtype(where)) if torch.is_autocast_enabled(where) else x
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _apply(self, fn, recurse: bool = True):
        kept = {name: value for name, value in self.held().items() if value is not None}  # those that do not wait
        super()._apply(fn, recurse)
        for name, value in kept.items():  # moved, not converted: scales of another type would be other weights
            setattr(self, name, value.to(self.get_buffer(name).device))
        return self


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that are quantised, by name: the linear ones of the decoder's layers, adapters apart."""
    found = {}
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear) and name.startswith(_ROWS) and ".lora_" not in name:
            found[name] = part
    return found


def quantise(model: nn.Module, kind: str) -> None:
    """Put (empty) layers of `kind` in the place of the decoder's linear layers, on the same device.

    Where weights have to be this small activations have, too: the SwiGLUs compute PIECE tokens at a time.
    """
    for name, layer in layers(model).items():
        place = layer.weight.device
        new = QuantisedLinear(layer.in_features, layer.out_features, layer.bias is not None, kind, place)
        _replace(model, name, new)
    for part in model.modules():
        if isinstance(part, Mlp):
            part.piece = PIECE


@torch.no_grad()
def plain(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """An ordinary linear layer with the weight and bias that `layer` computes with, in `dtype`."""
    weight = layer.decoded(dtype) if isinstance(layer, QuantisedLinear) else layer.weight.to(dtype)
    with without_weights():
        new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    new.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return new


def dequantise(model: nn.Module, dtype: torch.dtype) -> None:
    """Put ordinary layers in the place of all quantised ones, with the same weights rounded to `dtype`."""
    for name, layer in layers(model).items():
        if isinstance(layer, QuantisedLinear):
            _replace(model, name, plain(layer, dtype))


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def kinds(model: nn.Module) -> dict[str, torch.dtype]:
    """The types of all coded tensors of a model by their keys in its state."""
    return {
        f"{name}.{part}": dtype
        for name, layer in layers(model).items()
        if isinstance(layer, QuantisedLinear)
        for part, (_, dtype) in parts(layer.kind, layer.out_features, layer.in_features).items()
    }


def description(kind: str) -> dict:
    """What a folder's config.json says of its quantised layers."""
    own = {
        "nf4": {"block_size": BLOCK, "scale_group_size": GROUP, "parts": ["weight", "scale", "scale_range"]},
        "int8": {"scale_per": "output", "parts": ["weight", "scale"]},
    }
    return {"type": kind, "layers": f"linear layers of {_ROWS}*", **own[kind]}
