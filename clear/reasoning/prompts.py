"""The prompt of a conversation: system text, image (latent, then ViT), question (METHOD §3 "Sequence", §5).

A `Prompt` holds what one (image, question) costs the model; its segments are the same in training and inference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clear.data.records import Question
from clear.errors import ClearError
from clear.model.images import ImageBank
from clear.model.sequence import LATENT, VIT, Gap, Image, Segment, Text
from clear.model.tokenizer import encode
from clear.sources.scenes.words import LABELS, lists_options

SYSTEM = (
    "You answer questions about an image that may be degraded. First write your reasoning between <think> and "
    "</think>: say what is visible, whether the quality is sufficient for this question, and why. If blur, noise, "
    "darkness, compression or an obstruction hides what the question needs, end the reply with <image_restore>; you "
    "will then see a restored image, think again, restating the question, and answer. If the evidence is already "
    "there, do not restore. Put the final answer, as short as possible, between <answer> and </answer>."
)


@dataclass(frozen=True)
class Prompt:
    """Model inputs of one question about one image. latent (N, C), patches (M, 3p²), grids in tokens.

    Without latent and patches it is a question about no image, which nothing can be restored for.
    """

    system: tuple[int, ...]
    question: tuple[int, ...]
    latent: Tensor | None = None
    latent_grid: tuple[int, int] = (0, 0)
    patches: Tensor | None = None
    vit_grid: tuple[int, int] = (0, 0)

    def segments(self, drop_vit: bool = False, drop_system: bool = False, drop_question: bool = False) -> list[Segment]:
        """The layout of the prompt; a dropped ViT split keeps its rope increment, a dropped text does not."""
        image: tuple[Segment, ...] = ()
        if self.latent is not None:
            image = Image(LATENT, self.latent_grid), Gap() if drop_vit else Image(VIT, self.vit_grid)
        system = [Text(self.system)] if self.system and not drop_system else []
        return [*system, *image, *([] if drop_question else [Text(self.question)])]

    @property
    def positions(self) -> int:
        """Rope positions: one for each token of a text and its two markers, one for each picture's tokens together."""
        return sum(len(part.ids) + 2 if isinstance(part, Text) else 1 for part in self.segments())


def question_text(question: Question) -> str:
    """The question as a model or a judge reads it: with its options, as the text lists them or else one letter a line.

    Everything that shows a question goes through here. An option without text keeps its letter and is not shown (a
    benchmark's table may have lost it). Raises ClearError if all are without, and for more options than letters.
    """
    if not question.options or lists_options(question.text, question.options):
        return question.text
    named = f"question {question.id}: {question.text[:80]!r}"
    if len(question.options) > len(LABELS):
        raise ClearError(f"{named} has {len(question.options)} options; at most {len(LABELS)} can be named, {LABELS}.")
    choices = [(label, " ".join(option.split())) for label, option in zip(LABELS, question.options, strict=False)]
    shown = [f"{label}. {option}" for label, option in choices if option]
    if not shown:
        raise ClearError(f"{named} has {len(choices)} options, all empty; fill them in, or remove the question.")
    return "\n".join([question.text, *shown])


def pictured(bank: ImageBank, image: int, system: Sequence[int], question: Sequence[int]) -> Prompt:
    """The prompt of these texts (token ids) with image number `image` of an encoded bank."""
    grids = bank.latent_grid(image), bank.vit_grid(image)
    return Prompt(tuple(system), tuple(question), bank.latents[image], grids[0], bank.patches(image), grids[1])


def outlined(bank: ImageBank, image: int, system: Sequence[int], question: Sequence[int]) -> Prompt:
    """As `pictured`, but with empty tensors: the layout and the positions alone, of a bank that need not be encoded."""
    none = torch.empty(0)
    grids = bank.latent_grid(image), bank.vit_grid(image)
    return Prompt(tuple(system), tuple(question), none, grids[0], none, grids[1])


class Prompts(Sequence[Prompt]):
    """The prompts of (image number, question) pairs over an encoded bank, each made when it is read.

    Kept are the token ids. ViT patches of a picture of 518 px are 3.2 MB, too much for every question of a training.
    """

    def __init__(self, tokenizer, bank: ImageBank, asked: Sequence[tuple[int, Question]], system: str) -> None:
        """`system` is "" for models without a system prompt. Raises ClearError as `encode` and `question_text`."""
        self._bank = bank
        self._system = tuple(encode(tokenizer, system)) if system else ()
        self._asked = [(image, tuple(encode(tokenizer, question_text(question)))) for image, question in asked]

    def __len__(self) -> int:
        return len(self._asked)

    def __getitem__(self, n):
        if isinstance(n, slice):
            return [self[k] for k in range(*n.indices(len(self)))]
        image, question = self._asked[n]
        return pictured(self._bank, image, self._system, question)

    def outline(self, n: int) -> Prompt:
        """Prompt `n` as `outlined`."""
        image, question = self._asked[n]
        return outlined(self._bank, image, self._system, question)
