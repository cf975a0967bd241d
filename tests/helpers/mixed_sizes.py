"""Images of different sizes for one batch, whose ViT and latent grids differ too; fixtures `config` and `images`."""

from dataclasses import replace

import numpy as np

from clear.config import compose, from_dict
from clear.data.images import encode_image
from clear.data.records import Sample, sha256
from clear.model.images import ImageBank
from clear.model.vae import AutoEncoder
from clear.reasoning import grammar
from clear.schema import Config
from clear.traces.table import TraceRow
from clear.training.sft import TraceData
from tests.tiny import tiny_model

SHAPES = [(40, 40), (20, 40), (40, 40), (40, 20)]


def mixed_config() -> Config:
    """Parameters with the model section of `tests.tiny`: latents of up to 4 × 4 tokens, up to 3 × 3 ViT patches."""
    found = from_dict(compose(["profile=smoke", "sampling.flow_steps=3", "sampling.max_think_tokens=6"]))
    found.model = replace(
        found.model,
        vae_mult=[1, 2],
        latent_patch=1,
        vae_size=8,
        vae_min=4,
        vae_z=4,
        vit_size=12,
        vit_min=4,
        vit_patch=4,
        vit_side=4,
    )
    return found


def mixed_images() -> list[bytes]:
    """Noise of the shapes SHAPES."""
    generator = np.random.default_rng(0)
    return [encode_image(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in SHAPES]


def parts(bridge, config, images):
    """Model, tokenizer, autoencoder and restoring traces of the images."""
    model, tokenizer = tiny_model(bridge)
    vae = AutoEncoder(model.config.vae).eval().requires_grad_(False)
    bank = ImageBank(images, config.model).encode(vae)
    assert {bank.latent_grid(i) for i in range(len(bank))} == {(4, 4), (2, 4), (4, 2)}
    assert all(bank.latent_grid(i) != bank.vit_grid(i) for i in range(len(bank)))
    samples, rows = [], []
    for i, image in enumerate(images):
        samples.append(Sample(f"s{i}", "test", "sft", image, sha256(image), degraded=b"other " + image))
        replies = grammar.restore_reply(), "<think> b </think> <answer> c </answer>"
        rows.append(TraceRow(f"s{i}", "q", "a b", "dark", "high", *replies, "<answer> c </answer>", replies[1], False))
    return model, tokenizer, vae, TraceData(tokenizer, rows, samples, bank, bank)
