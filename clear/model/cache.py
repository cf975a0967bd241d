"""Key-value cache of a batch of rows that may have different lengths.

One preallocated tensor per layer, (B, kv_heads, capacity, head_dim), written in place; capacity doubles when needed,
so decoding never re-copies the past token by token. Row b holds `lengths[b]` valid entries from the left.
"""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all layers for B rows."""

    def __init__(self, layers: int, rows: int, kv_heads: int, head_dim: int, capacity: int, like: Tensor) -> None:
        shape = (rows, kv_heads, capacity, head_dim)
        self.keys = [like.new_zeros(shape) for _ in range(layers)]
        self.values = [like.new_zeros(shape) for _ in range(layers)]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more entries in every row."""
        need = (int(self.lengths.max()) if self.rows else 0) + tokens
        have = self.keys[0].shape[2]
        if need <= have:
            return
        grow = max(need, 2 * have) - have
        for store in (self.keys, self.values):
            for i, old in enumerate(store):
                store[i] = torch.cat([old, old.new_zeros(*old.shape[:2], grow, old.shape[3])], dim=2)

    def append(self, layer: int, k: Tensor, v: Tensor, valid: Tensor) -> None:
        """Write k, v (B, kv_heads, n, head_dim) behind each row's entries; `valid` (B, n) marks real tokens.

        The lengths advance in `advance`, once per forward and not once per layer.
        """
        row, column = valid.nonzero(as_tuple=True)
        place = self.lengths[row] + (valid.cumsum(1) - 1)[row, column]
        self.keys[layer][row, :, place] = k[row, :, column].to(self.keys[layer].dtype)
        self.values[layer][row, :, place] = v[row, :, column].to(self.values[layer].dtype)

    def advance(self, valid: Tensor) -> None:
        """Count the tokens that `append` has written in every layer."""
        self.lengths = self.lengths + valid.sum(1)

    def view(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, kv_heads, longest row, head_dim); entries beyond a row's length are to be masked."""
        longest = int(self.lengths.max())
        return self.keys[layer][:, :, :longest], self.values[layer][:, :, :longest]

    def visible(self) -> Tensor:
        """(B, longest row) bool: which entries of `view` are real."""
        longest = int(self.lengths.max())
        return torch.arange(longest, device=self.lengths.device)[None] < self.lengths[:, None]

    def select(self, rows: Tensor) -> "KVCache":
        """A new cache with these rows (repeats allowed: a shared prompt is expanded to its group this way)."""
        new = object.__new__(KVCache)
        new.keys = [k[rows] for k in self.keys]
        new.values = [v[rows] for v in self.values]
        new.lengths = self.lengths[rows]
        return new

    @staticmethod
    def concatenate(parts: "list[KVCache]") -> "KVCache":
        """One cache with the rows of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        longest = max(part.keys[0].shape[2] for part in parts)

        def join(name: str, layer: int) -> Tensor:
            stores = [getattr(part, name)[layer] for part in parts]
            pad = torch.nn.functional.pad
            return torch.cat([pad(store, (0, 0, 0, longest - store.shape[2])) for store in stores])

        new = object.__new__(KVCache)
        layers = range(len(parts[0].keys))
        new.keys, new.values = [join("keys", i) for i in layers], [join("values", i) for i in layers]
        new.lengths = torch.cat([part.lengths for part in parts])
        return new
