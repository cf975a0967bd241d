"""What a policy is trained on, the interface TRL needs, and in which order prompts and random numbers reach it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from clear.data.records import Question
from clear.llm.endpoint import Client
from clear.model.bagel import Bagel
from clear.model.runtime import autocast
from clear.reasoning.engine import Options
from clear.reasoning.prompts import Prompt
from clear.schema import Grpo
from clear.training.loop.parallel import rank
from clear.training.rl.latent_quality import LatentQuality


@dataclass(frozen=True)
class Task:
    """Prompts with their questions, how they are rolled out (`options`), and what judges the policy.

    holdout measures the true accuracy of a policy; judge scores answers in place of exact match; quality scores
    restorations against clean pictures.
    """

    tokenizer: Any
    prompts: Sequence[Prompt]
    questions: Sequence[Question]
    options: Options
    holdout: Callable[[Bagel], float] | None = None
    judge: Client | None = None
    quality: LatentQuality | None = None


class PolicyConfig(PretrainedConfig):
    """The configuration that TRL needs."""

    model_type = "clear_policy"


class Policy(PreTrainedModel):
    """Bagel with the interface TRL expects; all work is done by `bagel`."""

    config_class = PolicyConfig
    base_model_prefix = "bagel"
    main_input_name = "index"

    def __init__(self, bagel: Bagel) -> None:
        super().__init__(PolicyConfig())
        self.bagel = bagel
        self.generation_config = GenerationConfig()
        self.warnings_issued: dict[str, bool] = {}

    def _init_weights(self, module) -> None:
        """Weights come with the bagel."""

    def get_input_embeddings(self):
        """The token embedding."""
        return self.bagel.language_model.model.embed_tokens

    def get_output_embeddings(self):
        """The language head."""
        return self.bagel.language_model.lm_head

    def forward(self, call: Callable[[Bagel], Any]) -> Any:
        """`call(bagel)`: gradients of several processes meet only in what runs inside the policy's forward."""
        with autocast(self.bagel):
            return call(self.bagel)


def order(count: int, grpo: Grpo, seed: int) -> list[str]:
    """Prompt numbers of the whole run, one shuffled pass after the other.

    trl's own sampler shuffles with a generator that a resumed run would start again in a later epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < grpo.steps * grpo.prompts:
        order += torch.randperm(count, generator=generator).tolist()
    return [str(i) for i in order[: grpo.steps * grpo.prompts]]


def streams(seed: int, use: str, count: int) -> list[torch.Generator]:
    """Generators of this process's `count` prompts or rollouts, by their place among those of all processes."""
    places = range(rank() * count, (rank() + 1) * count)
    digests = (hashlib.sha256(f"{seed} {use} {place}".encode()).digest() for place in places)
    return [torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")) for digest in digests]


def processing_class(tokenizer, bagel: Bagel) -> PreTrainedTokenizerFast:
    """The tokenizer as trl asks for one; it is never used to make a prompt."""
    special = bagel.config.special
    name = tokenizer.id_to_token
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=name(special.bos),
        eos_token=name(special.eos),
        pad_token=name(special.eos),
    )
