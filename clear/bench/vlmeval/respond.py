"""Who answers the rows of a table: a model folder, here or on a Dask cluster, or a model behind an endpoint.

Both answer a shard of rows at a time. The shards of a folder are one batch of the engine each (`sampling.batch`), cut
from the table in its order whatever is already done, so that an answer does not depend on interruptions; the noise of a
restoration depends on the row's number in the table.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from clear.bench.answers import digest_of, loaded
from clear.data.images import decode_image, encode_image
from clear.data.pool import parallel
from clear.data.records import Question
from clear.errors import ClearError
from clear.llm.endpoint import Client, EndpointError, Outage, Reply, Request, messages
from clear.reasoning.output import answer

if TYPE_CHECKING:
    from clear.reasoning.answering import Answerer
    from clear.schema import Config


@dataclass(frozen=True)
class Asked:
    """A row: its index, the text that is asked, and the encoded picture."""

    index: str
    text: str
    image: bytes


@dataclass(frozen=True)
class Given:
    """What came of a row: a prediction with its trace, or the `reject` reason (and `detail`) why there is none.

    `restored` is None where the server does not say. `seconds` is the row's share of its shard's. `passing` marks a
    reject that another attempt may not meet: it is asked again by the next run.
    """

    index: str
    prediction: str = ""
    trace: str = ""
    restored: bool | None = None
    tokens: int = 0
    seconds: float | None = None
    reject: str = ""
    detail: str = ""
    passing: bool = False


@dataclass(frozen=True)
class Shard:
    """Rows that are answered together. `number` counts shards, `first` is the number of the first row."""

    number: int
    first: int
    rows: tuple[Asked, ...]


class Respondent(Protocol):
    """Whoever answers."""

    size: int
    """Rows of a shard."""

    def identity(self) -> dict:
        """What answers are a function of, beside the table: kept with them, and compared before they are reused."""

    def respond(self, shards: Iterable[Shard]) -> Iterator[list[Given]]:
        """One list for each shard, in order."""


@dataclass(frozen=True)
class Folder:
    """A model folder under `config`; `cluster` is the address of a Dask scheduler, "" for this process.

    `digest`, if given, is what the files must be where they are loaded.
    """

    folder: Path
    config: "Config"
    restore: str = "auto"
    feedback: str = "bridge"
    cluster: str = ""
    digest: str = ""

    @property
    def size(self) -> int:
        """One batch of the engine."""
        return self.config.sampling.batch

    def identity(self) -> dict:
        """The files of the folder by their hashes, and the settings."""
        from dataclasses import asdict

        settings = {"sampling": asdict(self.config.sampling), "seed": self.config.seed}
        shapes = {k: v for k, v in asdict(self.config.model).items() if k not in ("checkpoint", "base")}
        how = {"restore": self.restore, "feedback": self.feedback}
        if (kind := self.config.runtime.weights) != "float32":  # unnamed, as in journals of before
            how["weights"] = kind
        return {"files": digest_of(self.folder, self.config)} | settings | {"model": shapes} | how

    def respond(self, shards: Iterable[Shard]) -> Iterator[list[Given]]:
        """Answer the shards; the model is loaded once for each process. Raises ClearError as `parallel`."""
        digest = digest_of(self.folder, self.config) if self.cluster else ""
        there = replace(self, folder=self.folder.absolute(), digest=digest)
        jobs = ((there, shard) for shard in shards)
        yield from parallel(_answer, jobs, workers=1, cluster=self.cluster, chunk=1, option="--cluster")


def _answer(job: tuple[Folder, Shard]) -> list[Given]:
    """Answer one shard with a folder. A row that cannot be read or asked is rejected alone."""
    model, shard = job
    with loaded(model.folder, model.config, model.digest, "leave out --cluster") as answerer:
        rejected = {row.index: found for row in shard.rows if (found := _unusable(answerer, row))}
        good = [row for row in shard.rows if row.index not in rejected]
        given: dict[str, Given] = {}
        if good:
            start = perf_counter()
            bank = answerer.bank([row.image for row in good], [row.index for row in good])
            asked = [(n, Question(row.index, "table", row.text, "")) for n, row in enumerate(good)]
            found = answerer.answer(bank, asked, model.restore, model.feedback, first=shard.first)
            seconds = (perf_counter() - start) / len(good)
            for row, one in zip(good, found, strict=True):
                made = Given(row.index, answer(one.replies), one.trace, one.restored, one.tokens, seconds)
                given[row.index] = made
    return [rejected.get(row.index) or given[row.index] for row in shard.rows]


def _unusable(answerer: "Answerer", row: Asked) -> Given | None:
    """Why the model cannot be asked this row, if it cannot."""
    for reason, check in (
        ("image", lambda: decode_image(row.image, row.index)),
        ("question", lambda: answerer.check_question(row.text)),
    ):
        try:
            check()
        except ClearError as error:
            return Given(row.index, reject=reason, detail=str(error))
    return None


@dataclass(frozen=True)
class Served:
    """A model behind an endpoint, through a client that keeps every reply."""

    client: Client
    size: int = 64

    def identity(self) -> dict:
        """All that is sent beside the messages: the model's name, the settings and the wish, if there is one."""
        return {name: value for name, value in self.client.body(Request(())).items() if name != "messages"}

    def respond(self, shards: Iterable[Shard]) -> Iterator[list[Given]]:
        """Ask the rows of each shard at the same time. Raises Denied and BudgetSpent, which concern every row."""
        for shard in shards:
            given: dict[str, Given] = {}
            requests: dict[str, Request] = {}
            for row in shard.rows:
                try:
                    picture, kind = _sendable(row)
                    requests[row.index] = Request(messages(row.text, picture, kind=kind))
                except ClearError as error:
                    given[row.index] = Given(row.index, reject="image", detail=str(error))
            replies = self.client.ask_all(requests.values())
            given |= {index: _given(index, reply) for index, reply in zip(requests, replies, strict=True)}
            yield [given[row.index] for row in shard.rows]


def _sendable(row: Asked) -> tuple[bytes, str]:
    """The picture as PNG or JPEG, which every server reads, and which of the two. Raises ClearError as decode_image."""
    array = decode_image(row.image, row.index)
    if row.image.startswith(b"\xff\xd8\xff"):
        return row.image, "jpeg"
    return (row.image if row.image.startswith(b"\x89PNG") else encode_image(array)), "png"


def _given(index: str, reply: Reply | EndpointError) -> Given:
    if isinstance(reply, EndpointError):
        return Given(index, reject=reply.kind, detail=str(reply), passing=isinstance(reply, Outage))
    return Given(index, answer([reply.text]), reply.text, None, reply.completion_tokens)


def shards_of(rows: Iterable[Asked], size: int) -> Iterator[Shard]:
    """The rows in their order, `size` to a shard."""
    held: list[Asked] = []
    number = first = 0
    for row in rows:
        held.append(row)
        if len(held) == size:
            yield Shard(number, first, tuple(held))
            number, first, held = number + 1, first + len(held), []
    if held:
        yield Shard(number, first, tuple(held))
