"""The one layout: an interleaved conversation as tokens, rope positions, expert routing and the attention rule.

SFT, bridge training, GRPO scoring and the inference engine all build their inputs here (contract: prefill + decode
equals one full forward). METHOD §1 "Splits" and "Mask":

- text segment = [bos] ids [eos], causal, one rope position per token;
- image segment = [start] N tokens [end], full attention inside, all on ONE rope position, then the position advances;
- a noise segment sees what came before and itself, no other segment sees it, and it does not advance the position, so
  the clean copy after it is at the same position.

One generalisation: a segment may belong to a *branch*. A branch sees the trunk (branch 0) and itself, and its rope
starts where the trunk's ended, so several questions about one image share its tokens in one row. Branches must
follow the trunk; with no branches this is the published layout.

Several samples may share one row, one after the other, each with its own positions from 0 (`pack`, `layout`).

allowed(q, k) = same sample ∧ (q ≥ k ∨ same image segment) ∧ (k not noise ∨ same noise segment)
                ∧ (k on the trunk ∨ same branch).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

TEXT, VIT, LATENT, BRIDGE = 0, 1, 2, 3
IGNORE = -100


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the four markers, looked up in the tokenizer."""

    bos: int
    eos: int
    image_start: int
    image_end: int


@dataclass(frozen=True)
class Text:
    """Text `ids`. `scored` marks which of `ids` + eos carry a loss (None = none, True = all, or one bool each).

    `bos` / `eos` say whether the markers are part of it; the engine feeds a reply token by token without them.
    """

    ids: Sequence[int]
    scored: bool | Sequence[bool] | None = None
    bos: bool = True
    eos: bool = True
    branch: int = 0


@dataclass(frozen=True)
class Image:
    """An image segment of `grid` = (rows, columns) tokens whose content is passed to the model beside the layout.

    kind: VIT (content: patches), LATENT (tokens of a clean latent at t = 0), BRIDGE (latent tokens through the mlp
    bridge). With `noise` it is a latent at its own timestep that only itself sees.
    """

    kind: int
    grid: tuple[int, int]
    noise: bool = False
    branch: int = 0


@dataclass(frozen=True)
class Gap:
    """A dropped image segment: no tokens, but the rope position advances (METHOD §3 "Dropout")."""

    branch: int = 0


Segment = Text | Image | Gap


@dataclass
class Row:
    """One row of the batch while it is built; arrays grow by concatenation at the end."""

    ids: list[np.ndarray] = field(default_factory=list)
    kind: list[np.ndarray] = field(default_factory=list)
    rope: list[np.ndarray] = field(default_factory=list)
    block: list[np.ndarray] = field(default_factory=list)
    noise: list[np.ndarray] = field(default_factory=list)
    branch: list[np.ndarray] = field(default_factory=list)
    sample: list[np.ndarray] = field(default_factory=list)
    target: list[np.ndarray] = field(default_factory=list)
    place: list[np.ndarray] = field(default_factory=list)
    blocks: int = 0
    samples: int = 0

    def add(self, segments: Sequence[Segment], special: SpecialTokens, rope: int = 0) -> int:
        """Append one sample whose first position is `rope`; returns the trunk's next position."""
        trunk, current, position = rope, 0, rope
        for segment in segments:
            if segment.branch != current:
                if current == 0:
                    trunk = position
                current, position = segment.branch, trunk
            if isinstance(segment, Gap):
                position += 1
            elif isinstance(segment, Text):
                position += self._text(segment, special, position)
            else:
                self._image(segment, special, position)
                position += 0 if segment.noise else 1
        self.samples += 1
        return position if current == 0 else trunk

    def _text(self, segment: Text, special: SpecialTokens, position: int) -> int:
        body = np.asarray(segment.ids, dtype=np.int64)
        ids = np.concatenate([[special.bos] * segment.bos, body, [special.eos] * segment.eos]).astype(np.int64)
        target = np.full(len(ids), IGNORE)
        if segment.scored is not None:
            scored = np.ones(len(ids), bool) if segment.scored is True else np.asarray(segment.scored, bool)
            following = ids[1:]
            target[: len(following)] = np.where(scored[: len(following)], following, IGNORE)
        self._extend(segment, ids, TEXT, position + np.arange(len(ids)), block=-1, noise=0, target=target)
        return len(ids)

    def _image(self, segment: Image, special: SpecialTokens, position: int) -> None:
        n = segment.grid[0] * segment.grid[1]
        self.blocks += 1
        ids = np.concatenate([[special.image_start], np.zeros(n), [special.image_end]]).astype(np.int64)
        kind = np.full(n + 2, segment.kind)
        kind[[0, -1]] = TEXT
        rows, columns = np.divmod(np.arange(n), segment.grid[1])
        place = np.concatenate([[(0, 0)], np.stack([rows, columns], 1), [(0, 0)]])
        noise = self.blocks if segment.noise else 0
        self._extend(segment, ids, kind, np.full(n + 2, position), self.blocks, noise, place=place)

    def _extend(self, segment, ids, kind, rope, block, noise, target=None, place=None) -> None:
        n = len(ids)
        self.ids.append(ids)
        self.kind.append(np.broadcast_to(kind, n))
        self.rope.append(rope)
        self.block.append(np.full(n, block))
        self.noise.append(np.full(n, noise))
        self.branch.append(np.full(n, segment.branch))
        self.sample.append(np.full(n, self.samples))
        self.target.append(np.full(n, IGNORE) if target is None else target)
        self.place.append(np.zeros((n, 2), np.int64) if place is None else place)


@dataclass
class Layout:
    """A batch of rows, right-padded to (B, L). All long tensors except the bool `noisy`, `valid`.

    `place` (B, L, 2) is the (row, column) of an image token in its grid; `target` the id each token predicts, or
    IGNORE. Padding has sample −1 and is seen by no real token.
    """

    ids: Tensor
    kind: Tensor
    rope: Tensor
    block: Tensor
    noise: Tensor
    branch: Tensor
    sample: Tensor
    target: Tensor
    place: Tensor
    blocks: Any = field(default=None, repr=False, compare=False)  # clear/model/flex.py keeps its mask here

    @classmethod
    def stack(cls, rows: Sequence[Row]) -> "Layout":
        """Pad the rows to the longest."""
        joined = [{name: np.concatenate(getattr(row, name)) for name in _FIELDS} for row in rows]
        longest = max(len(row["ids"]) for row in joined)
        out = {}
        for name, fill in _FIELDS.items():
            first = joined[0][name]
            array = np.full((len(rows), longest, *first.shape[1:]), fill, np.int64)
            for i, row in enumerate(joined):
                array[i, : len(row[name])] = row[name]
            out[name] = torch.from_numpy(array)
        return cls(**out)

    @property
    def valid(self) -> Tensor:
        """(B, L) bool: not padding."""
        return self.sample >= 0

    @property
    def is_gen(self) -> Tensor:
        """(B, L) bool: tokens of the generation expert (latents, clean or noisy; not their markers)."""
        return self.kind == LATENT

    @property
    def noisy(self) -> Tensor:
        """(B, L) bool: latent tokens of noise segments, whose velocity is predicted."""
        return self.is_gen & (self.noise > 0)

    def allowed(self) -> Tensor:
        """(B, L, L) bool: the attention rule, queries by keys."""
        index = torch.arange(self.ids.shape[1], device=self.ids.device)
        parts = self._parts()
        query, key = [part[:, :, None] for part in parts], [part[:, None, :] for part in parts]
        return _rule(index[None, :, None], index[None, None, :], query, key)

    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The attention rule as flex_attention asks for it: (row, head, query, key) indices → bool."""
        parts = [part.to(torch.int32).contiguous() for part in self._parts()]

        def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return _rule(query, key, [part[row, query] for part in parts], [part[row, key] for part in parts])

        return rule

    def _parts(self) -> list[Tensor]:
        """What the rule reads of each token; branches only where there are any."""
        return [self.block, self.sample, self.noise, *([self.branch] if bool(self.branch.any()) else [])]

    @classmethod
    def tokens(cls, ids: Tensor, rope: Tensor) -> "Layout":
        """Plain text tokens without markers, the fast path of decoding: ids (B, n) and their first positions (B,)."""
        zero = torch.zeros_like(ids)
        return cls(
            ids=ids,
            kind=zero,
            rope=rope[:, None] + torch.arange(ids.shape[1], device=ids.device),
            block=zero - 1,
            noise=zero,
            branch=zero,
            sample=zero,
            target=torch.full_like(ids, IGNORE),
            place=torch.zeros(*ids.shape, 2, dtype=torch.long, device=ids.device),
        )

    def repeat(self, rope: Tensor) -> "Layout":
        """One row built at position 0 → a batch of B copies that start at `rope` (B,)."""
        fields_ = {name: getattr(self, name).expand(len(rope), *getattr(self, name).shape[1:]) for name in _FIELDS}
        return Layout(**fields_ | {"rope": self.rope + rope[:, None]})

    def to(self, device: torch.device | str) -> "Layout":
        """Move all tensors."""
        if self.ids.device == torch.device(device):
            return self
        return Layout(**{name: getattr(self, name).to(device) for name in _FIELDS})


def _rule(q: Tensor, k: Tensor, query: Sequence[Tensor], key: Sequence[Tensor]) -> Tensor:
    """The attention rule for pairs of tokens: their indices in the row, and block, sample, noise (and branch) of each.

    Written once, for whole tensors that broadcast and for the single pairs that a kernel asks about.
    """
    rule = ((q >= k) | ((query[0] == key[0]) & (key[0] > 0))) & (query[1] == key[1])
    rule = rule & ((key[2] == 0) | (query[2] == key[2]))
    if len(query) > 3:
        rule = rule & ((key[3] == 0) | (query[3] == key[3]))
    return rule | (q == k)


_FIELDS = {
    "ids": 0,
    "kind": TEXT,
    "rope": 0,
    "block": -1,
    "noise": 0,
    "branch": 0,
    "sample": -1,
    "target": IGNORE,
    "place": 0,
}


def length(segments: Sequence[Segment]) -> int:
    """Tokens of a conversation."""
    total = 0
    for segment in segments:
        if isinstance(segment, Text):
            total += len(segment.ids) + segment.bos + segment.eos
        elif isinstance(segment, Image):
            total += segment.grid[0] * segment.grid[1] + 2
    return total


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Which samples share a row of at most `budget` tokens: best fit, the longest first.

    The numbers in a row ascend, and the rows by their first number. A sample beyond the budget is alone in its row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [i for i, free in enumerate(room) if free >= lengths[sample]]
        if fits:
            best = min(fits, key=lambda i: (room[i], i))
            rows[best].append(sample)
            room[best] -= lengths[sample]
        else:
            rows.append([sample])
            room.append(budget - lengths[sample])
    return sorted(sorted(row) for row in rows)


def layout(
    conversations: Sequence[Sequence[Segment]],
    special: SpecialTokens,
    rope: Sequence[int] | None = None,
    packed: Sequence[Sequence[int]] | None = None,
):
    """One conversation per row, or with `packed` the conversations of these numbers in each row, one after another.

    With `rope`, conversation i starts at that position (continuation of a cached context). Returns (Layout, list of
    next positions, by conversation). The contents of a packed layout follow its own order.
    """
    rows, ends = [], [0] * len(conversations)
    for members in [[i] for i in range(len(conversations))] if packed is None else packed:
        row = Row()
        for i in members:
            ends[i] = row.add(conversations[i], special, 0 if rope is None else int(rope[i]))
        rows.append(row)
    return Layout.stack(rows), ends
