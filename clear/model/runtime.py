"""How a process that uses torch is set up: seeds, threads, memory allocator, warnings."""

import ctypes
import ctypes.util
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clear.errors import ClearError
from clear.schema import QUANTISED, Config

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def apply_runtime(config: Config) -> None:
    """Seed every generator and set threads; called first in every stage that uses torch."""
    import torch

    tune_allocator()
    torch.set_num_threads(config.runtime.threads or os.cpu_count() or 1)
    torch.manual_seed(config.seed)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


@contextmanager
def without_weights() -> Iterator[None]:
    """Build modules whose parameters have shapes and no values (the meta device), and don't initialise them.

    Initialising a tensor that has no values changes nothing, and yet makes torch import its compiler and pandas: two
    to three seconds of every command that loads a model.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Uninitialised(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if getattr(func, "__module__", "") == torch.nn.init.__name__:
                return args[0] if args else (kwargs or {})["tensor"]
            return func(*args, **(kwargs or {}))

    with torch.device("meta"), Uninitialised():
        yield


def device(config: Config) -> str:
    """Where this process computes: the GPU of its local rank, if there is one and `runtime.device` allows it.

    Raises ClearError where params ask for a GPU and there is none.
    """
    import torch

    if config.runtime.device == "cpu" or not torch.cuda.is_available():
        if config.runtime.device == "cuda":
            raise ClearError("params: runtime.device = cuda, but torch sees no GPU; set it to auto or cpu.")
        return "cpu"
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return "cuda"


def precision(config: Config) -> str:
    """The autocast type of supervised training, "float32" or "bfloat16"; `auto` is bfloat16 where this is native.

    A processor without such instructions (AVX2 only) emulates them at a hundredth of the speed of float32.
    """
    if config.runtime.precision != "auto":
        return config.runtime.precision
    return "bfloat16" if has_bfloat16(device(config)) else "float32"


def stored(config: Config) -> tuple[Any, str]:
    """The type of a loaded model's weights, and how the decoder's linear layers are quantised ("" = not at all).

    Beside quantised layers the weights have the type in which training computes (`precision`).
    """
    import torch

    kind = config.runtime.weights if config.runtime.weights in QUANTISED else ""
    return getattr(torch, precision(config) if kind else config.runtime.weights), kind


def autocast(model: Any) -> Any:
    """Autocast to bfloat16 where the weights are bfloat16: inputs and adapters are float32. Else nothing changes."""
    import torch

    weight = model.vae2llm.weight
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=weight.dtype == torch.bfloat16)


def has_bfloat16(where: str) -> bool:
    """Whether matrix products in bfloat16 are native on `cpu` or `cuda`."""
    import torch

    if where == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def tune_allocator() -> None:
    """Make memory of the CPU cheap to use again and to walk through; call it before torch allocates anything.

    Activations of some ten MiB are freed and allocated again at every step; paging them in anew makes attention on CPU
    twice as slow, so glibc is told to keep freed blocks. torch is told to ask for huge pages: decoding walks through
    key-value caches larger than what the processor keeps page addresses for (8 % of a batch of rollouts). Neither
    changes a result, and elsewhere than on Linux with glibc nothing happens.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    name = ctypes.util.find_library("c") if sys.platform == "linux" else None
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
