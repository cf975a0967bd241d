"""Tokenizers of model folders: Qwen2's files and our own, with their markers looked up by name."""

import json
import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clear.errors import ClearError
from clear.model.bagel import Bagel
from clear.model.checkpoint import TOKENIZER, load_bagel, load_tokenizer, read_config, save_bagel, special_tokens
from clear.model.tokenizer import ADDED, MARKERS, decode, encode
from clear.model.vae import AutoEncoder
from tests.tiny import tiny_model

END = "<|endoftext|>"
CORPUS = [
    "the circle is red",
    "which colour is the circle ?",
    "größer als 128 Bäume",
    "don't blur it 😀\n\n  twice",
] * 9


def _byte_pairs(folder: Path) -> int:
    """Write a small byte-pair vocabulary as vocab.json and merges.txt; returns its size."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    return tokenizer.get_vocab_size()


def _state_tokens(folder: Path, first: int, tokens: list[str]) -> None:
    """Write tokenizer_config.json with these added tokens from id `first` on."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    stated = {str(first + i): {"content": token, **flags} for i, token in enumerate(tokens)}
    content = {"added_tokens_decoder": stated, "tokenizer_class": "Qwen2Tokenizer", "eos_token": MARKERS[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with Qwen2's files over a small vocabulary, our tokenizer of it and transformers' own."""
    from transformers import Qwen2Tokenizer

    folder = tmp_path_factory.mktemp("qwen")
    first = _byte_pairs(folder)
    _state_tokens(folder, first, [END, *MARKERS[:2], "<|box_start|>", *MARKERS[2:]])
    return folder, load_tokenizer(folder), Qwen2Tokenizer.from_pretrained(folder)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40) | st.lists(st.sampled_from([*CORPUS, *MARKERS, "'LL", " \n", "²", END])).map("".join))
def test_ids_are_those_of_transformers_own_tokenizer(qwen, text):
    _, ours, theirs = qwen
    assert encode(ours, text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40) | st.lists(st.sampled_from([END, *MARKERS, " ", "a"])).map("".join))
def test_encoding_and_decoding_return_the_text(qwen, text):
    assert decode(qwen[1], encode(qwen[1], text)) == unicodedata.normalize("NFC", text)


def test_merges_are_used_and_markers_are_found_by_name(qwen):
    _, ours, theirs = qwen
    assert len(encode(ours, "the circle")) < len("the circle") / 2
    assert [ours.token_to_id(marker) for marker in MARKERS] == theirs.convert_tokens_to_ids(list(MARKERS))
    special = special_tokens(ours)
    assert decode(ours, [special.bos, *encode(ours, "red"), special.eos]) == "red"


@pytest.mark.parametrize("token", [END, *MARKERS])
def test_the_name_of_a_control_token_in_a_text_is_text(qwen, token):
    """A question that quotes `<|im_end|>` must not end the turn; the tags of the grammar are text all along."""
    text = f"what does {token} mean ? <think> <image_restore>"
    ids = encode(qwen[1], text)
    assert qwen[1].token_to_id(token) not in ids and decode(qwen[1], ids) == text


@pytest.mark.parametrize("token", MARKERS)
def test_in_a_closed_vocabulary_the_name_of_a_control_token_is_refused(token):
    _, tokenizer = tiny_model("direct")
    with pytest.raises(ClearError, match=re.escape(f"'{token}' is not in this model's vocabulary")):
        encode(tokenizer, f"a {token} b")


def test_added_tokens_json_states_ids_where_tokenizer_config_does_not(qwen, tmp_path):
    folder, ours, _ = qwen
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    names = [END, *MARKERS[:2], "<|box_start|>", *MARKERS[2:]]
    (tmp_path / ADDED).write_text(json.dumps({name: ours.token_to_id(name) for name in names}))
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == ours.get_vocab() and again.undefined == []
    for content, said in (('{"a": "b"}', "does not give every token a number"), ("[]", "not a JSON object")):
        (tmp_path / ADDED).write_text(content)
        with pytest.raises(ClearError, match=rf"added_tokens\.json.*{said}"):
            load_tokenizer(tmp_path)


def test_what_no_file_states_is_appended_in_the_published_order(tmp_path):
    from transformers import Qwen2Tokenizer

    first = _byte_pairs(tmp_path)
    theirs = Qwen2Tokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(list(MARKERS))
    ours = load_tokenizer(tmp_path)
    assert [ours.token_to_id(token) for token in (END, *MARKERS)] == list(range(first, first + 5))
    assert ours.get_vocab() == theirs.get_vocab()
    _state_tokens(tmp_path, first, [END, MARKERS[2]])
    ours = load_tokenizer(tmp_path)
    order = (END, MARKERS[2], MARKERS[0], MARKERS[1], MARKERS[3])
    assert [ours.token_to_id(token) for token in order] == list(range(first, first + 5))


def test_tokenizer_json_gives_the_same_ids(qwen, tmp_path):
    folder, ours, _ = qwen
    (tmp_path / TOKENIZER).write_text(ours.to_str(), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == ours.get_vocab()
    assert all(encode(again, text) == encode(ours, text) for text in [*CORPUS, "".join(MARKERS)])
    assert again.to_str() == ours.to_str()


def test_a_stated_id_that_the_vocabulary_does_not_give_is_refused(tmp_path):
    first = _byte_pairs(tmp_path)
    _state_tokens(tmp_path, first + 1, [END, *MARKERS])
    with pytest.raises(ClearError, match=rf"tokenizer_config\.json.*endoftext.*{first + 1}.*{first}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("merges.txt", None, r"merges\.txt is missing, but vocab\.json is here"),
        ("vocab.json", None, r"vocab\.json is missing, but merges\.txt is here"),
        ("vocab.json", '{"a": ', "not a byte-pair tokenizer"),
        ("merges.txt", "#version: 0.2\nnot known\n", "not a byte-pair tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json.*cannot be read"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {}}}', r"tokenizer_config\.json.*cannot be read"),
        (TOKENIZER, "{}", r"tokenizer\.json is not a tokenizer"),
    ],
)
def test_broken_tokenizer_files_are_named(tmp_path, file, content, said):
    _byte_pairs(tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    with pytest.raises(ClearError, match=said):
        load_tokenizer(tmp_path)


def _with_byte_pairs(folder: Path, spare: int) -> None:
    """A model folder whose embedding has `spare` rows beyond a byte-pair vocabulary with <|endoftext|>."""
    first = _byte_pairs(folder)
    model, _ = tiny_model("direct")
    config = replace(model.config, llm=replace(model.config.llm, vocab=first + 1 + spare))
    save_bagel(folder, Bagel(config), AutoEncoder(config.vae))
    content = json.loads((folder / "config.json").read_text())
    del content["special_tokens"]  # the published folder states none
    (folder / "config.json").write_text(json.dumps(content))


def test_a_folder_with_byte_pair_files_loads_and_looks_its_markers_up(tmp_path):
    _with_byte_pairs(tmp_path, spare=4)
    model, _, tokenizer = load_bagel(tmp_path)
    assert model.config.special == special_tokens(tokenizer) == read_config(tmp_path).special
    assert model.config.special.image_end == tokenizer.token_to_id("<|vision_end|>") == model.config.llm.vocab - 1


@pytest.mark.parametrize("read", [load_bagel, read_config])
def test_markers_are_not_guessed_where_the_embedding_has_them_elsewhere(tmp_path, read):
    """Of Qwen2's files only vocab.json and merges.txt: the image markers got the ids of two other tokens."""
    _with_byte_pairs(tmp_path, spare=12)
    first = json.loads((tmp_path / "llm_config.json").read_text())["vocab_size"] - 13
    said = r"no file defines <\|im_start\|>.*copy tokenizer_config\.json or tokenizer\.json"
    with pytest.raises(ClearError, match=said):
        read(tmp_path)
    _state_tokens(tmp_path, first, [END, *MARKERS[:2]])
    with pytest.raises(ClearError, match=r"no file defines <\|vision_start\|>, <\|vision_end\|>"):
        read(tmp_path)
    _state_tokens(tmp_path, first, [END, *MARKERS[:2], *(f"<|{i}|>" for i in range(6)), *MARKERS[2:]])
    found = read(tmp_path)
    special = found.special if read is read_config else found[0].config.special
    assert (special.image_start, special.image_end) == (first + 9, first + 10)


def test_markers_beyond_the_embedding_are_refused(tmp_path):
    _with_byte_pairs(tmp_path, spare=3)
    with pytest.raises(ClearError, match=r"<\|vision_end\|> the id (\d+).*has \1 rows"):
        load_bagel(tmp_path)
