"""Questions in, answers out: a loaded model with its autoencoder and tokenizer behind the engine.

What the stages `traces` and `evaluate` and the command `clear ask` share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clear.config import Config
from clear.errors import ClearError
from clear.model.bagel import Bagel
from clear.model.checkpoint import load_bagel
from clear.model.images import ImageBank, resize, target_size, to_uint8
from clear.model.vae import AutoEncoder, patchify, unpatchify
from clear.reasoning.engine import Options, Trajectory, generate
from clear.reasoning.grammar import extract_answer
from clear.reasoning.prompts import SYSTEM, make_prompt, question_text
from clear.records import Question


@dataclass(frozen=True)
class Answer:
    """What a model did with one question. `latent` is the last denoised latent (N, C), if it restored."""

    replies: tuple[str, ...]
    prediction: str
    tokens: int
    latent: Tensor | None
    grid: tuple[int, int] | None

    @property
    def restored(self) -> bool:
        """Whether a picture was restored on the way."""
        return self.latent is not None

    @property
    def trace(self) -> str:
        """The whole output, with a mark where the restored picture entered."""
        return "\n[restored image]\n".join(self.replies)


@dataclass
class Answerer:
    """A model ready to answer."""

    model: Bagel
    vae: AutoEncoder
    tokenizer: object
    config: Config

    @classmethod
    def load(cls, folder: Path | str, config: Config) -> "Answerer":
        """Load a model folder. Raises ClearError if it has no tokenizer."""
        device = "cuda" if config.runtime.device != "cpu" and torch.cuda.is_available() else "cpu"
        model, vae, tokenizer = load_bagel(folder, device=device)
        if tokenizer is None:
            raise ClearError(f"{folder}: tokenizer.json is missing; copy it from the checkpoint the model came from.")
        return cls(model, vae, tokenizer, config)

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
        )

    @property
    def system(self) -> str:
        """The system prompt of this profile."""
        return SYSTEM if self.config.sampling.system_prompt else ""

    def bank(self, images: Sequence[bytes], names: Sequence[str]) -> ImageBank:
        """Decode and encode images once for all questions about them."""
        return ImageBank(images, self.config.model, names).encode(self.vae)

    def answer(
        self,
        bank: ImageBank,
        asked: Sequence[tuple[int, Question]],
        restore: str = "auto",
        feedback: str = "bridge",
        progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Answer (image number, question) pairs in order. Noise depends on the seed and the place in the list only."""
        prompts = [make_prompt(self.tokenizer, bank, i, question_text(q), self.system) for i, q in asked]
        options = replace(self.options, restore=restore, feedback=feedback, noise_seed=self.config.seed)
        done = generate(
            self.model,
            self.tokenizer,
            prompts,
            options,
            reencode=self.reencode,
            progress=progress,
        )
        return [self._answer(trajectory) for trajectory in done]

    def _answer(self, trajectory: Trajectory) -> Answer:
        texts = tuple(trajectory.texts(self.tokenizer))
        last = trajectory.restorations[-1] if trajectory.restorations else None
        return Answer(
            texts,
            extract_answer(texts[-1]),
            sum(len(reply.ids) for reply in trajectory.replies),
            last.x0 if last else None,
            last.grid if last else None,
        )

    @torch.inference_mode()
    def pictures(self, latents: Tensor, grid: tuple[int, int]) -> list[np.ndarray]:
        """Latents (B, N, C) of one grid to uint8 pictures (H, W, 3)."""
        z = unpatchify(latents, grid, self.config.model.latent_patch)
        return [to_uint8(image) for image in self.vae.decode(z)]

    def reencode(self, latents: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Decode-reencode (the bridge's alternative): latents (B, N, C) → ViT patches (B, M, F) and their grid."""
        m = self.config.model
        arrays = self.pictures(latents, grid)
        size = target_size(*arrays[0].shape[:2], m.vit_size, m.vit_min, m.vit_patch)
        pixels = torch.stack([torch.from_numpy(resize(a, size).copy()).permute(2, 0, 1) for a in arrays])
        patches = patchify(pixels.float() / 127.5 - 1, m.vit_patch)
        return patches.to(latents.device), (size[0] // m.vit_patch, size[1] // m.vit_patch)
