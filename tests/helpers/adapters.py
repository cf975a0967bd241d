"""The tiny model with an adapter, and with the tokenizer files that BAGEL's published code reads."""

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from clear.model import lora
from clear.model.bagel import Bagel, Contents
from clear.model.checkpoint import fingerprint, save_bagel
from clear.model.sequence import LATENT, Image, SpecialTokens, Text, layout
from clear.model.tokenizer import MARKERS
from clear.model.vae import AutoEncoder
from clear.schema import Lora
from tests.tiny import tiny_model, tiny_prompts

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = Lora(rank=2, alpha=4.0, dropout=0.0, targets=TARGETS, experts="both")

PAIRS = ["vocab.json", "merges.txt", "tokenizer_config.json"]
TEXTS = ["the circle is red ?", "größer als 128 😀\n\n zwei", f"{MARKERS[0]}red{MARKERS[1]} <|box_start|>"]


def adapted(bridge: str = "direct", settings: Lora = SETTINGS) -> tuple[Bagel, object]:
    """The tiny model with an adapter whose weights are all random: no factor is zero."""
    model, tokenizer = tiny_model(bridge)
    lora.attach(model, settings)
    return stirred(model).eval(), tokenizer


def stirred(model: Bagel, std: float = 0.3) -> Bagel:
    """The model with random weights in its adapters: a fresh one changes nothing."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(std=std)
    return model


def qwen_folder(folder: Path) -> None:
    """A model folder with Qwen2's tokenizer as BAGEL's published code reads it: PAIRS and no tokenizer.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    first, names = tokenizer.get_vocab_size(), ["<|endoftext|>", *MARKERS[:2], "<|box_start|>", *MARKERS[2:]]
    stated = {str(first + i): {"content": name, "special": True} for i, name in enumerate(names)}
    settings = {"added_tokens_decoder": stated, "tokenizer_class": "Qwen2Tokenizer", "eos_token": MARKERS[1]}
    shapes = tiny_model("direct")[0].config
    special = SpecialTokens(*(first + names.index(marker) for marker in MARKERS))
    shapes = replace(shapes, special=special, llm=replace(shapes.llm, vocab=first + len(names)))
    torch.manual_seed(0)
    save_bagel(folder, Bagel(shapes).initialise(), AutoEncoder(shapes.vae))
    tokenizer.model.save(str(folder))
    (folder / PAIRS[2]).write_text(json.dumps(settings))


def batch(tokenizer, count: int = 3):
    """Rows with text, ViT tokens, a noisy and a clean latent: both experts, all kinds of routing."""
    rows, contents = [], Contents(vit=[], latent=[], time=[])
    for prompt in tiny_prompts(tokenizer, count):
        noisy = prompt.latent.flip(0)
        contents.vit.append(prompt.patches)
        contents.latent += [prompt.latent, noisy, prompt.latent]
        contents.time += [0.0, 0.5, 0.0]
        pictures = [Image(LATENT, prompt.latent_grid, noise=True), Image(LATENT, prompt.latent_grid)]
        rows.append([*prompt.segments(), Text(prompt.question, scored=True), *pictures, Text([5, 6], scored=True)])
    return layout(rows, SpecialTokens(0, 1, 2, 3))[0], contents


def outputs(model: Bagel, given) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text logits, their targets and velocities."""
    hidden = model(*given)
    return *model.scored_logits(hidden, given[0]), model.velocities(hidden, given[0])


def loss_of(model: Bagel, given) -> torch.Tensor:
    """Answer loss and velocity loss together."""
    logits, target, velocity = outputs(model, given)
    return F.cross_entropy(logits, target) + velocity.pow(2).mean()


def adapter_folders(place: Path) -> tuple[Path, Path, Bagel, object]:
    """A folder with weights and one with an adapter on them; also the adapted model itself and its tokenizer."""
    plain, tokenizer = tiny_model("direct")
    save_bagel(place / "base", plain, AutoEncoder(plain.config.vae), tokenizer)
    model, _ = adapted()
    files = fingerprint(place / "base")
    lora.save_adapter(place / "adapter", model, place / "base", files, torch.float32)
    return place / "base", place / "adapter", model, tokenizer
