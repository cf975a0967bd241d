"""From configuration to shapes: the one place where `params.yaml` becomes a BagelConfig."""

from clear.model.bagel import BagelConfig
from clear.model.checkpoint import special_tokens
from clear.model.mot import LlmConfig
from clear.model.vae import VaeConfig
from clear.model.vit import VitConfig
from clear.schema import Config


def scene_words() -> list[str]:
    """The closed vocabulary of models trained on scenes: grammar, questions and edit instructions."""
    from clear.reasoning.grammar import WORDS
    from clear.sources.scenes.words import VOCABULARY
    from clear.training.pretrain import DESCRIBE, EDITS

    return [*WORDS, *VOCABULARY, *EDITS, DESCRIBE[0].split()[0]]


def bagel_config(config: Config, tokenizer, vae: VaeConfig | None = None) -> BagelConfig:
    """Shapes of `config.model` for training from scratch; the bridge is added by its own stage."""
    m = config.model
    return BagelConfig(
        llm=LlmConfig(tokenizer.get_vocab_size(), m.hidden, m.layers, m.heads, m.kv_heads, m.mlp, rope_theta=1e4),
        vit=VitConfig(m.vit_hidden, m.vit_layers, m.vit_heads, m.vit_mlp, m.vit_patch, m.vit_side),
        vae=vae or VaeConfig(m.vae_channels, tuple(m.vae_mult), m.vae_blocks, m.vae_z, m.vae_groups),
        special=special_tokens(tokenizer),
        latent_patch=m.latent_patch,
        max_latent_size=m.max_latent_size,
    )
