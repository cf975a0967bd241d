"""Questions in, answers out: a loaded model with its autoencoder and tokenizer behind the engine.

What the stages `traces` and `evaluate` and the command `clear ask` share.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clear.data.records import Question
from clear.data.workspace import completing
from clear.errors import ClearError
from clear.model import lora
from clear.model.bagel import Bagel
from clear.model.flow import Guidance
from clear.model.images import ImageBank, autoencoder_batch, check_geometry, to_uint8, vit_patches
from clear.model.latents import LatentStore
from clear.model.offload import wait_in_host_memory
from clear.model.runtime import autocast, device, stored
from clear.model.tokenizer import encode
from clear.model.vae import AutoEncoder, unpatchify
from clear.reasoning.engine import Options, Trajectory, generate
from clear.reasoning.grammar import extract_answer
from clear.reasoning.prompts import SYSTEM, Prompt, Prompts
from clear.schema import Config, Sampling


@dataclass(frozen=True)
class Answer:
    """What a model did with one question. `latent` is the last denoised latent (N, C), if it restored.

    `probability` is that of the last reply's own tokens, given what was forced.
    """

    replies: tuple[str, ...]
    prediction: str
    tokens: int
    probability: float
    latent: Tensor | None
    grid: tuple[int, int] | None

    @property
    def restored(self) -> bool:
        """Whether a picture was restored on the way."""
        return self.latent is not None

    @property
    def trace(self) -> str:
        """The whole output, with a mark where the restored picture entered."""
        return joined(self.replies)


def joined(replies: Sequence[str]) -> str:
    """The replies of a row as one output, with a mark where a restored picture entered."""
    return "\n[restored image]\n".join(replies)


_APART = 1_000_003
"""Places between the noise of one vote and of the next: more than a benchmark has questions."""


def _elected(cast: Sequence[Answer]) -> Answer:
    """The answer that `Answerer.vote` chooses of these."""
    weights: dict[str, tuple[int, float]] = {}
    for answer in cast:
        number, probability = weights.get(answer.prediction, (0, 0.0))
        weights[answer.prediction] = number + 1, probability + answer.probability
    best = max(weights, key=weights.__getitem__)
    chosen = next(answer for answer in cast if answer.prediction == best)
    return replace(chosen, tokens=sum(answer.tokens for answer in cast))


def guidance(sampling: Sampling) -> Guidance:
    """Classifier-free guidance of a configuration; off where `text_guidance` is 1."""
    s = sampling
    scales = s.text_guidance, s.image_guidance
    return Guidance(*scales, s.guidance_from, s.guidance_to, s.guidance_renorm, s.guidance_renorm_min)


@dataclass
class Answerer:
    """A model ready to answer; `store` keeps the latents of the images it is shown."""

    model: Bagel
    vae: AutoEncoder
    tokenizer: object
    config: Config
    store: LatentStore | None = None

    @classmethod
    def load(cls, folder: Path | str, config: Config, latents: Path | None = None) -> "Answerer":
        """Load a folder with weights, or with an adapter on weights; weights alone are completed from `model.base`, or
        else from `model.checkpoint`. `latents` is the folder of its store, if any.

        Raises ClearError if it has no tokenizer, or cuts images otherwise than `config.model` does, and as `device`.
        """
        dtype, kind = stored(config)
        base, rest = config.model.checkpoint or None, completing(config)
        place = device(config)
        start = "cpu" if config.runtime.offload else place
        model, vae, tokenizer = lora.load_model(folder, dtype, start, base, rest, kind)
        if config.runtime.offload:
            wait_in_host_memory(model, place)
            vae.to(place)
        if tokenizer is None:
            raise ClearError(f"{folder}: tokenizer.json is missing; copy it from the checkpoint the model came from.")
        check_geometry(config.model, model.config, folder)
        return cls(model, vae, tokenizer, config, LatentStore(latents, vae) if latents else None)

    @property
    def options(self) -> Options:
        """Greedy answering under `config.sampling`."""
        s = self.config.sampling
        return Options(
            flow_steps=s.flow_steps,
            shift=s.shift,
            max_tokens=s.max_think_tokens,
            max_restorations=s.max_restorations,
            batch=s.batch,
            guidance=guidance(s),
        )

    @property
    def system(self) -> str:
        """The system prompt of this profile."""
        return SYSTEM if self.config.sampling.system_prompt else ""

    def check_question(self, text: str) -> None:
        """Raise ClearError for a question that the model cannot be asked: as `encode`, and as `check_length`."""
        system, question = (tuple(encode(self.tokenizer, part)) if part else () for part in (self.system, text))
        none = torch.empty(0)
        self.check_length(Prompt(system, question, latent=none, patches=none))

    def check_length(self, prompt: Prompt) -> None:
        """Raise ClearError for a prompt with more positions than the model was trained on."""
        most, taken = self.model.config.llm.positions, prompt.positions
        if most and taken > most:
            raise ClearError(
                f"The question takes {len(prompt.question)} tokens and its prompt {taken} positions, this model has "
                f"{most} (max_position_embeddings in llm_config.json); shorten it."
            )

    def bank(self, images: Sequence[bytes], names: Sequence[str]) -> ImageBank:
        """Decode and encode images once for all questions about them."""
        return ImageBank(images, self.config.model, names).encode(self.vae, store=self.store)

    def prompts(self, bank: ImageBank, asked: Sequence[tuple[int, Question]]) -> Prompts:
        """The prompts of (image number, question) pairs. Raises ClearError as `encode` and `check_length`."""
        found = Prompts(self.tokenizer, bank, asked, self.system)
        for n in range(len(found)):
            self.check_length(found.outline(n))
        return found

    def answer(
        self,
        bank: ImageBank,
        asked: Sequence[tuple[int, Question]],
        restore: str = "auto",
        feedback: str = "bridge",
        progress: Callable[[int], None] | None = None,
        first: int | Sequence[int] = 0,
    ) -> list[Answer]:
        """Answer (image number, question) pairs in order. Noise depends on the seed and the place in the list only.

        For a part of a longer list, `first` is the place of its first question there, or the place of each. Raises
        ClearError as `encode` and `check_length`.
        """
        prompts = self.prompts(bank, asked)
        seed = self.config.seed
        noise = seed + first if isinstance(first, int) else tuple(seed + place for place in first)
        options = replace(self.options, restore=restore, feedback=feedback, noise_seed=noise)
        with autocast(self.model):
            done = generate(
                self.model,
                self.tokenizer,
                prompts,
                options,
                reencode=self.reencode,
                progress=progress,
            )
        return [self._answer(trajectory) for trajectory in done]

    def answers(
        self,
        bank: ImageBank,
        asked: Sequence[tuple[int, Question]],
        restore: str = "auto",
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Answer]:
        """As `answer`, a batch at a time: of many questions, whose restored latents are megabytes each."""
        size = self.config.sampling.batch
        for start in range(0, len(asked), size):
            yield from self.answer(bank, asked[start : start + size], restore, progress=progress, first=start)

    def vote(
        self,
        bank: ImageBank,
        asked: Sequence[tuple[int, Question]],
        answers: Sequence[Answer],
        votes: int,
        feedback: str = "bridge",
        first: int = 0,
    ) -> list[Answer]:
        """`answers` to `asked`, of which each that restored is elected from `votes` restorations of other noise.

        The most frequent prediction wins, of several the one of the highest probability together; the answer is the
        first that gives it, and its tokens are those of all. `feedback` and `first` as in `answer`.
        """
        again = [n for n, answer in enumerate(answers) if answer.restored]
        cast = {n: [answers[n]] for n in again}
        for vote in range(1, votes if again else 1):
            places = [first + n + vote * _APART for n in again]
            more = self.answer(bank, [asked[n] for n in again], "always", feedback, first=places)
            for n, answer in zip(again, more, strict=True):
                cast[n].append(answer)
        return [_elected(cast[n]) if n in cast else answer for n, answer in enumerate(answers)]

    def _answer(self, trajectory: Trajectory) -> Answer:
        texts = tuple(trajectory.texts(self.tokenizer))
        last = trajectory.restorations[-1] if trajectory.restorations else None
        return Answer(
            texts,
            extract_answer(texts[-1]),
            sum(len(reply.ids) for reply in trajectory.replies),
            math.exp(sum(trajectory.replies[-1].log_probs)),
            last.x0 if last else None,
            last.grid if last else None,
        )

    @torch.inference_mode()
    def pictures(self, latents: Tensor, grid: tuple[int, int]) -> list[np.ndarray]:
        """Latents (B, N, C) of one grid to uint8 pictures (H, W, 3), in float32 wherever they are asked for."""
        z = unpatchify(latents.float(), grid, self.config.model.latent_patch)
        height, width = (self.vae.config.downsample * side for side in z.shape[-2:])
        with torch.autocast(z.device.type, enabled=False):
            parts = z.split(autoencoder_batch(height, width))
            return [to_uint8(image) for part in parts for image in self.vae.decode(part)]

    def reencode(self, latents: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Decode-reencode (the bridge's alternative): latents (B, N, C) → ViT patches (B, M, F) and their grid."""
        made = [vit_patches(array, self.config.model) for array in self.pictures(latents, grid)]
        return torch.stack([patches for patches, _ in made]).to(latents.device), made[0][1]
