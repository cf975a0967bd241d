"""The rendered source: exact ground truth, no answer in the question's text, same seed same bytes."""

import json
import re
from collections import Counter
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clear.data.images import decode_image
from clear.data.records import Question, Sample, read_samples
from clear.errors import ClearError
from clear.sources.scenes.questions import TASKS, blind_baseline, chance, compose, draw_targets
from clear.sources.scenes.render import (
    FACTORS,
    Scene,
    annotation,
    captions,
    cell_labels,
    couple,
    draw_cells,
    factors,
    families,
    scenes,
)
from clear.sources.scenes.words import COLOURS, LETTERS, SHAPES, VOCABULARY, normalise, template
from clear.stages import source as stage

STEPS = {"above": (-1, 0), "below": (1, 0), "left": (0, -1), "right": (0, 1)}


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(scenes("sft", 480, seed=3, size=256, questions=3))


@pytest.fixture(scope="module")
def asked() -> list[tuple[list[int], Question]]:
    """(labels, question) for many scenes, without the cost of rendering them."""
    rng, found = Random(5), []
    while len(found) < 24_000:
        targets = draw_targets([task for task in TASKS if task != "pair"], rng)
        while True:
            cells = draw_cells(rng)
            drafts = compose(cells, targets, rng)
            if drafts is not None:
                break
        labels = cell_labels(annotation(Scene(cells, ((0, 0, 0), (0, 0, 0)), True, ())))
        for task, draft in drafts.items():
            found.append((labels, Question("q", task, draft.text, draft.answer, draft.options, draft.evidence)))
    return found


# --- an independent reading of the ground truth: from the labels to the answer, never through the source's own code ---


def things(labels: list[int]) -> dict[str, tuple[int, int, str]]:
    """Name to (row, column, colour or letter), from the integer labels alone."""
    found = {}
    for i, label in enumerate(labels):
        if label >= 37:
            found["sign"] = (i // 3, i % 3, LETTERS[label - 37])
        elif label:
            found[SHAPES[(label - 1) // 6]] = (i // 3, i % 3, COLOURS[(label - 1) % 6])
    return found


def solve(text: str, labels: list[int]) -> str:
    """Answer a question from its words and the labels."""
    seen = things(labels)
    if match := re.fullmatch(r"which colour is the (\w+) \? A (\w+) B (\w+) C (\w+) D (\w+)", text):
        return "ABCD"[match.groups()[1:].index(seen[match[1]][2])]
    if text == "which letter is on the sign ?":
        return seen["sign"][2]
    if match := re.fullmatch(r"how many (\w+) shapes \?", text):
        return str(sum(name != "sign" and value == match[1] for name, (_, _, value) in seen.items()))
    if match := re.fullmatch(r"is the (\w+) left or right of the (\w+) \?", text):
        columns = seen[match[1]][1], seen[match[2]][1]
        assert columns[0] != columns[1]
        return "left" if columns[0] < columns[1] else "right"
    if match := re.fullmatch(r"is the (\w+) above or below the (\w+) \?", text):
        rows = seen[match[1]][0], seen[match[2]][0]
        assert rows[0] != rows[1]
        return "above" if rows[0] < rows[1] else "below"
    if match := re.fullmatch(r"is the (\w+) (\w+) or (\w+) \?", text):
        assert seen[match[1]][2] in match.groups()[1:]
        return seen[match[1]][2]
    if match := re.fullmatch(r"which colour is the shape (\w+)(?: of)? the (\w+) \?", text):
        row, column = (a + b for a, b in zip(seen[match[2]][:2], STEPS[match[1]], strict=True))
        return next(v for n, (r, c, v) in seen.items() if (r, c) == (row, column) and n != "sign")
    match = re.fullmatch(r"is there (an?) (\w+) (\w+) \?", text)
    assert match and (match[1] == "an") == (match[2] == "orange")
    return "yes" if match[3] in seen and seen[match[3]][2] == match[2] else "no"


def square(name: str) -> tuple[int, int]:
    """Row and column of a chess-board name."""
    return int(name[1]) - 1, ord(name[0]) - ord("a")


def evidence_is_true(question: Question, labels: list[int]) -> bool:
    """Check every statement of the evidence against the labels."""
    seen, words = things(labels), question.evidence.split()
    if question.task == "reading":
        return words == ["sign", "says", seen["sign"][2]]
    if words[0] == "no":
        return words[1] not in seen and words[1] in question.text.split()
    if words[1] == ":":
        named = {n for n, (_, _, v) in seen.items() if n != "sign" and v == words[0]}
        return words[0] in question.text and (set(words[2:]) == named or (words[2:] == ["none"] and not named))
    if question.task == "reasoning":
        pattern = r"(\w+) at (\w\d) (\w+)(?: of)? (\w\d) (\w+) is (\w+)"
        anchor, here, relation, there, shape, colour = re.fullmatch(pattern, question.evidence).groups()
        place, target = square(here), square(there)
        assert seen[anchor][:2] == place and colour == question.answer
        return seen[shape] == (*target, colour) and tuple(np.subtract(target, place)) == STEPS[relation]
    if words[1] == "at":
        return all(seen[name][:2] == square(place) for name, place in zip(words[0::3], words[2::3], strict=True))
    return words[1] == "is" and seen[words[0]][2] == words[2] and words[0] in question.text.split()


def test_answers_and_evidence_are_true(samples, asked):
    rendered = [(cell_labels(s.annotation), q) for s in samples for q in s.questions]
    for labels, question in [*rendered, *asked]:
        assert solve(question.text, labels) == question.answer, question
        assert evidence_is_true(question, labels), question


def test_captions_and_factors_say_what_the_labels_say(samples):
    for sample in samples:
        seen = things(cell_labels(sample.annotation))
        by_shape, by_colour = captions(sample.annotation)
        facts = re.findall(r"(\w+) at (\w\d) (?:is|says) (\w+)", by_shape)
        assert {name: (*square(place), value) for name, place, value in facts} == seen and len(facts) == len(seen)
        assert set(f"{by_shape} {by_colour}".split()) <= set(VOCABULARY)
        groups = re.findall(r"(\w+) :((?: (?!\w+ :)\w+)+)", by_colour)
        assert [colour for colour, _ in groups] == list(COLOURS)
        for colour, named in groups:
            assert set(named.split()) == ({n for n, (_, _, value) in seen.items() if value == colour} or {"none"})
        for i, numbers in enumerate(factors(sample.annotation)):
            assert all(0 <= n < size for n, size in zip(numbers, FACTORS, strict=True)) and numbers[3:] == divmod(i, 3)
            name = ("", *SHAPES, "sign")[numbers[0]]
            found = ("", *COLOURS)[numbers[1]] + ("", *LETTERS)[numbers[2]]
            assert (name, found) == next(((n, v) for n, (r, c, v) in seen.items() if (r, c) == numbers[3:]), ("", ""))


def test_scenes_hold_one_sign_and_four_to_six_different_shapes(samples):
    for sample in samples:
        labels = cell_labels(sample.annotation)
        shapes = [(label - 1) // 6 for label in labels if 1 <= label <= 36]
        assert sum(label >= 37 for label in labels) == 1
        assert len(set(shapes)) == len(shapes) and 4 <= len(shapes) <= 6


# --- balance ---------------------------------------------------------------------------------------------------------


def chi_square(counts: Counter, values: tuple[str, ...]) -> float:
    """Statistic against equal frequencies, divided by its degrees of freedom; about 1 where they are equal."""
    assert set(counts) <= set(values)
    expected = sum(counts.values()) / len(values)
    return sum((counts[v] - expected) ** 2 / expected for v in values) / (len(values) - 1)


def test_answers_are_uniform_and_negatives_are_hard(asked):
    by_kind: dict[str, Counter] = {}
    for _, q in asked:
        kind = "count" if q.text.startswith("how many") else q.task
        by_kind.setdefault(kind, Counter())[q.answer] += 1
    values = {
        "attribute": tuple("ABCD"),
        "reading": LETTERS,
        "count": ("0", "1", "2", "3"),
        "spatial": tuple(STEPS),
        "reasoning": COLOURS,
        "existence": ("yes", "no"),
    }
    assert set(by_kind) == set(values)
    for kind, counts in by_kind.items():
        assert chi_square(counts, values[kind]) < 5, (kind, counts)
    assert 0.47 < by_kind["count"].total() / (by_kind["count"].total() + by_kind["spatial"].total()) < 0.53
    negatives = [q for _, q in asked if q.task == "existence" and q.answer == "no"]
    assert 0.45 < np.mean([q.evidence.startswith("no ") for q in negatives]) < 0.55


def test_hard_negatives_show_the_shape_or_the_colour(asked):
    for labels, q in asked:
        if q.task == "existence" and q.answer == "no":
            colour, shape = q.text.split()[-3:-1]
            seen = things(labels)
            colours = [value for name, (_, _, value) in seen.items() if name != "sign"]
            assert (shape in seen and seen[shape][2] != colour) or (shape not in seen and colour in colours)


def test_no_exact_text_predicts_its_answer(asked):
    # Pooled over all texts of a template, the colours and shapes named in a text must not tilt its answer.
    tables: dict[tuple[str, str], Counter] = {}
    for _, q in asked:
        if q.task in ("existence", "reasoning", "spatial"):
            tables.setdefault((template(q.text), q.text), Counter())[q.answer] += 1
    for kind in {kind for kind, _ in tables}:
        found = [table for (other, _), table in tables.items() if other == kind]
        answers = {answer for table in found for answer in table}
        degrees = (len(answers) - 1) * len(found)
        expected = [(table[a], table.total() / len(answers)) for table in found for a in answers]
        statistic = sum((seen - mean) ** 2 / mean for seen, mean in expected)
        assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5, (kind, statistic, degrees)


def test_blind_guesser_scores_at_chance(asked, samples):
    def wrap(questions):
        return [Sample("s", "scenes", "sft", b"", "", (q,)) for q in questions]

    questions = [q for _, q in asked]
    result = blind_baseline(wrap(questions[:16_000]), wrap(questions[16_000:]))
    assert result["total"]["count"] == 8_000
    for task, row in result.items():
        error = (row["chance"] * (1 - row["chance"]) / row["count"]) ** 0.5
        assert abs(row["accuracy"] - row["chance"]) < 4 * error, (task, row)
    pairs = [q for s in samples for q in s.questions if q.task == "pair"]
    # One guess per text is right for one half of every minimal pair, whatever was learnt.
    for train in (pairs, pairs[: len(pairs) // 4 * 2]):
        assert blind_baseline(wrap(train), wrap(pairs))["pair"]["accuracy"] == 0.5


def test_blind_guesser_backs_off_and_refuses_unknown_tasks():
    def one(task, text, answer):
        return Sample("s", "scenes", "sft", b"", "", (Question("q", task, text, answer),))

    train = [one("existence", "is there a red circle ?", "yes")] * 2
    train += [one("existence", "is there a blue star ?", "no")] * 3
    for text, guess in (("is there a red circle ?", "yes"), ("is there an orange ring ?", "no"), ("what ?", "no")):
        assert blind_baseline(train, [one("existence", text, guess)])["total"]["accuracy"] == 1
    with pytest.raises(ClearError, match="no task 'reading'"):
        blind_baseline(train, [one("reading", "which letter is on the sign ?", "a")])
    with pytest.raises(ClearError, match="hold no questions"):
        blind_baseline(train, [])


def test_chance_of_an_unknown_task_is_refused():
    with pytest.raises(ClearError, match="task 'poetry'"):
        chance(Question("q", "poetry", "why ?", "because"))


@pytest.mark.parametrize("questions", range(1, 7))
def test_families_rotate(questions):
    chosen = [families("sft", k, 1, questions) for k in range(60)]
    assert all(len(set(tasks)) == questions for tasks in chosen)
    assert len(set(Counter(t for tasks in chosen for t in tasks).values())) == 1
    if questions > 1:
        assert len(set(chosen)) > 6


# --- minimal pairs ---------------------------------------------------------------------------------------------------


def test_minimal_pairs_differ_in_one_colour_only(samples):
    found = 0
    for first, second in zip(samples[::2], samples[1::2], strict=True):
        halves = [next((q for q in s.questions if q.task == "pair"), None) for s in (first, second)]
        assert (halves[0] is None) == (halves[1] is None)
        if halves[0] is None:
            assert first.annotation != second.annotation
            continue
        found += 1
        a, b = halves
        assert a.pair == b.pair != "" and a.text == b.text and {a.answer, b.answer} == set(a.text.split()[3:6:2])
        labels = [cell_labels(s.annotation) for s in (first, second)]
        (place,) = [i for i in range(9) if labels[0][i] != labels[1][i]]
        assert (labels[0][place] - 1) // 6 == (labels[1][place] - 1) // 6
        assert [q.task for q in first.questions] == [q.task for q in second.questions]
        changed = (decode_image(first.image) != decode_image(second.image)).any(axis=2)
        rows, columns = np.nonzero(changed)
        edge = 256 / 3
        assert rows.min() // edge == rows.max() // edge == place // 3
        assert columns.min() // edge == columns.max() // edge == place % 3
    assert found == 120
    firsts = [q.answer == q.text.split()[3] for s in samples[::2] for q in s.questions if q.task == "pair"]
    assert 0.3 < np.mean(firsts) < 0.7
    assert all(q.pair == "" for s in samples for q in s.questions if q.task != "pair")


# --- words -----------------------------------------------------------------------------------------------------------


def test_vocabulary_is_complete_and_has_no_idle_word(samples, asked):
    questions = [q for s in samples for q in s.questions] + [q for _, q in asked]
    used = {word for q in questions for part in (q.text, q.answer, q.evidence, *q.options) for word in part.split(" ")}
    assert used == set(VOCABULARY) and len(set(VOCABULARY)) == len(VOCABULARY)


def test_normalise():
    for text, expected in (
        (" Red. ", "red"),
        ("(A)", "A"),
        ("b", "b"),
        ("K", "k"),
        ("B: Blue!", "b blue"),
        (" ?", "?"),
    ):
        assert normalise(text) == expected


@settings(deadline=None)
@given(st.text(max_size=40))
def test_normalise_is_idempotent(text):
    assert normalise(normalise(text)) == normalise(text)


def test_every_answer_is_its_own_normal_form(asked):
    assert all(normalise(q.answer) == q.answer for _, q in asked)


def test_template_forgets_shapes_colours_and_relations():
    assert template("is there an orange ring ?") == template("is there a red circle ?")
    assert template("which colour is the shape above the star ?").endswith("<relation> the <shape> ?")


# --- samples and the stage -------------------------------------------------------------------------------------------


def test_a_sample_depends_on_seed_split_and_number_only(samples):
    assert list(scenes("sft", 8, 3, 256, 3)) == samples[:8]
    assert couple("sft", 100, 3, 256, 3) == tuple(samples[200:202])
    assert samples[200].id == "scenes-sft-000200"
    others = [list(scenes(split, 8, seed, 256, 3)) for split, seed in (("rl", 3), ("sft", 4))]
    hashes = [s.image_sha256 for found in (samples, *others) for s in found]
    assert len(set(hashes)) == len(hashes)
    ids = [q.id for s in samples for q in s.questions]
    assert len(set(ids)) == len(ids)


def test_small_pictures(samples):
    assert np.mean([len(s.image) for s in samples]) < 20_000


@pytest.mark.parametrize(("count", "questions", "message"), [(5, 3, "is odd"), (4, 7, "families"), (4, 0, "families")])
def test_impossible_requests_are_refused(count, questions, message):
    with pytest.raises(ClearError, match=message):
        next(scenes("sft", count, 1, 256, questions))


def small_config(workers: int, **counts: int) -> SimpleNamespace:
    sizes = dict.fromkeys(stage.SPLITS, 24) | counts
    source = SimpleNamespace(kind="scenes", image_size=256, questions_per_image=3, **sizes)
    return SimpleNamespace(seed=11, source=source, degrade=SimpleNamespace(workers=workers))


def test_stage_bytes_do_not_depend_on_workers(tmp_path, monkeypatch):
    outcome = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        monkeypatch.chdir(folder)
        stage.run(small_config(workers, sft=40))
        outcome.append({str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()})
    assert outcome[0] == outcome[1]
    samples = {f"data/samples/{s}/00000.parquet" for s in stage.SPLITS}
    assert set(outcome[0]) == samples | {"data/metrics/source.json", "data/rejects/source.parquet"}
    assert list(read_samples(tmp_path / "1/data/samples/rl")) == list(scenes("rl", 24, 11, 256, 3))
    report = json.loads(outcome[0]["data/metrics/source.json"])
    assert report["images"]["sft"] == 40 and sum(report["questions"]["sft"].values()) == 120
    assert set(report["blind_baseline"]["bench"]) == {*TASKS, "total"} and set(report["answers"]) == set(TASKS)


def test_stage_refuses_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClearError, match=r"source\.bench = 7 is odd"):
        stage.run(small_config(1, bench=7))
    assert not any(tmp_path.iterdir())


def test_an_image_of_two_samples_stops_the_stage(samples):
    owners: dict[str, str] = {}
    list(stage.distinct(samples[:4], owners))
    twin = Sample("scenes-rl-000000", "scenes", "rl", samples[1].image, samples[1].image_sha256)
    with pytest.raises(ClearError, match="scenes-rl-000000 and scenes-sft-000001"):
        list(stage.distinct([twin], owners))
