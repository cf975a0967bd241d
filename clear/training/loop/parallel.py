"""Several processes that train one model: who this one is, which rows of a batch are its own, what they exchange.

Every process builds the same whole batch, with the same random numbers, and computes its own rows; means over the
batch's tokens come out as in one process (see `Share.weight`). This avoids METHOD §8 item 12: processes that
normalise by their own tokens, or that exchange only when they happen to hold an image.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from clear.data.io import replacing
from clear.model.bagel import Contents
from clear.model.checkpoint import save_tensors
from clear.model.sequence import BRIDGE, LATENT, VIT, Image, Layout, Segment, SpecialTokens, layout, length, pack


def world() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 for the first, also before the processes have met."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", 0))


def one_machine() -> bool:
    """Whether all processes of this run are on this machine."""
    world = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", world) == world


def made_once(file: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` gives, on the CPU; the first process of a machine makes it, `file` hands it to the others.

    They wait for the file and not in an exchange, which would give up after some minutes. A run that was interrupted
    finds it, too.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0 and not file.exists():
        found = {name: value.cpu().contiguous() for name, value in make().items()}
        with replacing(file) as partial:
            save_tensors(found, partial)
    while not file.exists():
        time.sleep(0.2)
    return load_file(file)


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


@dataclass
class Pass:
    """One of the forwards that a process computes a batch in; `share_batch` divides the batch and counts.

    rows: rows of a forward (0 = all of the process); budget: samples are packed into rows of so many tokens (0 = one
    sample per row). number: which pass this is; passes: how many there are, the same in all processes; tokens, real:
    of all passes of this process so far, all of them and those that count: no padding, no row computed with weight 0.
    """

    rows: int = 0
    budget: int = 0
    number: int = 0
    passes: int = 1
    tokens: int = 0
    real: int = 0

    def divide(self, samples: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        """The rows of every process, each with the numbers of its samples; sets `passes`.

        Samples are divided before they are packed: rows of the whole batch may be fewer than processes, and uneven.
        """
        count, parts = len(samples), world()
        if self.budget:
            lengths = [length(sample) for sample in samples]
            shares = [
                [[own[i] for i in row] for row in pack([lengths[i] for i in own], self.budget)]
                for own in balanced(lengths, parts)
            ]
        else:
            shares = [[[i] for i in range(count * n // parts, count * (n + 1) // parts)] for n in range(parts)]
        most = max(map(len, shares))
        self.passes = math.ceil(most / (self.rows or most))
        return shares


def balanced(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Which samples each of `parts` processes gets, about as many tokens each: longest first, to the emptiest.

    The numbers of a process ascend. Every process gets a sample unless there are fewer samples than processes.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least = tokens.index(min(tokens))
        shares[least].append(sample)
        tokens[least] += lengths[sample]
    return [sorted(share) for share in shares]


_pass = Pass()


@contextmanager
def one_pass(now: Pass) -> Iterator[None]:
    """Inside, `share_batch` leaves a process only the rows of this pass: a smaller forward at a time."""
    global _pass
    before, _pass = _pass, now
    try:
        yield
    finally:
        _pass = before


@dataclass(frozen=True)
class Share:
    """What part of a batch this process computes now: `whole` is everybody's layout, `mine` its rows of it.

    samples: numbers of its samples, in the order of its rows. A process without a row in this pass (fewer samples than
    processes, or fewer rows than another process has) computes one with weight 0.
    """

    whole: Layout
    mine: Layout
    samples: Sequence[int]
    noise: Sequence[int]  # its part of a list with one entry per noisy latent of the whole batch
    idle: bool = False

    def weight(self, chosen: Callable[[Layout], Tensor]) -> float:
        """Factor that turns a mean over this process's `chosen` tokens into its part of the mean over all of them.

        `chosen` maps a layout to a bool mask (B, L). The mean over the processes of the weighted means, which is
        what distributed gradients are, is then the mean over the batch. 1 for one process; 0 where it has no token.
        """
        if self.whole is self.mine:
            return 1.0
        total = int(chosen(self.whole).sum())
        return 0.0 if self.idle or not total else world() * int(chosen(self.mine).sum()) / total

    def targets(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Of a list with one entry per noisy latent of the whole batch, those of `mine`, in its order."""
        return [values[i] for i in self.noise]


def share_batch(
    samples: Sequence[Sequence[Segment]], contents: Contents, special: SpecialTokens
) -> tuple[Layout, Contents, Share]:
    """The layout and contents of this process's rows of a batch that is the same in all processes.

    With one process and one pass it is the whole batch: `layout(samples, special)` and the contents as they are, or
    packed (`Pass.budget`) with the contents in the order of the rows.
    """
    rows = _pass.divide(samples)[rank()]
    parts, place = world() * _pass.passes, _pass.number
    own = rows[len(rows) * place // _pass.passes : len(rows) * (place + 1) // _pass.passes]
    idle = not own
    chosen = own or rows[:1] or [[0]]
    mine = [i for row in chosen for i in row]

    def part(wanted: Callable[[Image], bool]) -> list[int]:
        counts = [sum(isinstance(s, Image) and wanted(s) for s in sample) for sample in samples]
        starts = list(itertools.accumulate(counts, initial=0))
        return [k for i in mine for k in range(starts[i], starts[i] + counts[i])]

    noise = part(lambda s: s.kind == LATENT and s.noise)
    built, _ = layout(samples, special, packed=chosen)
    _pass.tokens += built.ids.numel()
    _pass.real += 0 if idle else int(built.valid.sum())
    if parts == 1 and mine == list(range(len(samples))):
        return built, contents, Share(built, built, mine, noise)
    whole_ = built if parts == 1 else layout(samples, special)[0]
    latent = part(lambda s: s.kind == LATENT)
    found = Contents(
        vit=_entries(contents.vit, part(lambda s: s.kind == VIT)),
        latent=_entries(contents.latent, latent),
        time=_entries(contents.time, latent),
        bridge=_entries(contents.bridge, part(lambda s: s.kind == BRIDGE)),
    )
    return built, found, Share(whole_, built, mine, noise, idle)


def _entries(values: Sequence | Tensor, numbers: list[int]) -> Sequence | Tensor:
    return values[numbers] if isinstance(values, Tensor) else [values[i] for i in numbers]


def one_random_state(device: torch.device) -> None:
    """Give every process the first one's random state: dropout draws as many numbers as a process has rows."""
    state = torch.get_rng_state().to(device)
    dist.broadcast(state, 0)
    torch.set_rng_state(state.cpu())


def whole(value: Tensor) -> Tensor:
    """A tensor on the CPU; of a sharded one all processes must ask, and each gets the whole."""
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu()


def gathered(logged: dict[str, list[float]]) -> dict[str, list[float]]:
    """The figures of all processes together."""
    if world() == 1:
        return logged
    parts: list[dict[str, list[float]]] = [{}] * world()
    dist.all_gather_object(parts, logged)
    return {name: [v for part in parts for v in part.get(name, [])] for part in parts for name in part}


def copy_whole(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)
