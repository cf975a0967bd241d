"""The tiny model with an adapter, and with the tokenizer files that BAGEL's published code reads."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from clear.model import lora
from clear.model.bagel import Bagel
from clear.model.checkpoint import save_bagel
from clear.model.sequence import SpecialTokens
from clear.model.tokenizer import MARKERS
from clear.model.vae import AutoEncoder
from clear.schema import Lora
from tests.tiny import tiny_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = Lora(rank=2, alpha=4.0, dropout=0.0, targets=TARGETS, experts="both")

PAIRS = ["vocab.json", "merges.txt", "tokenizer_config.json"]
TEXTS = ["the circle is red ?", "größer als 128 😀\n\n zwei", f"{MARKERS[0]}red{MARKERS[1]} <|box_start|>"]


def adapted(bridge: str = "direct", settings: Lora = SETTINGS) -> tuple[Bagel, object]:
    """The tiny model with an adapter whose weights are all random: no factor is zero."""
    model, tokenizer = tiny_model(bridge)
    lora.attach(model, settings)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.3)
    return model.eval(), tokenizer


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
