"""Tokenizers: the files of a model folder, a closed word-level one for models trained from scratch, and text to ids.

Every tokenizer here is a `tokenizers.Tokenizer`. BAGEL's folder brings Qwen2's byte-pair tokenizer twice, as
`tokenizer.json` and as `vocab.json` + `merges.txt` (METHOD §1 "Checkpoint folder", "Special tokens"); either is
enough. Ids of special tokens are never assumed: `tokenizer_config.json` (else `added_tokens.json`) names them, and a
marker that no file has is appended in the order of `MARKERS`, as BAGEL's code does.

Departure: text is only ever text. BAGEL's code turns a `<|im_end|>` inside a question into the control token; here only
the layout of a sequence sets control tokens, and `encode` spells their names out.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from clear.errors import ClearError

MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
"""Text start and end, image start and end; BAGEL appends missing ones in this order."""
UNKNOWN = "<unk>"
TOKENIZER, VOCABULARY, MERGES, SETTINGS = "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"
ADDED = "added_tokens.json"
LFS = "version https://git-lfs.github.com/spec/"
"""What a git-lfs pointer starts with."""
_END = "<|endoftext|>"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's split into words: contractions, letter runs with one leading sign, single digits, sign runs, white space."""


def word_tokenizer(words: Iterable[str]):
    """A `tokenizers.Tokenizer` over space-separated words; the order of first occurrence gives the ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    entries = dict.fromkeys([*MARKERS, UNKNOWN, *words])
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(entries)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def read_tokenizer(folder: Path | str):
    """The `tokenizers.Tokenizer` of a model folder with all four markers, or None where the folder has none.

    `tokenizer.json` wins over `vocab.json` + `merges.txt`. Raises ClearError for a file that is broken, half of a
    pair, or at odds with the ids that `tokenizer_config.json` states. Its attribute `undefined` lists the markers that
    no file defines, whose ids are therefore a guess.
    """
    folder = Path(folder)
    if (folder / TOKENIZER).exists():
        tokenizer, origin = _parse(folder / TOKENIZER), folder / TOKENIZER
    elif (folder / VOCABULARY).exists() or (folder / MERGES).exists():
        tokenizer, origin = _byte_pairs(folder), folder / VOCABULARY
    else:
        return None
    name, stated = _stated_tokens(folder)
    _append(tokenizer, stated, folder / name)
    if origin.name == VOCABULARY:
        _append(tokenizer, {_END: None}, origin)  # Qwen2's tokenizer class adds it before anybody else adds a token
    tokenizer.undefined = [marker for marker in MARKERS if tokenizer.token_to_id(marker) is None]
    _append(tokenizer, dict.fromkeys(MARKERS), origin)
    return tokenizer


def _parse(path: Path):
    from tokenizers import Tokenizer

    text = read_text(path)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for a file it cannot parse
        raise ClearError(f"{path} is not a tokenizer ({error}); fetch it again.") from error


def _byte_pairs(folder: Path):
    """Qwen2's pipeline over the folder's vocabulary and merges: NFC, the word split, bytes, byte pairs."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    for name, other in ((VOCABULARY, MERGES), (MERGES, VOCABULARY)):
        if not (folder / name).exists():
            raise ClearError(f"{folder / name} is missing, but {other} is here; fetch both, or {TOKENIZER}.")
        read_text(folder / name)
    try:
        model = BPE.from_file(str(folder / VOCABULARY), str(folder / MERGES))
    except Exception as error:  # as above
        raise ClearError(
            f"{folder}: {VOCABULARY} and {MERGES} are not a byte-pair tokenizer ({error}); fetch both again."
        ) from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _stated_tokens(folder: Path) -> tuple[str, dict]:
    """The added tokens with the ids that a file states, in the order of the ids, and the name of that file.

    That is tokenizer_config.json, or added_tokens.json where the other one states none.
    """
    from tokenizers import AddedToken

    settings = _json(folder / SETTINGS)
    try:
        if stated := settings.get("added_tokens_decoder"):
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            return SETTINGS, {
                AddedToken(entry["content"], **{name: bool(entry[name]) for name in flags if name in entry}): number
                for number, entry in sorted((int(i), entry) for i, entry in stated.items())
            }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        path = folder / SETTINGS
        raise ClearError(f"{path}: added_tokens_decoder cannot be read ({error!r}); fetch it again.") from error
    added = _json(folder / ADDED)
    if not all(isinstance(number, int) for number in added.values()):
        raise ClearError(f"{folder / ADDED} does not give every token a number; fetch it again.")
    return ADDED, dict(sorted(added.items(), key=lambda item: item[1]))


def _json(path: Path) -> dict:
    """The object of a JSON file, empty where there is no such file."""
    try:
        content = json.loads(read_text(path)) if path.exists() else {}
    except ValueError as error:
        raise ClearError(f"{path} cannot be read as JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise ClearError(f"{path} holds a {type(content).__name__}, not a JSON object; fetch it again.")
    return content


def _append(tokenizer, tokens: dict, origin: Path) -> None:
    """Add `tokens` in order where they are new, and check each against the id its file states.

    All in one call: each call makes the search for added tokens anew.
    """
    from tokenizers import AddedToken

    new = (token for token in tokens if not isinstance(token, str) or tokenizer.token_to_id(token) is None)
    tokenizer.add_tokens([AddedToken(one, special=True) if isinstance(one, str) else one for one in new])
    for token, number in tokens.items():
        text = token if isinstance(token, str) else token.content
        found = tokenizer.token_to_id(text)
        if number is not None and found != number:
            raise ClearError(
                f"{origin}: token {text} is stated as id {number}, but the vocabulary gives it {found}; "
                "the tokenizer files belong to different models, fetch all of them again."
            )


def read_text(path: Path) -> str:
    """A small text file of a model folder. Raises ClearError for a git-lfs pointer or bytes that are not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ClearError(f"{path} is not a text file ({error}); fetch it again.") from error
    if text.startswith(LFS):
        raise ClearError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository.")
    return text


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of `text`, none of which is a control token: their names are text like any other.

    Raises ClearError naming a word outside a closed vocabulary; there the names of the control tokens are such words.
    Also for a text that no UTF-8 holds, as of an argument that the terminal wrote in another encoding.
    """
    tokenizer.encode_special_tokens = True  # "as text"; the setting is not part of the tokenizer's file
    try:
        encoding = tokenizer.encode(text, add_special_tokens=False)
    except TypeError as error:
        odd = next((char for char in text if "\ud800" <= char <= "\udfff"), None)
        if odd is None:
            raise
        raise ClearError(f"The text contains U+{ord(odd):04X}, which is no character; write it in UTF-8.") from error
    refused = {tokenizer.token_to_id(token) for token in (UNKNOWN, _END, *MARKERS)}
    if not refused.isdisjoint(encoding.ids):
        start, end = next(at for i, at in zip(encoding.ids, encoding.offsets, strict=True) if i in refused)
        raise ClearError(
            f"The word '{text[start:end]}' is not in this model's vocabulary of {tokenizer.get_vocab_size()} words; "
            "ask one of the question forms in README, or use a checkpoint with an open vocabulary."
        )
    return encoding.ids


def decode(tokenizer, ids: Iterable[int]) -> str:
    """Text of token ids, without the markers."""
    hidden = {tokenizer.token_to_id(marker) for marker in MARKERS}
    return tokenizer.decode([i for i in ids if i not in hidden], skip_special_tokens=False)
