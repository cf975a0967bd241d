"""The running batch of `clear serve`: whoever joins or leaves it, a row answers as it would alone."""

import random
from dataclasses import replace
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
import torch

from clear.config import compose, from_dict
from clear.data.images import encode_image
from clear.data.records import Question
from clear.reasoning import grammar
from clear.reasoning.answering import Answerer
from clear.reasoning.engine import Rows
from clear.reasoning.output import answer, thinking
from clear.serve import batch as batches
from clear.serve import worker as workers
from clear.serve.batch import Batch, Conversation, Row, Wish, row_texts
from clear.serve.metrics import Metrics
from clear.serve.protocol import ChatRequest
from clear.serve.settings import Settings
from clear.serve.talk import Reader
from clear.serve.worker import Full, Worker
from tests.tiny import save_random_model

SETTINGS = ["profile=smoke", "runtime.threads=1", "sampling.max_think_tokens=9", "sampling.flow_steps=3"]
QUESTIONS = ["which colour is the circle ?", "how many red shapes ?", "is there a red circle ?"]
SEED = 7


@pytest.fixture(scope="module")
def answerer(tmp_path_factory) -> Answerer:
    config = from_dict(compose([*SETTINGS, f"seed={SEED}"]))
    folder = tmp_path_factory.mktemp("model")
    save_random_model(folder, config)
    return Answerer.load(folder, config)


def _pictures() -> list[bytes]:
    """Three pictures of different shapes, so that their rows restore in different groups."""
    drawn = np.random.default_rng(0)
    return [encode_image(drawn.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((48, 48), (48, 96), (96, 48))]


def _row(answerer: Answerer, picture: bytes | None, question: str, wish: Wish) -> Row:
    """A row as the server makes one, its picture decoded by itself."""
    content = [{"type": "text", "text": question}]
    reader = Reader(answerer, Settings("m"))
    texts, _ = reader.texts(ChatRequest(messages=[{"role": "user", "content": content}]))
    found = reader.conversation(texts)
    bank = None if picture is None else answerer.bank([picture], ["p"])
    return Row(0, conversation=Conversation(found.system, found.question, bank), wish=wish, changed=lambda: None)


def _run(batch: Batch, arrivals: dict[int, list[Row]], leave: dict[int, Row] | None = None, room: int = 6) -> None:
    """Step the batch until all rows have ended; rows arrive at their step, and join when there is room."""
    waiting: list[Row] = []
    for step in range(10_000):
        waiting += arrivals.get(step, [])
        if leave and step in leave:
            leave[step].gone = True
        take = max(0, room - len(batch.rows))
        joining, waiting = [row for row in waiting[:take] if not row.gone], waiting[take:]
        batch.admit(joining)
        batch.step()
        if not waiting and not batch.rows and step > max(arrivals):
            return
    raise AssertionError("the batch does not end")


@pytest.fixture
def undecided(monkeypatch):
    """A random model never asks; here every other reply does, by its own text, in the engine and in the batch alike."""
    monkeypatch.setattr(grammar, "asks_restoration", lambda reply: crc32(reply.encode()) % 2 == 0)


@pytest.mark.parametrize("seed", range(6))
def test_a_greedy_answer_does_not_depend_on_the_company(answerer, undecided, seed):
    drawn, pictures = random.Random(seed), _pictures()
    arrivals: dict[int, list[Row]] = {}
    told: list[tuple[Row, bytes]] = []
    for _ in range(14):
        wish = Wish(
            restore=drawn.choice(["auto", "auto", "always", "never", "plain"]),
            feedback=drawn.choice(["bridge", "reencode"]),
            seed=SEED + drawn.randrange(3),
            pictures=drawn.random() < 0.5,
        )
        picture = drawn.choice(pictures)
        row = _row(answerer, picture, drawn.choice(QUESTIONS), wish)
        arrivals.setdefault(drawn.randrange(20), []).append(row)
        told.append((row, picture))
    leavers = {drawn.randrange(1, 25): told.pop(drawn.randrange(len(told)))[0] for _ in range(2)}
    batch = Batch(answerer)
    _run(batch, arrivals, leavers)
    restored = 0
    for row, picture in told:
        bank = answerer.bank([picture], ["p"])
        question = answerer.tokenizer.decode(list(row.conversation.question))
        wish = row.wish
        alone = answerer.answer(
            bank, [(0, Question("q", "t", question, ""))], wish.restore, wish.feedback, first=wish.seed - SEED
        )[0]
        assert (tuple(row.texts), answer(row.texts)) == (alone.replies, alone.prediction or answer(row.texts))
        assert sum(len(reply.ids) for reply in row.replies) == alone.tokens
        assert bool(row.restorations) == alone.restored
        if alone.restored:
            restored += 1
            torch.testing.assert_close(row.restorations[-1].x0, alone.latent, rtol=1e-4, atol=1e-4)
            assert len(row.pictures) == (len(row.restorations) if wish.pictures else 0)
    assert restored and any(row.finish == "length" for row, _ in told)


def test_rows_that_ask_together_restore_as_one_batch(answerer, monkeypatch):
    sizes, real = [], batches.restore

    def seen(model, rows, *more, **named):
        sizes.append(len(rows.trajectories))
        real(model, rows, *more, **named)

    monkeypatch.setattr(batches, "restore", seen)
    picture = _pictures()[0]
    rows = [_row(answerer, picture, QUESTIONS[0], Wish(restore="always", seed=n)) for n in range(5)]
    batch = Batch(answerer)
    _run(batch, {0: rows[:2], 1: rows[2:]}, room=8)
    assert sizes == [2, 3], "the first two do not wait: nobody else decodes"
    sizes.clear()
    busy = _row(answerer, picture, QUESTIONS[1], Wish(restore="plain"))
    rows = [_row(answerer, picture, QUESTIONS[0], Wish(restore="always", seed=n)) for n in range(5)]
    _run(batch, {0: [busy, *rows[:2]], 1: rows[2:]}, room=8)
    assert sizes == [5], "while another row decodes, they wait for each other"
    assert batch.restored == 10


def test_sampled_rows_have_streams_of_their_own(answerer):
    picture, wish = _pictures()[0], Wish(restore="plain", temperature=1.0, top_p=0.9, seed=3)
    alone = _row(answerer, picture, QUESTIONS[0], wish)
    _run(Batch(answerer), {0: [alone]})
    company = [_row(answerer, picture, QUESTIONS[0], replace(wish, seed=n)) for n in range(6)]
    _run(Batch(answerer), {n: [row] for n, row in enumerate(company)})
    assert company[3].texts == alone.texts
    assert len({tuple(row.texts) for row in company}) > 3


def test_top_p_keeps_the_fewest_most_likely_tokens(answerer):
    row = _row(answerer, None, QUESTIONS[0], Wish(temperature=1.0, top_p=0.75))
    row.generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    assert {batches._draw(logits, row) for _ in range(200)} == {0, 2, 3}
    row.wish = replace(row.wish, top_p=0.0)
    assert {batches._draw(logits, row) for _ in range(20)} == {0}


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-300])
def test_the_smallest_temperature_draws_the_best_token(answerer, temperature):
    """A float32 overflows: the draw failed, and with it every row that decoded beside this one."""
    row = _row(answerer, None, QUESTIONS[0], Wish(temperature=temperature))
    row.generator = torch.Generator().manual_seed(0)
    assert batches._draw(torch.tensor([-3.0, 5.0, 4.9]), row) == 1


def test_a_stop_text_ends_a_reply_before_it(answerer):
    picture, wish = _pictures()[0], Wish(restore="never")
    whole = _row(answerer, picture, QUESTIONS[0], wish)
    _run(Batch(answerer), {0: [whole]})
    words = whole.texts[0].split()
    stop = words[6]
    cut = _row(answerer, picture, QUESTIONS[0], replace(wish, stop=(stop,)))
    _run(Batch(answerer), {0: [cut]})
    text = whole.texts[0]
    assert cut.finish == "stop" and cut.texts[0] == text[: text.index(stop, len(grammar.direct_prefix()))]
    assert row_texts(cut, answerer.tokenizer) == cut.texts


def test_a_conversation_without_a_picture_is_answered_and_never_restored(answerer, undecided):
    row = _row(answerer, None, QUESTIONS[0], Wish(restore="auto"))
    with_picture = _row(answerer, _pictures()[1], QUESTIONS[0], Wish(restore="always"))
    _run(Batch(answerer), {0: [row, with_picture]})
    assert len(row.texts) == 1 and not row.restorations and len(with_picture.restorations) == 1


def test_room_in_the_cache_is_given_back(answerer):
    """A long conversation that has left must not keep every later row's places as many as its own."""
    batch, picture = Batch(answerer), _pictures()[0]
    long = _row(answerer, picture, " ".join([QUESTIONS[0]] * 60), Wish(restore="plain", tokens=1))
    rows = [_row(answerer, picture, QUESTIONS[0], Wish(restore="plain")) for _ in range(3)]
    batch.admit([long, rows[0]])
    wide = batch.running.cache.keys[0].shape[2]
    batch.step()
    assert long.finish == "length"
    batch.admit([rows[1]])
    assert batch.running.cache.keys[0].shape[2] < wide / 2


def test_long_prompts_are_read_one_by_one(answerer, monkeypatch):
    rows = [_row(answerer, _pictures()[0], QUESTIONS[0], Wish(restore="plain")) for _ in range(4)]
    tokens = rows[0].conversation.tokens
    monkeypatch.setattr(batches, "PREFILL", 2 * tokens**2)
    assert [len(chunk) for chunk in batches._chunks(rows)] == [2, 2]
    monkeypatch.setattr(batches, "PREFILL", 1)
    assert [len(chunk) for chunk in batches._chunks(rows)] == [1] * 4


def test_a_conversation_counts_the_tokens_that_it_takes_in_the_cache(answerer):
    for picture in (None, *_pictures()):
        row = _row(answerer, picture, QUESTIONS[0], Wish(restore="plain"))
        batch = Batch(answerer)
        batch.admit([row])
        assert batch.read == row.conversation.tokens


# --- the worker -----------------------------------------------------------------------------------------------------


def _worker(answerer: Answerer, queue: int = 4, rows: int = 2) -> Worker:
    worker = Worker(lambda: answerer, rows, queue, Metrics())
    worker.start()
    return worker


def _finished(rows: list[Row], seconds: float = 60) -> None:
    import time

    until = time.monotonic() + seconds
    while not all(row.finish for row in rows):
        assert time.monotonic() < until, [row.finish for row in rows]
        time.sleep(0.01)


def test_a_step_that_fails_ends_its_rows_and_not_the_server(answerer, monkeypatch, capfd):
    worker = _worker(answerer)
    real, fail = batches.feed, [True]

    def feed(*given):
        if fail.pop() if fail else False:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return real(*given)

    monkeypatch.setattr(batches, "feed", feed)
    lost = [_row(answerer, _pictures()[0], QUESTIONS[0], Wish(restore="plain")) for _ in range(2)]
    worker.submit(lost)
    _finished(lost)
    assert [row.finish for row in lost] == ["error"] * 2 and "fewer --rows" in lost[0].failure
    good = _row(answerer, _pictures()[0], QUESTIONS[0], Wish(restore="plain"))
    worker.submit([good])
    _finished([good])
    assert good.finish in ("stop", "length") and good.texts
    worker.stop()
    worker.join(10)
    assert not worker.is_alive()


def test_a_restoration_that_fails_tells_the_rows_that_waited_for_it(answerer, monkeypatch):
    worker = _worker(answerer)

    def broken(*given, **named):
        raise ValueError("a fault")

    monkeypatch.setattr(batches, "restore", broken)
    row = _row(answerer, _pictures()[0], QUESTIONS[0], Wish(restore="always"))
    worker.submit([row])
    _finished([row])
    assert row.finish == "error" and row.failure == "internal error (ValueError)"
    worker.stop()


def test_the_queue_takes_all_choices_of_a_request_or_none(answerer):
    worker = Worker(lambda: answerer, 2, 3, Metrics())  # not started: nobody leaves the queue
    rows = [_row(answerer, None, QUESTIONS[0], Wish()) for _ in range(4)]
    worker.submit(rows[:2])
    with pytest.raises(Full) as full:
        worker.submit(rows[2:])
    assert len(worker._waiting) == 2 and not worker.full and full.value.wait >= 1
    worker.submit(rows[2:3])
    assert worker.full


class _Clockwork:
    """A batch whose rows all leave after so many steps of so many seconds; it is its own clock."""

    def __init__(self, steps: int, seconds: float) -> None:
        self.steps, self.seconds = steps, seconds
        self.rows, self.done, self.now = [], 0, 0.0
        self.read = self.written = self.restored = 0

    def admit(self, rows: list) -> None:
        self.rows += rows

    def step(self) -> None:
        self.now += self.seconds
        self.done += 1
        if self.done % self.steps == 0:
            self.rows = []

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("times", [1, 50])
def test_the_time_to_try_again_is_that_of_whole_rows(monkeypatch, times):
    """Of all their steps, not only of those in which one ends."""
    worker = Worker(lambda: None, 32, 64, Metrics())
    worker._batch = clockwork = _Clockwork(200, 0.05)
    monkeypatch.setattr(workers, "time", clockwork)
    for _ in range(times):
        worker._turn([SimpleNamespace() for _ in range(32)])
        while clockwork.rows:
            worker._turn([])
    worker.submit([SimpleNamespace() for _ in range(31)])
    assert worker.retry_after == 10, "a row takes 10 s, and those that wait are as many as have a place"


# --- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replies", "thought", "said"),
    [
        (["<think> sufficient : a </think> <answer> b </answer>"], "sufficient : a", "b"),
        (["<think> x </think> <image_restore>", "<think> y </think> <answer> z </answer>"], "x\ny", "z"),
        (["<think> cut in the"], "cut in the", ""),
        (["<think> a </think> <answer> cut"], "a", "cut"),
        (["<think> a <answer> cut"], "a", "cut"),
        (["a plain text"], "", "a plain text"),
        (["<answer> a </answer> <answer> b </answer>"], "", "b"),
        (["<think> a </think> just said"], "a", "just said"),
        (["<think> a </think> <answer> </answer>"], "a", ""),
        (["<think> a </think> <image_restore>"], "a", ""),
    ],
)
def test_the_thinking_and_the_answer_are_told_apart(replies, thought, said):
    assert (thinking(replies), answer(replies)) == (thought, said)
    if extracted := grammar.extract_answer(replies[-1]):
        assert said == extracted


def test_what_is_streamed_of_a_thought_never_has_to_be_taken_back():
    drawn = random.Random(0)
    pieces = ["<think>", " a", "b <", "</", "think>", " ", "\ufffd", "é", "<answer>", " c ", "</answer>", "sto", "p"]
    for _ in range(500):
        text, before = "", ""
        for piece in (drawn.choice(pieces) for _ in range(12)):
            text += piece
            if "\ufffd" in text[:-1]:
                break
            now = thinking([text], growing=True, stop=("stop",))
            assert now.startswith(before), (text, before, now)
            before = now
        whole = text.partition("stop")[0].rstrip("\ufffd")
        assert thinking([whole]).startswith(before) or ("stop" in text and before in thinking([text])), text


def test_the_rows_of_the_engine_carry_those_of_the_server(answerer):
    row = _row(answerer, _pictures()[0], QUESTIONS[0], Wish(restore="plain"))
    batch = Batch(answerer)
    batch.admit([row])
    assert isinstance(batch.running, Rows) and batch.running.trajectories[0] is row
