"""Ended rows as chat completions, whole or streamed.

The thinking is streamed as it is written. The answer comes in one piece when the last reply has ended: which block of
it is the answer, or whether the reply asks for a restoration instead, is not known before.
"""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from clear.data.images import encode_image
from clear.reasoning.answering import joined
from clear.reasoning.output import answer, thinking
from clear.serve.batch import Row
from clear.serve.protocol import chunk, completion, usage


def whole(rows: Sequence[Row], id: str, created: int, model: str) -> dict:
    """The answer to a request whose rows have ended; to be called as `extra`."""
    choices = [
        {
            "index": number,
            "message": {
                "role": "assistant",
                "content": answer(row.texts),
                "reasoning_content": thinking(row.texts),
                "clear": extra(row),
            },
            "logprobs": None,
            "finish_reason": row.finish,
        }
        for number, row in enumerate(rows)
    ]
    return completion(id, created, model, choices, tokens(rows))


def extra(row: Row) -> dict[str, Any]:
    """What only this server says of an ended row: the raw output, and what was restored.

    To be called beside the event loop: encoding a picture of 1024 px takes a quarter of a second.
    """
    said: dict[str, Any] = {"restored": bool(row.restorations), "trace": joined(row.texts)}
    if row.wish.pictures:
        encoded = (base64.b64encode(encode_image(picture)).decode() for picture in row.pictures)
        said["pictures"] = [f"data:image/png;base64,{text}" for text in encoded]
    return said


def tokens(rows: Sequence[Row]) -> dict[str, int]:
    """The prompt once, and the tokens of all choices."""
    written = sum(len(reply.ids) for row in rows for reply in row.replies)
    return usage(rows[0].conversation.tokens, written)


class Writer:
    """Turns what has happened to rows since last asked into events. `spoken` gives a row's replies as text so far."""

    def __init__(self, rows: Sequence[Row], spoken: Callable[[Row], list[str]], head: tuple[str, int, str]) -> None:
        self.rows, self.spoken, self.head = rows, spoken, head
        self._thought = [""] * len(rows)
        self._over = [False] * len(rows)

    def opening(self) -> Iterator[dict]:
        """An event for every choice that says who speaks."""
        for number in range(len(self.rows)):
            yield self._event(number, {"role": "assistant", "content": ""})

    async def news(self) -> AsyncIterator[dict]:
        """Further thoughts, and answers of the rows that have ended."""
        for number, row in enumerate(self.rows):
            finish = row.finish  # before the texts: the batch goes on meanwhile
            if self._over[number] or finish == "error":
                continue
            now = thinking(row.texts) if finish else thinking(self.spoken(row), True, row.wish.stop)
            before = self._thought[number]
            if len(now) > len(before) and now.startswith(before):
                self._thought[number] = now
                yield self._event(number, {"reasoning_content": now[len(before) :]})
            if finish:
                self._over[number] = True
                more = await asyncio.to_thread(extra, row)
                yield self._event(number, {"content": answer(row.texts), "clear": more})
                yield self._event(number, {}, finish)

    def usage(self) -> dict:
        """The last event, where the client has asked for it."""
        return chunk(*self.head, []) | {"usage": tokens(self.rows)}

    def _event(self, number: int, delta: dict[str, Any], finish: str | None = None) -> dict:
        choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": finish}
        return chunk(*self.head, [choice])
