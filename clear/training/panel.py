"""A picture of what the model does while it is trained: held-out images clean, degraded and restored, and the trace."""

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import nn

from clear.data.records import Sample, read_samples
from clear.reasoning.answering import Answer, Answerer
from clear.schema import Config
from clear.training.load import Incoming
from clear.training.loop import sharded

HELD_OUT = Path("data/degraded/validation")
_ROWS, _CELL, _TEXT, _LINE = 4, 160, 360, 12  # pictures; px of a cell, of the text's column and of its lines


def panel(start: Incoming, config: Config, restore: str = "always", feedback: str = "bridge") -> Callable | None:
    """What draws the panel of `start.model` as it is when called (RGB); None where it cannot be drawn.

    `restore` and `feedback` as for `Answerer.answer`. Sharded weights cannot answer, and without held-out pictures
    there is nothing to ask about.
    """
    if sharded.enabled() or not HELD_OUT.exists():
        return None

    @cache  # read and encoded when first drawn
    def held() -> tuple:
        paired = [s for s in read_samples(HELD_OUT) if s.paired and s.questions]
        chosen = paired[:: max(1, len(paired) // _ROWS)][:_ROWS]
        answerer = Answerer(start.model, start.vae, start.tokenizer, config, start.store)
        return chosen, answerer, answerer.bank([s.seen for s in chosen], [s.key for s in chosen])

    def draw() -> Image.Image:
        chosen, answerer, bank = held()
        with _answering(start.model):
            asked = [(i, s.questions[0]) for i, s in enumerate(chosen)]
            answers = answerer.answer(bank, asked, restore=restore, feedback=feedback)
            restored = [answerer.pictures(a.latent[None], a.grid)[0] if a.restored else None for a in answers]
        return _drawn(chosen, answers, [None if array is None else Image.fromarray(array) for array in restored])

    return draw


@contextmanager
def _answering(model: nn.Module) -> Iterator[None]:
    """Inside, every part of the model is in evaluation mode; afterwards as it was (frozen parts may be apart)."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _drawn(samples: list[Sample], answers: list[Answer], restored: list[Image.Image | None]) -> Image.Image:
    sheet = Image.new("RGB", (3 * _CELL + _TEXT, len(samples) * _CELL), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (sample, answer, made) in enumerate(zip(samples, answers, restored, strict=True)):
        top, clean, seen = row * _CELL, _opened(sample.image), _opened(sample.seen)
        for column, picture in enumerate((clean, seen, made)):
            if picture is not None:
                picture.thumbnail((_CELL, _CELL))
                sheet.paste(picture, (column * _CELL, top))
        question = sample.questions[0]
        text = f"{sample.corruption} {sample.severity}\n{question.text}\n{answer.trace}"
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, _TEXT // 7) or [""]]
        draw.multiline_text((3 * _CELL + 6, top + 2), "\n".join(lines[: _CELL // (_LINE + 4)]), "black")
    return sheet


def _opened(encoded: bytes) -> Image.Image:
    return Image.open(BytesIO(encoded)).convert("RGB")
