"""One question about one image: what `clear ask` does with a file and `clear browse` with an upload."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clear.data.images import decode_image
from clear.data.records import Question
from clear.errors import ClearError, shown
from clear.model.runtime import apply_runtime
from clear.reasoning.answering import Answerer
from clear.schema import Config


@dataclass(frozen=True)
class Asked:
    """The trace, whether the model restored the image, its answer, and the restored picture (uint8) if any."""

    trace: str
    restored: bool
    answer: str
    picture: np.ndarray | None


def ask(image: Path, question: str, model_folder: Path, restore: str, config: Config) -> Asked:
    """Answer `question` about an image file. restore: auto, always or never."""
    if not image.is_file():
        raise ClearError(f"{shown(image)} is not a file; name a PNG or JPEG image.")
    data = image.read_bytes()
    decode_image(data, shown(image))  # a picture that cannot be read is refused before the model is loaded
    apply_runtime(config)
    asked = Question("ask", "ask", question, "")
    return reply(Answerer.load(model_folder, config), data, shown(image), asked, restore)


def reply(
    answerer: Answerer,
    image: bytes,
    name: str,
    question: Question,
    restore: str,
    feedback: str = "bridge",
    number: int = 0,
) -> Asked:
    """Answer one question about an encoded image, which errors call `name`; `number` seeds the restoration."""
    bank = answerer.bank([image], [name])
    answer = answerer.answer(bank, [(0, question)], restore, feedback, first=number)[0]
    picture = answerer.pictures(answer.latent[None], answer.grid)[0] if answer.restored else None
    return Asked(answer.trace, answer.restored, answer.prediction, picture)
