"""The reward of a restored latent: its formula, what has no score, and that it reaches the restoration."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clear.config import compose, from_dict
from clear.model import images
from clear.model.bagel import GENERATION
from clear.model.tokenizer import encode
from clear.reasoning.answering import Answerer
from clear.reasoning.engine import Restoration, Trajectory, generate
from clear.sources.scenes.render import scenes
from clear.training.load import trainable
from clear.training.rl import grpo
from clear.training.rl.latent_quality import LatentQuality, latent_similarities, pooled
from tests.helpers.policy import OPTIONS, restored, trainer_of
from tests.tiny import save_random_model, tiny_model, tiny_prompts


@given(st.integers(0, 10**6), st.floats(0, 30))
def test_similarities_are_the_published_ones_and_within_0_and_1(seed, scale):
    rng = np.random.default_rng(seed)
    one, other = rng.normal(size=(2, 6, 4)).astype(np.float32)
    other = scale * other

    def cosine(a, b):
        norms = max(np.linalg.norm(a), 1e-8) * max(np.linalg.norm(b), 1e-8)
        return max(0.0, float((a * b).sum() / norms))

    expected = (
        np.exp(-0.5 * np.mean((one - other) ** 2)),
        cosine(one, other),
        np.mean([cosine(a, b) for a, b in zip(one, other, strict=True)]),
    )
    found = latent_similarities(torch.tensor(one), torch.tensor(other))
    assert found == pytest.approx(expected, abs=1e-5)
    assert all(0 <= value <= 1 + 1e-6 for value in found)


@pytest.fixture(scope="module")
def answerer(tmp_path_factory) -> Answerer:
    """A random model of the smoke profile with its autoencoder."""
    folder = tmp_path_factory.mktemp("model")
    config = from_dict(compose(["profile=smoke", "runtime.device=cpu", "runtime.threads=1"]))
    save_random_model(folder, config)
    return Answerer.load(folder, config)


def test_scores_are_those_of_the_clean_picture_or_none(answerer):
    samples = list(scenes("bench", 2, 5, 256, 4))
    bank = answerer.bank([s.image for s in samples], [s.key for s in samples])
    grid = bank.latent_grid(0)
    exact, off = (Trajectory(0, restorations=[Restoration(x, grid)]) for x in (bank.latents[0], -bank.latents[0]))
    other_shape = Trajectory(0, restorations=[Restoration(bank.latents[0][:4], (2, 2))])
    asked = [exact, exact, off, Trajectory(0), exact, other_shape]
    clean, prompts = [0, 1, None], [0, 1, 0, 0, 2, 0]

    def scores(kind: str) -> list:
        return LatentQuality(kind, bank, clean, answerer.reencode)(answerer.model, prompts, asked)

    vae, vit, both = scores("vae"), scores("vit"), scores("both")
    assert vae[0] == pytest.approx(1, abs=1e-5) and 0 < vae[1] < 1
    spread = bank.latents[0].square().mean().item()
    assert vae[2] == pytest.approx(0.3 * np.exp(-2 * spread), abs=1e-5)
    assert [n for n, score in enumerate(vae) if score is None] == [3, 4, 5]

    patches, vit_grid = answerer.reencode(bank.latents[0][None], grid)
    seen = pooled(answerer.model, patches[0], vit_grid)
    for n in (0, 1):
        expected = torch.cosine_similarity(seen, pooled(answerer.model, bank.patches(n), bank.vit_grid(n)), dim=0)
        assert vit[n] == pytest.approx(max(0, expected.item()), abs=1e-5)
        close, whole, local = latent_similarities(bank.latents[0], bank.latents[n])
        assert both[n] == pytest.approx(0.2 * close + 0.2 * whole + 0.3 * local + 0.3 * vit[n], abs=1e-5)


def test_restored_pictures_are_decoded_no_more_at_once_than_images_are_encoded(answerer, monkeypatch):
    rows, columns = 3, 4
    patch, channels = answerer.config.model.latent_patch, answerer.vae.config.z_channels
    latents = torch.randn(5, rows * columns, patch**2 * channels, generator=torch.Generator().manual_seed(3))
    whole, sizes = answerer.pictures(latents, (rows, columns)), []
    decode = answerer.vae.decode
    monkeypatch.setattr(answerer.vae, "decode", lambda z: sizes.append(len(z)) or decode(z))
    monkeypatch.setattr(images, "AUTOENCODER_PIXELS", 2 * whole[0].shape[0] * whole[0].shape[1] + 1)
    parts = answerer.pictures(latents, (rows, columns))
    assert sizes == [2, 2, 1] and len(parts) == 5
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(whole, parts, strict=True))


def _bank(count: int) -> SimpleNamespace:
    """Clean latents of `tiny_prompts`."""
    generator = torch.Generator().manual_seed(9)
    latents = [torch.randn(9, 4, generator=generator) for _ in range(count)]
    return SimpleNamespace(latents=latents, latent_grid=lambda i: (3, 3))


ALONE = ("grpo.separate_advantages=true", "grpo.reward_latent_quality=1.0", "grpo.beta=0")


def test_what_was_not_restored_counts_in_no_mean_of_the_image_term(tmp_path, monkeypatch):
    def half(*given, **named):
        """Every other trajectory ends with its first reply."""
        found = generate(*given, **named)
        return [replace(t, replies=t.replies[:1], restorations=[]) if n % 2 else t for n, t in enumerate(found)]

    monkeypatch.setattr(grpo, "generate", half)
    model, tokenizer = tiny_model("mlp")
    prompts, options = tiny_prompts(tokenizer, 4), replace(OPTIONS, max_tokens=8)
    size = "grpo.prompts=4", "grpo.group_size=16", "grpo.steps=1"
    trainable(model)
    quality = LatentQuality("vae", _bank(4), range(4), None)
    trainer = trainer_of(tmp_path, model, tokenizer, prompts, options, *size, *ALONE, quality=quality)
    trainer._generate_and_score_completions([{"prompt": str(i // 16)} for i in range(64)])
    rolled = trainer.rollout.trajectories
    has_image = torch.tensor([bool(t.restorations) for t in rolled])
    image = trainer.rollout.advantages[:, 1]
    assert has_image.sum() == 32 and not image[~has_image].any() and image[has_image].all()
    for group in range(4):
        assert image[16 * group :][:16].sum().abs() < 1e-5, "centred among the restored ones"
    logged = trainer._metrics["train"]["reward_latent_quality"][-1]
    scores = quality(model, [t.prompt for t in rolled], rolled)
    assert logged == pytest.approx(np.mean([score for score in scores if score is not None]))


@pytest.mark.slow
def test_the_reward_brings_restorations_closer_to_the_clean_latents(tmp_path):
    model, tokenizer = tiny_model("mlp")
    prompts, trigger = tiny_prompts(tokenizer, 4), encode(tokenizer, "restore")
    quality = LatentQuality("vae", _bank(4), range(4), None)
    options = replace(OPTIONS, max_tokens=1, shared_noise=True)

    def score() -> float:
        latents = restored(model, prompts, trigger, options)
        done = [Trajectory(n, restorations=[Restoration(x, (3, 3))]) for n, x in enumerate(latents)]
        return float(np.mean(quality(model, range(4), done)))

    trainable(model, GENERATION)
    before = score()
    more = "grpo.text_weight=0", "grpo.image_weight=1", "grpo.sde_choice=window", "grpo.sde_steps=2", "grpo.steps=60"
    size = "grpo.prompts=4", "grpo.group_size=8", "grpo.rows_per_pass=32", "grpo.lr=0.003"
    trainer_of(tmp_path, model, tokenizer, prompts, options, *size, *more, *ALONE, quality=quality).train()
    assert score() > before + 0.05
