"""A question is shown with its options, once: what counts as a list, and what is listed anew."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clear.data.records import Question
from clear.errors import ClearError
from clear.model.images import ImageBank
from clear.reasoning.answering import Answerer
from clear.reasoning.prompts import question_text
from clear.sources.rows import options_in
from clear.sources.rows import question as made
from clear.sources.scenes.render import scenes
from clear.sources.scenes.words import LABELS, VOCABULARY, lists_options
from tests.tiny import save_random_model, trace_workspace


def asked(text: str, *options: str) -> str:
    return question_text(Question("q1", "test", text, "A", options))


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("Are the cat's eyes not closed?", ("yes", "no")),
        ("With 10 chairs and 12 tables, how many dogs?", ("0", "1", "2")),
        ("is the circle red or blue ?", ("red", "blue")),
        ("Which?\nA. 3.5\nB. 4.5", ("3", "4")),
        ("Which? A. blue-green B. red", ("blue", "red")),
        ("Which?\nA. red\nB. blue", ("blue", "red")),  # another order
        ("Which?\nA. red\nB. blue", ("red", "blue", "green")),
        ("Is VITAMIN A red or DRUG B blue?", ("red", "blue")),
    ],
)
def test_options_whose_words_merely_occur_are_listed(text, options):
    assert asked(text, *options) == "\n".join([text, *(f"{k}. {v}" for k, v in zip("ABC", options, strict=False))])


@pytest.mark.parametrize(
    "text",
    [
        "Which?\nA. red one\nB. blue",
        "Which? (A) red one (B) blue",
        "Which?\nA) red  one\nB) blue\nAnswer with the letter.",
        "Which? A: red one, B: blue.",
        "Which? A.red one; B.blue",
        "Is it (A) red one or (B) blue?",
        "which ? A red one B blue",
    ],
)
def test_a_list_in_any_usual_style_is_not_repeated(text):
    assert asked(text, "red one", "blue") == text


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=10))
def test_every_option_stands_behind_its_letter_and_is_listed_once(text, options):
    shown = asked(text, *options)
    assert lists_options(shown, options)
    assert question_text(Question("q1", "test", shown, "A", tuple(options))) == shown


@given(st.lists(st.from_regex(r"[a-z0-9][a-z0-9 .,']{0,10}[a-z0-9]", fullmatch=True), min_size=2, max_size=10))
def test_what_a_source_finds_as_options_is_found_as_listed(options):
    text = "\n".join(["Which?", *(f"{k}. {v}" for k, v in zip(LABELS, options, strict=False)), "Answer."])
    assert options_in(text) == tuple(options) and asked(text, *options) == text


def test_scenes_stay_within_their_vocabulary():
    questions = [q for sample in scenes("sft", 40, 7, 64, 6) for q in sample.questions]
    assert any(q.options for q in questions)
    assert {word for q in questions for word in question_text(q).split()} <= set(VOCABULARY)


def test_an_option_without_text_keeps_its_letter():
    assert asked("Which?", "red", " ", "blue") == "Which?\nA. red\nC. blue"
    assert asked("Which? A. red C. blue", "red", " ", "blue") == "Which? A. red C. blue"
    assert asked("Which? A. red B. blue", "red", " ", "blue").endswith("\nA. red\nC. blue")


def test_options_that_cannot_be_shown_are_named():
    with pytest.raises(ClearError, match=r"question q1: 'Which\?' has 2 options, all empty"):
        asked("Which?", "", "  ")
    many = [str(n) for n in range(11)]
    with pytest.raises(ClearError, match=r"question q1.* has 11 options; at most 10"):
        asked("Which?", *many)
    assert made("q1", "test", "Which?", "A", ["red", " "]) == "option B is empty"
    assert made("q1", "test", "Which?", "A", many) == "11 options; a question has at most 10"
    good = made("q1", "test", "Which?", "J", many[:10])
    assert question_text(replace(good, text="Which?")).endswith("J. 9")


@pytest.fixture
def answerer(tmp_path, monkeypatch) -> Answerer:
    monkeypatch.chdir(tmp_path)
    config = trace_workspace(tmp_path, ["sampling.batch=2", "sampling.flow_steps=1", "runtime.device=cpu"], [])
    save_random_model(tmp_path / "model", config)
    return Answerer.load(tmp_path / "model", config)


def test_pictures_are_held_by_the_batch_alone(answerer, monkeypatch):
    """The prompts of a training, and the latents of its answers, are more than a machine holds."""
    samples = list(scenes("rl", 4, 1, 64, 2))
    bank = answerer.bank([s.seen for s in samples], [s.key for s in samples])
    asked = [(i, q) for i, s in enumerate(samples) for q in s.questions]
    read, whole = [], ImageBank.patches
    monkeypatch.setattr(ImageBank, "patches", lambda self, i: read.append(i) or whole(self, i))
    prompts = answerer.prompts(bank, asked)
    assert len(prompts) == 8 and not read
    assert [len(p.latent) for p in prompts[3:5]] == [len(bank.latents[0])] * 2 and read == [1, 2]
    for n, prompt in enumerate(prompts):
        assert prompt.segments() == prompts.outline(n).segments()
    read.clear()
    answers = answerer.answers(bank, asked, "always")
    first = [next(answers)]
    assert read == [0, 0], "a batch of two questions"
    assert [a.replies for a in first + list(answers)] == [a.replies for a in answerer.answer(bank, asked, "always")]


def test_no_batch_is_answered_before_a_prompt_that_is_too_long(answerer):
    sample = next(iter(scenes("rl", 2, 1, 64, 2)))
    bank = answerer.bank([sample.seen], [sample.key])
    fits = answerer.prompts(bank, [(0, sample.questions[0])]).outline(0).positions
    config = answerer.model.config
    answerer.model.config = replace(config, llm=replace(config.llm, positions=fits))
    long = replace(sample.questions[1], text=" ".join([sample.questions[1].text] * 9))
    with pytest.raises(ClearError, match=r"shorten it"):
        answerer.prompts(bank, [(0, sample.questions[0]), (0, long)])
