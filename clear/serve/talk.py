"""From a request to what the model reads: one conversation with at most one picture, and a wish for each choice.

The picture stands before the text, wherever the client put it, because that is where the model has learned to see it.
Turns follow each other as texts. A system message is appended to the profile's own system prompt.
"""

import copy
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from clear.errors import ClearError
from clear.model.images import ImageBank
from clear.model.tokenizer import encode
from clear.reasoning.answering import Answerer
from clear.reasoning.prompts import Prompt
from clear.serve.batch import Conversation, Row, Wish, row_texts
from clear.serve.errors import ApiError
from clear.serve.pictures import check_pixels, fetch, from_data_url
from clear.serve.protocol import ChatRequest, Extra, Message
from clear.serve.settings import Settings


@dataclass(frozen=True)
class Picture:
    """A picture as it was sent, and the field it stands in."""

    url: str
    param: str

    @property
    def remote(self) -> bool:
        """Whether its bytes are elsewhere, not in the URL itself."""
        return self.url.lower().startswith(("http://", "https://"))


class _Shared:
    """A copy of a tokenizer that several threads use at once, and that holds up none of the others.

    `Tokenizer.encode` keeps the GIL until it is done, microseconds for each character; `encode_batch` releases it.
    Setting `encode_special_tokens` waits, with the GIL, until no thread encodes, so it is set once, here: what
    clear/model/tokenizer.py sets before every text is an attribute of this object only.
    """

    def __init__(self, tokenizer) -> None:
        self._own = copy.deepcopy(tokenizer)
        self._own.encode_special_tokens = True
        # In characters. In a byte-level vocabulary each stands for a byte, and a character of a text has at least one.
        self.longest = max(map(len, self._own.get_vocab()))

    def __getattr__(self, name: str):
        return getattr(self._own, name)

    def encode(self, text: str, add_special_tokens: bool):
        return self._own.encode_batch([text], add_special_tokens=add_special_tokens)[0]


class Reader:
    """Reads requests for one model; safe to use from several threads."""

    def __init__(self, answerer: Answerer, settings: Settings) -> None:
        self.answerer, self.settings = answerer, settings
        self._tokenizer = _Shared(answerer.tokenizer)

    def texts(self, request: ChatRequest) -> tuple[list[str], Picture | None]:
        """The system text (or "") and the turns of a request, and its picture, still to be fetched and decoded.

        Raises ApiError (400) for what the model cannot read, and for texts that are too long whichever tokens they
        have: no token is longer than the vocabulary's longest. White space counts, also where the tokenizer drops it.
        """
        systems, turns, pictures = _messages(request.messages)
        if len(pictures) > 1:
            what = f"{pictures[1].param}: {len(pictures)} pictures in one conversation; this model reads one."
            raise ApiError(400, what, pictures[1].param, "several_images")
        own = [self.answerer.system] if self.answerer.system else []
        system = "\n".join([*own, *systems])
        longest = self._tokenizer.longest
        least = sum(2 + -(-len(text) // longest) for text in ([system] if system else []) + turns)  # with two markers
        self._check_length(least, "at least ")
        return [system, *turns], pictures[0] if pictures else None

    def conversation(self, texts: Sequence[str]) -> Conversation:
        """The tokenised `texts` of a request, 1 to 2 s for a million characters. Raises ApiError (400)."""
        try:
            system, first, *more = (encode(self._tokenizer, text) for text in texts)
        except ClearError as error:
            raise ApiError(400, str(error), "messages") from error
        # Further turns as the layout writes texts one after another: each between its own two markers.
        special = self.answerer.model.config.special
        question = [*first, *(token for text in more for token in (special.eos, special.bos, *text))]
        found = Conversation(tuple(system), tuple(question), None)
        self._check_length(found.tokens)
        try:
            self.answerer.check_length(Prompt(found.system, found.question))
        except ClearError as error:
            raise ApiError(400, f"messages: {error}", "messages", "context_length_exceeded") from error
        return found

    def fetch(self, picture: Picture) -> bytes:
        """The bytes of a remote picture, where the operator allows it. Raises ApiError (400)."""
        if self.settings.fetch:
            return fetch(picture.url, self.settings.body, picture.param)
        what = f"{picture.param}: this server fetches no pictures; send a data URL (data:image/png;base64,…)."
        raise ApiError(400, what, picture.param)

    def decode(self, conversation: Conversation, picture: Picture, data: bytes | None) -> None:
        """Put a picture into its conversation; without `data` its URL has the bytes. Raises ApiError (400).

        Its pixels in the model's sizes are kept, its encoded bytes are not.
        """
        param = picture.param
        if data is None:
            data = from_data_url(picture.url, param)
        check_pixels(data, self.settings.pixels, param)
        images = [data]
        try:
            conversation.bank = ImageBank(images, self.answerer.config.model, [param])
        except ClearError as error:
            raise ApiError(400, str(error), param) from error
        images[0] = b""  # the bank has kept the pixels, as they are far below its KEPT_BYTES, and reads it no more
        self._check_length(conversation.tokens)

    def wishes(self, request: ChatRequest, pictured: bool) -> list[Wish]:
        """What each of the `n` choices is asked for. Raises ApiError (400) for a restoration without a picture.

        Choice k has the seed + k. Without a seed it is the one of `clear ask` where nothing is drawn, else a new one.
        """
        extra, settings = request.clear or Extra(), self.settings
        restore = extra.restore or settings.restore
        if restore == "always":
            lacks = "" if pictured else "the conversation has no picture"
            lacks = lacks if self.answerer.options.max_restorations else "sampling.max_restorations is 0 here"
            if lacks:
                raise ApiError(400, f"clear.restore: always, but {lacks}.", "clear.restore")
        temperature = request.temperature or 0.0
        seed = request.seed
        if seed is None:
            seed = secrets.randbits(48) if temperature > 0 else self.answerer.config.seed
        tokens = request.max_completion_tokens or request.max_tokens or settings.tokens
        first = Wish(
            restore=restore,
            feedback=extra.feedback or settings.feedback,
            temperature=temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            tokens=min(tokens, settings.tokens),
            stop=request.stops,
            seed=seed,
            pictures=extra.pictures,
        )
        return [replace(first, seed=seed + choice) for choice in range(request.n or 1)]

    def spoken(self, row: Row) -> list[str]:
        """The replies of a row as text so far."""
        return row_texts(row, self._tokenizer)

    def _check_length(self, tokens: int, bound: str = "") -> None:
        most = self.settings.prompt
        if tokens > most:
            what = f"messages: {bound}{tokens} tokens, this server reads at most {most}; shorten the conversation."
            raise ApiError(400, what, "messages", "context_length_exceeded")


def _messages(messages: list[Message]) -> tuple[list[str], list[str], list[Picture]]:
    """System texts, the texts of the turns, and the pictures with their places."""
    systems, turns, pictures = [], [], []
    for number, message in enumerate(messages):
        where = f"messages.{number}.content"
        text, found = _content(message, where)
        if found and message.role != "user":
            raise ApiError(400, f"{found[0].param}: only a user's message may have a picture.", found[0].param)
        pictures += found
        if message.role in ("system", "developer"):
            systems.append(text)
        else:
            turns.append(text)
    if not messages or messages[-1].role != "user":
        raise ApiError(400, "messages: the last one must be a user's.", "messages")
    return systems, turns, pictures


def _content(message: Message, where: str) -> tuple[str, list[Picture]]:
    if message.content is None or isinstance(message.content, str):
        return message.content or "", []
    texts, pictures = [], []
    for number, part in enumerate(message.content):
        if part.type == "text":
            if part.text is None:
                raise ApiError(400, f"{where}.{number}.text: missing.", f"{where}.{number}.text")
            texts.append(part.text)
        elif part.image_url is None:
            raise ApiError(400, f"{where}.{number}.image_url: missing.", f"{where}.{number}.image_url")
        else:
            pictures.append(Picture(part.image_url.url, f"{where}.{number}.image_url"))
    return "\n".join(texts), pictures
