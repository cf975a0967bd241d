"""The running batch of the server: rows join it while it decodes, leave when they have answered, and restore together.

It is the engine's loop taken apart (clear/reasoning/engine.py `generate`): the same prefill, feed and restore, in the
same order for each row, so that a greedy answer is the one of `clear ask` whatever rows are beside it. What differs is
who decides when: here every row has its own options, and each step is followed by a look at who wants to join.

A row that asks for a restoration is set aside until no other row decodes, or for PATIENCE steps, so that rows that ask
at nearly the same time denoise as one batch.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from clear.model.images import ImageBank
from clear.model.runtime import autocast
from clear.model.sequence import length
from clear.model.tokenizer import decode, encode
from clear.reasoning import grammar
from clear.reasoning.answering import Answerer
from clear.reasoning.engine import Rows, feed, prefill, restore, vocabulary
from clear.reasoning.prompts import Prompt, outlined, pictured
from clear.reasoning.trajectory import Reply, Trajectory

PATIENCE = 16
"""Steps that a row with a picture to restore waits for others at most, while others decode."""

PREFILL = 2**26
"""Rows × tokens² of prompts that are read at once (but always one): what their attention masks take, in entries."""

ROOM = 64
"""Places per row that a cache gets beyond its longest row when rows join; it grows by itself from there."""


ID = 36
"""Bytes of a token id: an integer of Python and its place in a tuple."""


@dataclass(eq=False)
class Conversation:
    """What one request asks, shared by its choices: token ids, and the decoded picture if there is one."""

    system: tuple[int, ...]
    question: tuple[int, ...]
    bank: ImageBank | None
    prompt: Prompt | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, the picture's included."""
        texts = self.system, self.question
        return length((Prompt(*texts) if self.bank is None else outlined(self.bank, 0, *texts)).segments())

    @property
    def held(self) -> int:
        """Bytes of the token ids, and of the decoded picture in the sizes of the autoencoder and of the ViT."""
        ids = ID * (len(self.system) + len(self.question))
        if self.bank is None:
            return ids
        rows, columns = self.bank.vit_grid(0)
        return ids + self.bank.uint8(0).nbytes + 3 * rows * columns * self.bank.size.vit_patch**2

    def prepare(self, answerer: Answerer) -> None:
        """Encode the picture, once for all choices."""
        if self.prompt is not None:
            return
        if self.bank is None:
            self.prompt = Prompt(self.system, self.question)
            return
        self.prompt = pictured(self.bank.encode(answerer.vae), 0, self.system, self.question)


@dataclass(frozen=True)
class Wish:
    """How a row is to be answered. Modes as in the engine's Options; `tokens` bounds all replies together.

    `seed` starts the noise of restorations and, with a temperature, the sampling. `stop`: texts that end a reply.
    """

    restore: str = "auto"
    feedback: str = "bridge"
    temperature: float = 0.0
    top_p: float = 1.0
    tokens: int = 1024
    stop: tuple[str, ...] = ()
    seed: int = 0
    pictures: bool = False


@dataclass(eq=False, kw_only=True)
class Row(Trajectory):
    """One choice of one request on its way. `prompt`, the engine's offset of the noise seed, is the wish's seed.

    `finish` is "" until the row has ended, then "stop" or "length", or "error" with the `failure`; `texts` and
    `pictures` (uint8, the restored ones if wished) are there from then on. `changed` is called from the batch's thread:
    when the row ends, and with `streams` after every token.
    """

    conversation: Conversation
    wish: Wish
    changed: Callable[[], None]
    streams: bool = False
    gone: bool = False
    finish: str = ""
    failure: str = ""
    texts: list[str] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)
    pending: int = 0
    said: int = 0
    since: int = 0
    generator: torch.Generator | None = None

    @property
    def held(self) -> int:
        """Bytes that the row takes while it waits; the choices of a request share them."""
        return self.conversation.held + sum(map(sys.getsizeof, self.wish.stop))

    def end(self, finish: str, failure: str = "") -> None:
        """Record how the row ended and tell its request."""
        self.finish, self.failure = finish, failure
        self.changed()


class Batch:
    """The rows of one model. Not thread-safe: one thread admits, steps and restores.

    `timed(part)` is a context that measures the seconds of prefill, decode, restore and pictures.
    """

    def __init__(self, answerer: Answerer, timed: Callable[[str], AbstractContextManager] | None = None) -> None:
        self.answerer, self.model, self.tokenizer = answerer, answerer.model, answerer.tokenizer
        self.options = replace(answerer.options, noise_seed=0)
        self.special = self.model.config.special
        self.known = vocabulary(self.tokenizer)
        self.running: Rows | None = None
        self.parked: list[Rows] = []
        self.steps = 0
        self._ending: list[Row] = []
        self.read = self.written = self.restored = 0  # prompt tokens, tokens and pictures since last asked
        self._timed = timed or (lambda part: nullcontext())

    @property
    def rows(self) -> list[Row]:
        """All rows that have not ended."""
        parts = [*([self.running] if self.running else []), *self.parked]
        return [*self._ending, *(row for part in parts for row in part.trajectories)]

    def admit(self, rows: Iterable[Row]) -> None:
        """Read the prompts of these rows, each conversation once, and let the rows join."""
        for chunk in _chunks(rows):
            with torch.inference_mode(), self._timed("encode"):
                for row in chunk:
                    row.conversation.prepare(self.answerer)
            with torch.inference_mode(), autocast(self.model), self._timed("prefill"):
                self._join(chunk)

    def step(self) -> None:
        """One token for every row that decodes; then the rows that wait for a restoration, if it is time for them."""
        ended: list[tuple[Row, str]] = []
        with torch.inference_mode(), autocast(self.model):
            self._drop_gone()
            self.steps += 1
            if self.running is not None:
                with self._timed("decode"):
                    ended = self._decode()
            waits = min((row.since for part in self.parked for row in part.trajectories), default=self.steps)
            if self.parked and (self.running is None or self.steps - waits >= PATIENCE):
                with self._timed("restore"):
                    self._restore()
        for row, how in ended:
            self._finish(row, how)
        self._ending = []

    def clear(self) -> None:
        """Forget all rows, without telling them."""
        self.running, self.parked, self._ending = None, [], []

    # --- joining ----------------------------------------------------------------------------------------------------

    def _join(self, rows: Sequence[Row]) -> None:
        talks = list(dict.fromkeys(row.conversation for row in rows))
        read = prefill(self.model, [talk.prompt for talk in talks])
        self.read += int(read.cache.lengths.sum())
        groups: dict[str, list[Row]] = {}
        for row in rows:
            groups.setdefault(row.wish.restore, []).append(row)
        joined = []
        for mode, members in groups.items():
            part = read.select([talks.index(row.conversation) for row in members])
            part.trajectories = list(members)
            for row in members:
                row.prompt = row.wish.seed
                if row.wish.temperature > 0:
                    row.generator = torch.Generator().manual_seed(row.wish.seed)
            if mode == "always":
                trigger = encode(self.tokenizer, grammar.restore_reply())
                self._force(part, [*trigger, self.special.eos])
                self._feed_all(part, [self.special.bos, *trigger])  # the end is fed with those of others
                self._park(part)
                continue
            prefix = encode(self.tokenizer, grammar.direct_prefix()) if mode == "never" else []
            self._force(part, prefix)
            *fed, last = [self.special.bos, *prefix]
            if fed:
                self._feed_all(part, fed)
            for row in members:
                row.pending = last
            joined.append(part)
        self._run(joined)

    def _force(self, part: Rows, ids: list[int]) -> None:
        """Begin a reply of every row with these ids, which are not sampled."""
        for row in part.trajectories:
            row.replies.append(Reply(list(ids), [], len(ids)))

    def _feed_all(self, part: Rows, ids: list[int]) -> None:
        feed(self.model, part, torch.tensor([ids] * len(part.trajectories), device=part.rope.device))

    def _run(self, parts: Sequence[Rows]) -> None:
        """Let these rows decode with those that do. Joining copies, so room that nobody uses is given back here."""
        parts = [*([self.running] if self.running else []), *parts]
        if not parts:
            return
        if len(parts) > 1:
            room = max(int(part.cache.lengths.max()) for part in parts) + ROOM
            for part in parts:
                part.cache.keys = [keys[:, :, :room] for keys in part.cache.keys]
                part.cache.values = [values[:, :, :room] for values in part.cache.values]
        self.running = Rows.join(parts)

    # --- decoding ---------------------------------------------------------------------------------------------------

    def _decode(self) -> list[tuple[Row, str]]:
        """One token for every running row; returns those that have ended, and how."""
        rows = self.running
        fed = torch.tensor([[row.pending] for row in rows.trajectories], device=rows.rope.device)
        chosen = _choose(feed(self.model, rows, fed)[:, : self.known], rows.trajectories)
        self.written += len(chosen)
        leave, asks, ended = [], [], []
        for i, (row, token) in enumerate(zip(rows.trajectories, chosen, strict=True)):
            row.pending = token
            row.said += 1
            row.replies[-1].ids.append(token)
            state = self._state(row)
            if state:
                leave.append(i)
            if state == "asks":
                asks.append(i)
            elif state:
                ended.append((row, state))
            elif row.streams:
                row.changed()
        if asks:
            self._park(rows.select(asks))
        self._ending = [row for row, _ in ended]
        if leave:
            self._leave(leave)
        return ended

    def _state(self, row: Row) -> str:
        """ "" while a row goes on, "asks" where it wants a restoration, else how it has ended."""
        reply = row.replies[-1]
        full = row.said >= row.wish.tokens
        if reply.ids[-1] == self.special.eos:
            if not self._last(row) and grammar.asks_restoration(decode(self.tokenizer, reply.ids)):
                return "length" if full else "asks"
            return "stop"
        if row.wish.stop and _stopped(row, self.tokenizer) is not None:
            return "stop"
        return "length" if full or len(reply.ids) - reply.forced >= self.options.max_tokens else ""

    def _last(self, row: Row) -> bool:
        """Whether the reply that a row is writing is its last one, whatever it says."""
        if row.wish.restore in ("never", "plain") or row.conversation.bank is None:
            return True
        return len(row.restorations) >= self.options.max_restorations

    def _finish(self, row: Row, how: str) -> None:
        row.texts = row_texts(row, self.tokenizer)
        if row.wish.pictures and row.restorations:
            with self._timed("pictures"):
                row.pictures = [self.answerer.pictures(r.x0[None], r.grid)[0] for r in row.restorations]
        row.end(how)

    def _leave(self, numbers: Sequence[int]) -> None:
        self.running.drop(numbers)
        if not self.running.trajectories:
            self.running = None

    def _drop_gone(self) -> None:
        """Rows whose client hung up leave, wherever they are."""
        if self.running is not None and (gone := _gone(self.running)):
            self._leave(gone)
        kept = []
        for part in self.parked:
            if gone := _gone(part):
                part.drop(gone)
            if part.trajectories:
                kept.append(part)
        self.parked = kept

    # --- restoring --------------------------------------------------------------------------------------------------

    def _park(self, part: Rows) -> None:
        for row in part.trajectories:
            row.since = self.steps
        self.parked.append(part)

    def _restore(self) -> None:
        """Denoise for all rows that wait, one batch for each size of picture, and let them decode again."""
        waiting = Rows.join(self.parked)
        self._feed_all(waiting, [self.special.eos])
        groups: dict[tuple, list[int]] = {}
        for i, row in enumerate(waiting.trajectories):
            groups.setdefault((row.conversation.prompt.latent_grid, row.wish.feedback), []).append(i)
        done = []
        for (grid, feedback), members in groups.items():
            part = waiting if len(groups) == 1 else waiting.select(members)
            prompts = [row.conversation.prompt for row in part.trajectories]
            options = replace(self.options, feedback=feedback)
            restore(self.model, part, prompts, grid, options, reencode=self.answerer.reencode)
            self.restored += len(members)
            for row in part.trajectories:
                row.replies.append(Reply())
                row.pending = self.special.bos
                if row.streams:
                    row.changed()
            done.append(part)
        self.parked = []
        self._run(done)


def row_texts(row: Row, tokenizer) -> list[str]:
    """The replies of a row as text so far, the last one cut before a stop text."""
    texts = [decode(tokenizer, reply.ids) for reply in list(row.replies)]
    if row.wish.stop and texts and (at := _stopped(row, tokenizer)) is not None:
        texts[-1] = texts[-1][:at]
    return texts


def _stopped(row: Row, tokenizer) -> int | None:
    """Where in the text of the last reply the first stop text begins, behind what was forced; None without one."""
    reply = row.replies[-1]
    text, forced = decode(tokenizer, reply.ids), len(decode(tokenizer, reply.ids[: reply.forced]))
    return min((at for at in (text.find(stop, forced) for stop in row.wish.stop) if at >= 0), default=None)


def _gone(rows: Rows) -> list[int]:
    return [i for i, row in enumerate(rows.trajectories) if row.gone]


def _chunks(rows: Iterable[Row]) -> Iterable[list[Row]]:
    """Rows whose prompts are read together: PREFILL says how many."""
    chunk: list[Row] = []
    longest = 0
    for row in rows:
        tokens = max(longest, row.conversation.tokens)
        if chunk and (len(chunk) + 1) * tokens**2 > PREFILL:
            yield chunk
            chunk, tokens = [], row.conversation.tokens
        chunk.append(row)
        longest = tokens
    if chunk:
        yield chunk


def _choose(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of every row from logits (B, V): the best one, or drawn from the row's own stream."""
    best = logits.argmax(-1).tolist()
    return [_draw(logits[i], row) if row.wish.temperature > 0 else best[i] for i, row in enumerate(rows)]


def _draw(logits: Tensor, row: Row) -> int:
    """A token by temperature and top_p (the fewest most likely tokens that together have this probability)."""
    logits = logits.cpu().double()  # by a temperature of 1e-40 a float32 is infinite, and the best token's 0 / 0
    shares = torch.softmax((logits - logits.max()) / row.wish.temperature, -1)
    if row.wish.top_p < 1:
        ordered, index = shares.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        shares = torch.zeros_like(shares).scatter(0, index, ordered * (before < row.wish.top_p))
        if not shares.any():  # top_p = 0
            return int(index[0])
    return int(torch.multinomial(shares, 1, generator=row.generator))
