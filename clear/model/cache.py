"""Key-value cache of a batch of rows that may have different lengths.

One preallocated tensor per layer, (B, kv_heads, capacity, head_dim), written in place; capacity grows by a quarter
when needed, so decoding never re-copies the past token by token. Row b holds `lengths[b]` valid entries from the left.
"""

import torch
from torch import Tensor


def grown(capacity: int, tokens: int) -> int:
    """The places per row of a cache that had `capacity` of them and must hold `tokens`: a quarter more until it can."""
    while capacity < tokens:
        capacity += capacity // 4 + 1
    return capacity


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
        have = self.keys[0].shape[2]
        more = grown(have, (int(self.lengths.max()) if self.rows else 0) + tokens) - have
        if not more:
            return
        for store in (self.keys, self.values):
            for i, old in enumerate(store):
                store[i] = torch.cat([old, old.new_zeros(*old.shape[:2], more, old.shape[3])], dim=2)

    def places(self, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the tokens that `valid` (B, n) marks are to be written: rows, their columns in `valid`, entries."""
        row, column = valid.nonzero(as_tuple=True)
        return row, column, self.lengths[row] + (valid.cumsum(1) - 1)[row, column]

    def append(self, layer: int, k: Tensor, v: Tensor, places: tuple[Tensor, Tensor, Tensor]) -> None:
        """Write k, v (B, kv_heads, n, head_dim) behind each row's entries, at the `places` of the real tokens.

        The lengths advance in `advance`, once per forward and not once per layer.
        """
        row, column, place = places
        self.keys[layer][row, :, place] = k[row, :, column].to(self.keys[layer].dtype)
        self.values[layer][row, :, place] = v[row, :, column].to(self.values[layer].dtype)

    def beside(self, layer: int, k: Tensor, v: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """The first `longest` entries of every row, then k, v (B, kv_heads, n, head_dim), which are not remembered.

        They stand in the store itself, behind the longest row, where `reserve` must have made room; the next tokens
        overwrite them.
        """
        total = longest + k.shape[2]
        self.keys[layer][:, :, longest:total] = k
        self.values[layer][:, :, longest:total] = v
        return self.keys[layer][:, :, :total], self.values[layer][:, :, :total]

    def advance(self, valid: Tensor) -> None:
        """Count the tokens that `append` has written in every layer."""
        self.lengths = self.lengths + valid.sum(1)

    def visible(self) -> Tensor:
        """(B, longest row) bool: which entries are real."""
        return _visible(self.lengths)

    def select(self, rows: Tensor) -> "KVCache":
        """A new cache with these rows (repeats allowed: a shared prompt is expanded to its group this way)."""
        new = object.__new__(KVCache)
        new.keys = [k[rows] for k in self.keys]
        new.values = [v[rows] for v in self.values]
        new.lengths = self.lengths[rows]
        return new

    def keep(self, rows: Tensor) -> None:
        """Only these rows from here on, in this order, in place: only those that change their number are copied."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
        longest = int(self.lengths.max())
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                old[moved, :, :longest] = old[rows[moved], :, :longest]
                store[layer] = old[: len(rows)]
        self.lengths = self.lengths[rows]

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


def _visible(lengths: Tensor) -> Tensor:
    return torch.arange(int(lengths.max()), device=lengths.device)[None] < lengths[:, None]


class CacheView:
    """Rows of caches to be read and not written, of which no copy is kept.

    A row may occur several times and may show fewer entries than it has. One layer's keys and values of all rows are
    put side by side when they are read, so that several contexts of a row cost one layer of it each and not a cache.
    """

    def __init__(self, cache: KVCache, rows: Tensor | None = None, lengths: Tensor | None = None) -> None:
        """`rows` (R,) of a cache, or all of them; `lengths` (R,) are the entries to be seen, at most those it has."""
        held = cache.lengths if rows is None else cache.lengths[rows]
        self.lengths = held if lengths is None else lengths
        self._parts = [(cache, rows)]

    @classmethod
    def beside_each_other(cls, caches: "list[KVCache | CacheView]") -> "CacheView":
        """The rows of all of them, in order."""
        views = [one if isinstance(one, cls) else cls(one) for one in caches]
        new = object.__new__(cls)
        new.lengths = torch.cat([view.lengths for view in views])
        new._parts = [part for view in views for part in view._parts]
        return new

    def visible(self) -> Tensor:
        """(R, longest row) bool: which entries are seen."""
        return _visible(self.lengths)

    def reserve(self, tokens: int) -> None:
        """Nothing: what is read side by side has room for what is read with it."""

    def beside(self, layer: int, k: Tensor, v: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """As KVCache.beside: the first `longest` entries of every row, then k, v (R, kv_heads, n, head_dim)."""
        return self._read("keys", layer, k, longest), self._read("values", layer, v, longest)

    def _read(self, name: str, layer: int, fresh: Tensor, longest: int) -> Tensor:
        stores = [(getattr(cache, name)[layer], rows) for cache, rows in self._parts]
        out = stores[0][0].new_zeros(*fresh.shape[:2], longest + fresh.shape[2], fresh.shape[3])
        begin = 0
        for store, rows in stores:
            there = store[:, :, :longest] if rows is None else store[rows, :, :longest]
            out[begin : begin + len(there), :, : there.shape[2]] = there
            begin += len(there)
        out[:, :, longest:] = fresh
        return out
