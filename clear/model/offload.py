"""Decoder layers that wait in host memory and come to the device one ahead of their use (`runtime.offload`).

Of BAGEL-7B's weights 89 % are in the decoder's layers, and a forward uses one layer at a time. Here a layer's frozen
weights stay in host memory; it computes with copies on the device (`torch.func.functional_call`), which are let go with
the graph that needs them, so that the device holds two layers: the one at work and the next, which a stream of its own
copies meanwhile. In the backward pass recomputed layers come in falling order, and so does what is fetched ahead.
Adapters are trained where the device is and never wait. The numbers are those of a model that is on the device whole.

accelerate's hooks do this for inference: they put each tensor on the device when its module begins and take it away
when the module ends, and the backward pass of a recomputed layer comes after that.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

AHEAD = 2
"""Layers that are on the device at most: the one at work, and the next."""


class Waiting:
    """Decoder layers whose frozen weights are in host memory, for computing on `device`."""

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        self._layers, self._device, self._last = layers, device, -1
        self._ahead: dict[int, dict[str, Tensor]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, number: int, *given: Any) -> Any:
        """What layer `number` makes of its arguments."""
        weights = self._ahead.pop(number, None) or self._copied(number)
        if self._stream:
            here = torch.cuda.current_stream(self._device)
            here.wait_stream(self._stream)
            for value in weights.values():
                value.record_stream(here)
        following = self._following(number)
        self._last = number
        self._ahead.clear()  # before the next one takes its room
        self._ahead[following] = self._copied(following)
        return functional_call(self._layers[number], weights, given)

    def _following(self, number: int) -> int:
        """The layer that is wanted next: one up, or one down while a backward pass computes them again."""
        last, training = len(self._layers) - 1, torch.is_grad_enabled()
        if training and (number < self._last or number == self._last == last):
            return max(number - 1, 0)
        return number + 1 if number < last else last if training else 0

    @torch.inference_mode(False)  # what is fetched ahead at the end of a rollout begins a training step
    def _copied(self, number: int) -> dict[str, Tensor]:
        """Copies on the device; on CUDA begun, and not waited for."""
        held = frozen(self._layers[number])
        if not self._stream:
            return {name: value.detach().to(self._device, copy=True) for name, value in held.items()}
        with torch.cuda.stream(self._stream):
            return {name: value.detach().to(self._device, non_blocking=True) for name, value in held.items()}


def frozen(layer: nn.Module) -> dict[str, Tensor]:
    """What of a layer waits: its weights and codes, but no adapter."""
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return {name: value for name, value in tensors if ".lora_" not in name}


def wait_in_host_memory(model: nn.Module, device: str) -> None:
    """Let the decoder layers of a model, which is in host memory as a whole, stay there, and move the rest to `device`.

    From here on `model.to(…)` moves all but them. Nothing of them is trained.
    """
    decoder, place = model.language_model, torch.device(device)
    for layer in decoder.model.layers:
        for value in frozen(layer).values():
            value.requires_grad_(False)
            if place.type == "cuda":
                value.data = value.data.pin_memory()  # or a copy would wait for the host
        layer._apply = partial(_apply_to_adapters, layer)
    decoder.waiting = Waiting(decoder.model.layers, place)
    model.to(place)


def _apply_to_adapters(layer: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module._apply`, by which torch moves a module, without the weights that wait."""
    hidden = []
    for name in frozen(layer):
        owner, _, own = name.rpartition(".")
        module = layer.get_submodule(owner)
        table = module._parameters if own in module._parameters else module._buffers
        hidden.append((table, own, table[own]))
        table[own] = None
    try:
        return nn.Module._apply(layer, fn, recurse)
    finally:
        for table, own, value in hidden:
            table[own] = value
