"""OpenAI's chat completions: which requests are accepted, and how answers are written.

A field that would change the answer and that this server does not know is refused by name; a field with the value that
changes nothing is accepted, because clients send those. Beyond OpenAI there is one field, `clear`, in requests and in
answers, and `reasoning_content`, which holds the thinking, as vLLM has it.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from clear.data.io import json_values
from clear.serve.errors import ApiError

MOST_CHOICES = 16
"""The largest `n`."""

MOST_VALUES = 2**16
"""The most values (`json_values`) that a request may have. No model's context holds a conversation of more, and to
parse them keeps Python's lock: ten million wrong ones, 20 MiB, did so for minutes."""

_NEUTRAL: dict[str, tuple] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "functions": ([],),
}
"""Fields of OpenAI and vLLM that are accepted with these values only."""

_NOTES = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that change no answer; what they hold is dropped."""


_FORM = re.compile(r"str|(constrained-)?list\b.*|constrained-.*")
"""What pydantic adds to the place of an error to say which form of a field it has tried."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImageUrl(BaseModel):
    """`url`: data:image/…;base64,… or, where the server allows it, http(s)://…; anything else here changes nothing."""

    url: str


class Part(BaseModel):
    """A part of a message: a text, or a picture."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class Message(BaseModel):
    """One turn. `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=2**10)] | None = None


class StreamOptions(BaseModel):
    """`include_usage`: one more event with the tokens."""

    include_usage: bool = False


class Extra(_Strict):
    """This server's own options: how to restore, how the restored picture is read, whether it is sent back."""

    restore: Literal["auto", "always", "never", "plain"] | None = None
    feedback: Literal["bridge", "reencode"] | None = None
    pictures: bool = False


class ChatRequest(BaseModel):
    """A chat completion. Without `temperature` the answer is greedy."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1), FailFast()]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    clear: Extra | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end a reply."""
        return tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop or ()))


def parse(body: bytes) -> ChatRequest:
    """A request from its bytes. Raises ApiError (400) naming the field that is wrong."""
    if (values := json_values(body)) > MOST_VALUES:
        raise ApiError(400, f"the body: about {values:,} values, and a request may have {MOST_VALUES:,}; send fewer.")
    try:
        found = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        deepest = max(problems, key=lambda problem: len(problem["loc"]))  # a union names each of its forms
        param = ".".join(str(name) for name in deepest["loc"] if not _FORM.fullmatch(str(name))) or None
        raise ApiError(400, f"{param or 'the body'}: {deepest['msg']}.", param) from error
    for name, value in (found.model_extra or {}).items():
        if value is None or name in _NOTES:
            continue
        if name not in _NEUTRAL:
            raise ApiError(400, f"{name}: this server does not know this field; leave it out.", name, "unknown")
        if not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
            raise ApiError(400, f"{name}: this server cannot do that; leave it out.", name, "unsupported")
    return found


def _same(value: Any, other: Any) -> bool:
    """Equality of JSON values: True == 1 for Python only."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


# --- answers --------------------------------------------------------------------------------------------------------


def usage(prompt: int, completion: int) -> dict[str, int]:
    """The tokens of a request."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def completion(id: str, created: int, model: str, choices: Sequence[dict[str, Any]], used: dict[str, int]) -> dict:
    """A whole answer."""
    head = {"id": id, "object": "chat.completion", "created": created, "model": model}
    return head | {"choices": list(choices), "usage": used}


def chunk(id: str, created: int, model: str, choices: Sequence[dict[str, Any]]) -> dict:
    """An event of a streamed answer."""
    head = {"id": id, "object": "chat.completion.chunk", "created": created, "model": model}
    return head | {"choices": list(choices)}
