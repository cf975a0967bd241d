"""Long texts to `clear serve`: refused before they are tokenised where they cannot fit, and else in nobody's way."""

import random
import time
import unicodedata
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from clear.config import compose, from_dict
from clear.model.tokenizer import encode
from clear.reasoning.answering import Answerer
from clear.serve import talk
from clear.serve.errors import ApiError
from clear.serve.protocol import MOST_VALUES, ChatRequest, parse
from clear.serve.settings import Settings
from clear.serve.talk import Reader
from tests.serving import QUESTION, Server, asking, make_workspace, patched, serving
from tests.tiny import save_random_model

WAITS = """
import time
import clear.serve.app, clear.serve.talk
encode = clear.serve.talk.encode
clear.serve.talk.encode = lambda tokenizer, text: (len(text) > 100 and time.sleep(0.3)) or encode(tokenizer, text)
clear.serve.app.LONG_TEXT = 100
"""
"""A server for which a text of a hundred characters is long."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    make_workspace(folder)
    return folder


def _longest_pause(server: Server, over: Callable[[], bool]) -> float:
    """The slowest answer to a small request until `over`, as a share of the time until then."""
    pauses, first = [], time.monotonic()
    while not over():
        began = time.monotonic()
        assert server.http.get("/health").status_code == 200
        pauses.append(time.monotonic() - began)
        time.sleep(0.02)
    return max(pauses) / (time.monotonic() - first)


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(folder):
    with serving(folder) as server:
        answer = server.ask(asking("red " * 2_000_000, max_tokens=2))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "messages" and error["code"] == "context_length_exceeded"
    assert error["message"].startswith("messages: at least ") and "at most 8192" in error["message"]


def test_a_long_text_that_is_tokenised_holds_up_nobody(folder):
    with serving(folder, "--max-prompt", "700000") as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.ask, asking("red " * 800_000, max_tokens=2))
        pause = _longest_pause(server, answer.done)
    assert "messages: 800002 tokens" in answer.result().text and pause < 0.5


def test_short_texts_do_not_wait_for_many_long_ones(folder, tmp_path):
    with serving(folder, environment=patched(tmp_path, WAITS)) as server, ThreadPoolExecutor(12) as pool:
        long = asking("red " * 30, max_tokens=2)
        answers: list[Future] = [pool.submit(server.ask, long) for _ in range(12)]
        time.sleep(0.2)
        assert server.ask(max_tokens=2).status_code == 200
        assert sum(not answer.done() for answer in answers) > 3
        assert [answer.result().status_code for answer in answers] == [200] * 12


@pytest.fixture(scope="module")
def answerer(tmp_path_factory) -> Answerer:
    config = from_dict(compose(["profile=smoke", "runtime.threads=1"]))
    folder = tmp_path_factory.mktemp("model")
    save_random_model(folder, config)
    return Answerer.load(folder, config)


def test_many_short_messages_are_refused_untokenised(answerer, monkeypatch):
    monkeypatch.setattr(talk, "encode", None)
    for content in ("", QUESTION):
        request = ChatRequest(messages=[{"role": "user", "content": content}] * 5000)
        with pytest.raises(ApiError, match=r"at least [0-9]+ tokens, this server reads at most 8192"):
            Reader(answerer, Settings("m")).texts(request)


@pytest.mark.parametrize("one", [b"1,", b'"a",', b"[],", b'{"role":"user","content":"a"},'])
@pytest.mark.parametrize("field", ["messages", "stop", "user"])
def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(monkeypatch, field, one):
    """Parsed, ten million wrong messages held Python's lock, and so every other request, for minutes."""
    monkeypatch.setattr(ChatRequest, "model_validate_json", None)
    body = b'{"%s":[%s1]}' % (field.encode(), one * MOST_VALUES)
    with pytest.raises(ApiError, match=r"the body: about [0-9,]+ values, and a request may have 65,536; send fewer\."):
        parse(body)


def test_of_many_wrong_messages_and_parts_the_first_ones_are_looked_at():
    for body, most in ((b'{"messages":[%s1]}', 1), (b'{"messages":[{"role":"user","content":[%s1]}]}', 2**10 + 2)):
        with pytest.raises(ApiError) as refused:
            parse(body % (b"1," * (MOST_VALUES // 2)))
        assert refused.value.__cause__.error_count() <= most


def test_a_conversation_of_exactly_the_limit_is_read(answerer):
    turn = {"role": "user", "content": "red"}
    for count, fits in ((4, True), (5, False)):
        reader = Reader(answerer, Settings("m", prompt=4 * 3))
        try:
            texts, _ = reader.texts(ChatRequest(messages=[turn] * count))
            assert reader.conversation(texts).tokens == 12 and fits
        except ApiError:
            assert not fits


def _byte_level() -> Tokenizer:
    """A small byte-level tokenizer with tokens of many characters, as Qwen2's has them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["ééééé a straße 한국어한국어 ᾂᾂ", " " * 64, "=" * 64, QUESTION] * 20, trainer)
    return tokenizer


def test_no_text_has_fewer_tokens_than_its_characters_are_worth():
    shared, drawn = talk._Shared(_byte_level()), random.Random(0)
    assert shared.longest > 30
    pieces = ["é", "한국어", "ᾂ", "=" * 64, " " * 64, "straße", "a", "\U0001f418", "\n", "<|im_end|>"]
    for number in range(500):
        text = "".join(drawn.choices(pieces, k=drawn.randrange(1, 30)))
        text = unicodedata.normalize("NFD", text) if number % 2 else text
        assert len(encode(shared, text)) * shared.longest >= len(text)


def test_threads_share_a_tokenizer():
    """As one thread alone would have it; a tokenizer that is set while others encode stands still with all threads."""
    plain, shared = _byte_level(), talk._Shared(_byte_level())
    texts = [f"{QUESTION} {n} <|im_end|> 한국어 " * (1 + n % 40) for n in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: encode(shared, text), texts))
    assert found == [encode(plain, text) for text in texts]
    assert [shared.decode(ids) for ids in found] == texts
