"""The prompt of a conversation: system text, image (latent, then ViT), question (METHOD §3 "Sequence", §5).

A `Prompt` holds what one (image, question) costs the model; its segments are the same in training and inference.
"""

from dataclasses import dataclass

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


def make_prompt(tokenizer, bank: ImageBank, image: int, text: str, system: str) -> Prompt:
    """Prompt for image number `image` of an encoded bank. `system` is "" for models without a system prompt."""
    return Prompt(
        tuple(encode(tokenizer, system)) if system else (),
        tuple(encode(tokenizer, text)),
        bank.latents[image],
        bank.latent_grid(image),
        bank.patches(image),
        bank.vit_grid(image),
    )
