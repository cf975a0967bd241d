"""Small random models and prompts for the tests of the engine and of the stages: the real architecture, no training."""

from collections.abc import Iterable
from pathlib import Path

import torch

from clear.config import compose, from_dict
from clear.data.io import write_json
from clear.data.records import Sample, write_samples
from clear.model.bagel import Bagel, BagelConfig, Contents
from clear.model.checkpoint import save_bagel
from clear.model.mot import LlmConfig
from clear.model.sequence import BRIDGE, VIT, Image, SpecialTokens
from clear.model.tokenizer import encode, word_tokenizer
from clear.model.vae import AutoEncoder, VaeConfig
from clear.model.vit import VitConfig
from clear.project.scratch import write_params
from clear.reasoning import grammar
from clear.reasoning.prompts import Prompt
from clear.schema import Config
from clear.training.build import bagel_config, scene_words

SIZES = [
    "model.vit_patch=4",
    "model.vit_side=4",
    "model.vit_size=16",
    "model.vit_min=8",
    "model.vae_z=4",
    "model.vae_mult=[1,2]",
    "model.latent_patch=1",
    "model.max_latent_size=4",
    "model.vae_size=8",
    "model.vae_min=8",
]
"""The overrides with which a profile cuts images as `tiny_model` does."""

WORDS = [*grammar.WORDS, *"abcdefghij"]


def tiny_model(bridge: str = "mlp", seed: int = 0, layers: int = 2) -> tuple[Bagel, object]:
    """A random Bagel with a closed vocabulary; the velocity head is random too, so that latents matter."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(WORDS)
    config = BagelConfig(
        llm=LlmConfig(tokenizer.get_vocab_size(), 32, layers, 4, 2, 64, rope_theta=1e4),
        vit=VitConfig(16, 1, 2, 32, 4, 4),
        vae=VaeConfig(8, (1, 2), 1, 4, 4),
        special=SpecialTokens(0, 1, 2, 3),
        latent_patch=1,
        max_latent_size=4,
        bridge=bridge,
    )
    model = Bagel(config).initialise()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "_moe_gen" in name or "llm2vae" in name:
                value.add_(0.3 * torch.randn_like(value))
    return model.eval(), tokenizer


def tiny_prompts(tokenizer, count: int, seed: int = 0, lengths: tuple[int, ...] = (3, 5, 4)) -> list[Prompt]:
    """Prompts with random images and questions of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for i in range(count):
        letters = torch.randint(10, (lengths[i % len(lengths)],), generator=generator).tolist()
        question = tuple(encode(tokenizer, " ".join("abcdefghij"[k] for k in letters)))
        latent, patches = torch.randn(9, 4, generator=generator), torch.randn(4, 48, generator=generator)
        prompts.append(Prompt((), question, latent, (3, 3), patches, (2, 2)))
    return prompts


def trace_workspace(folder: Path, overrides: list[str], samples: Iterable[Sample]) -> Config:
    """Make `folder` a workspace in which the stage `traces` can run: `samples` to teach, and an untrained base."""
    settings = ["profile=smoke", "runtime.threads=1", "sampling.max_think_tokens=2", *overrides]
    write_params(folder / "params.yaml", settings)
    config = from_dict(compose(settings))
    write_samples(folder / "data/degraded/sft", samples)
    write_json(folder / "data/metrics/validate.json", {})
    save_random_model(folder / "data/models/base", config)
    return config


def save_random_model(folder: Path, config: Config) -> None:
    """A model folder of a configuration's shapes with the words of scenes; its generation expert is random too."""
    tokenizer = word_tokenizer(scene_words())
    torch.manual_seed(1)
    shapes = bagel_config(config, tokenizer)
    model = Bagel(shapes).initialise()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "_moe_gen" in name or "llm2vae" in name:
                value.add_(0.1 * torch.randn_like(value))
    save_bagel(folder, model, AutoEncoder(shapes.vae), tokenizer)


def random_contents(segments, generator) -> Contents:
    """Random contents of a model of `tiny_model` for the images among `segments`."""
    found = Contents(vit=[], latent=[], time=[], bridge=[])
    for s in segments:
        if not isinstance(s, Image):
            continue
        if s.kind == VIT:
            found.vit.append(torch.randn(4, 48, generator=generator))
        elif s.kind == BRIDGE:
            found.bridge.append(torch.randn(9, 4, generator=generator))
        else:
            found.latent.append(torch.randn(9, 4, generator=generator))
            found.time.append(0.4 if s.noise else 0.0)
    return found
