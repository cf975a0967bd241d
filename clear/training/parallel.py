"""Several processes that train one model: who this one is, which rows of a batch are its own, what they exchange.

Every process builds the whole batch alike, with the same random numbers, and computes its own rows; means over the
batch's tokens come out as in one process (see `Share.weight`). METHOD §8 item 12 is what this avoids: processes that
normalise by their own tokens, or that exchange only when they happen to hold an image.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from clear.model.bagel import Contents
from clear.model.sequence import BRIDGE, LATENT, VIT, Image, Layout, Segment, SpecialTokens, layout


def world() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 for the first, also before the processes have met."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", 0))


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


_pass = (0, 1)


@contextmanager
def one_pass(number: int, passes: int) -> Iterator[None]:
    """Inside, a process computes only the `number`-th of `passes` parts of its rows: a smaller forward at a time."""
    global _pass
    before, _pass = _pass, (number, passes)
    try:
        yield
    finally:
        _pass = before


@dataclass(frozen=True)
class Share:
    """What part of a batch this process computes now: `whole` is everybody's layout, `mine` its rows of it.

    rows: numbers of its rows. A process without a row (fewer rows than processes) computes row 0 with weight 0.
    """

    whole: Layout
    mine: Layout
    rows: range
    noise: slice  # its part of a list with one entry per noise segment of the whole batch
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


def share_batch(
    rows: Sequence[Sequence[Segment]], contents: Contents, special: SpecialTokens
) -> tuple[Layout, Contents, Share]:
    """The layout and contents of this process's rows of a batch that all processes have built alike.

    With one process it is `layout(rows, special)` and the contents as they are.
    """
    whole, _ = layout(rows, special)
    count, all_ = len(rows), slice(None)
    number, passes = _pass
    parts, place = world() * passes, rank() * passes + number
    if parts == 1:
        return whole, contents, Share(whole, whole, range(count), all_)
    mine = range(count * place // parts, count * (place + 1) // parts)
    idle = not len(mine)
    mine = mine or range(1)
    built, _ = layout([rows[i] for i in mine], special)

    def part(wanted: Callable[[Image], bool]) -> slice:
        counts = [sum(isinstance(s, Image) and wanted(s) for s in row) for row in rows]
        return slice(sum(counts[: mine.start]), sum(counts[: mine.stop]))

    latent = part(lambda s: s.kind == LATENT)
    own = Contents(
        vit=contents.vit[part(lambda s: s.kind == VIT)],
        latent=contents.latent[latent],
        time=contents.time[latent],
        bridge=contents.bridge[part(lambda s: s.kind == BRIDGE)],
    )
    return built, own, Share(whole, built, mine, part(lambda s: s.kind == LATENT and s.noise), idle)


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
