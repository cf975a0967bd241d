"""Tokenizers: a closed word-level one for models trained from scratch, and text handling that fits any.

Real checkpoints bring Qwen2's byte-pair tokenizer; both are `tokenizers.Tokenizer`.
"""

from collections.abc import Iterable

from clear.errors import ClearError

MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
UNKNOWN = "<unk>"


def word_tokenizer(words: Iterable[str]):
    """A `tokenizers.Tokenizer` over space-separated words; the order of first occurrence gives the ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    entries = dict.fromkeys([*MARKERS, UNKNOWN, *words])
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(entries)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of `text`. Raises ClearError naming a word outside a closed vocabulary."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    unknown = tokenizer.token_to_id(UNKNOWN)
    if unknown is not None and unknown in encoding.ids:
        start, end = encoding.offsets[encoding.ids.index(unknown)]
        raise ClearError(
            f"The word '{text[start:end]}' is not in this model's vocabulary of {tokenizer.get_vocab_size()} words; "
            "ask one of the question forms in README, or use a checkpoint with an open vocabulary."
        )
    return encoding.ids


def decode(tokenizer, ids: Iterable[int]) -> str:
    """Text of token ids, without the markers."""
    hidden = {tokenizer.token_to_id(marker) for marker in MARKERS}
    return tokenizer.decode([i for i in ids if i not in hidden], skip_special_tokens=False)
