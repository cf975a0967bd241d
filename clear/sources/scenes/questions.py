"""Six families of questions about a rendered scene, with oracle evidence: stand-ins for the six base benchmarks.

The families follow the benchmarks of METHOD §6: attribute (MMBench, multiple choice), reading (MM-Vet, free answer),
pair (MMVP, minimal pairs), spatial (CV-Bench: counting and relation), reasoning (MMStar, two steps) and existence
(RealWorldQA). A guesser who sees only the text must score at chance, so the wanted answer (the target) is drawn
before the scene: `draw_targets` draws it uniformly, `compose` builds the questions around it, and a scene that
cannot realise every target is rejected and drawn again by the caller. What is left free (shape, colour, position) is
drawn by rules that treat all shapes, all colours and mirrored positions equally.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from clear.data.records import Question, Sample
from clear.errors import ClearError
from clear.sources.scenes.words import (
    CELLS,
    COLOURS,
    LETTERS,
    OPTION_LETTERS,
    RELATIONS,
    SHAPES,
    SIGN,
    VOCABULARY,
    Cells,
    normalise,
    template,
)

__all__ = ["TASKS", "VOCABULARY", "Draft", "blind_baseline", "chance", "compose", "draw_targets", "normalise"]

TASKS = ("attribute", "reading", "pair", "spatial", "reasoning", "existence")

Target = int | str | tuple | None
"""The wanted answer of one question; each family below says what its own means."""


@dataclass(frozen=True)
class Draft:
    """A question before it has an identity."""

    text: str
    answer: str
    evidence: str
    options: tuple[str, ...] = ()


def objects(cells: Cells) -> dict[str, tuple[int, str]]:
    """Shape to (cell number, colour) of every object; the sign is not among them."""
    return {cell[0]: (i, cell[1]) for i, cell in enumerate(cells) if cell is not None and cell[0] != SIGN}


def _attribute(cells: Cells, target: int, rng: Random) -> Draft:
    """Target: position of the right option."""
    shape, (_, colour) = rng.choice(list(objects(cells).items()))
    options = rng.sample([c for c in COLOURS if c != colour], 3)
    options.insert(target, colour)
    choices = " ".join(f"{letter} {option}" for letter, option in zip(OPTION_LETTERS, options, strict=True))
    text = f"which colour is the {shape} ? {choices}"
    return Draft(text, OPTION_LETTERS[target], f"{shape} is {colour}", tuple(options))


def _reading(cells: Cells, target: None, rng: Random) -> Draft:
    """No target: the letter of a scene is drawn uniformly and nothing else depends on it."""
    letter = next(cell[1] for cell in cells if cell is not None and cell[0] == SIGN)
    return Draft("which letter is on the sign ?", letter, f"sign says {letter}")


def _pair(cells: Cells, target: tuple[int, str, str], rng: Random) -> Draft:
    """Target: cell whose colour differs between the two images, and both colours in the order of the text."""
    index, first, second = target
    shape, colour = cells[index]
    return Draft(f"is the {shape} {first} or {second} ?", colour, f"{shape} is {colour}")


def _spatial(cells: Cells, target: int | str, rng: Random) -> Draft | None:
    """Target: a count, or a relation."""
    return _count(cells, target, rng) if isinstance(target, int) else _relation(cells, target, rng)


def _count(cells: Cells, target: int, rng: Random) -> Draft | None:
    by_colour: dict[str, list[str]] = {colour: [] for colour in COLOURS}
    for shape, (_, colour) in sorted(objects(cells).items(), key=lambda item: SHAPES.index(item[0])):
        by_colour[colour].append(shape)
    fitting = [colour for colour, shapes in by_colour.items() if len(shapes) == target]
    if not fitting:
        return None
    colour = rng.choice(fitting)
    return Draft(f"how many {colour} shapes ?", str(target), f"{colour} : {' '.join(by_colour[colour]) or 'none'}")


def _relation(cells: Cells, target: str, rng: Random) -> Draft | None:
    across = target in ("left", "right")
    places = {shape: i for shape, (i, _) in objects(cells).items()}
    lines = {shape: i % 3 if across else i // 3 for shape, i in places.items()}
    sign = sum(RELATIONS[target])
    fitting = [(a, b) for a in lines for b in lines if (lines[a] - lines[b]) * sign > 0]
    if not fitting:
        return None
    a, b = rng.choice(fitting)
    text = f"is the {a} left or right of the {b} ?" if across else f"is the {a} above or below the {b} ?"
    return Draft(text, target, f"{a} at {CELLS[places[a]]} {b} at {CELLS[places[b]]}")


def _reasoning(cells: Cells, target: str, rng: Random) -> Draft | None:
    """Target: colour of the shape that stands next to the anchor."""
    fitting = []
    for shape, (i, colour) in objects(cells).items():
        if colour != target:
            continue
        for relation, (down, right) in RELATIONS.items():
            row, column = i // 3 - down, i % 3 - right
            place = 3 * row + column
            if 0 <= row < 3 and 0 <= column < 3 and cells[place] is not None:
                fitting.append((relation, cells[place][0], place, shape, i))
    if not fitting:
        return None
    relation, anchor, place, shape, i = rng.choice(fitting)
    words = relation if relation in ("above", "below") else f"{relation} of"
    # One step per look: where the anchor is, which cell that points to, what is there.
    evidence = f"{anchor} at {CELLS[place]} {words} {CELLS[i]} {shape} is {target}"
    return Draft(f"which colour is the shape {words} the {anchor} ?", target, evidence)


def _existence(cells: Cells, target: str, rng: Random) -> Draft | None:
    """Target: "yes", "other colour" (the shape is there, not in this colour) or "other shape" (the reverse)."""
    here = objects(cells)
    if target == "other shape":
        absent = [shape for shape in SHAPES if shape not in here]
        if not absent:
            return None
        shape, found = rng.choice(absent), None
        colour = rng.choice(sorted({colour for _, colour in here.values()}))
    else:
        shape, (_, found) = rng.choice(list(here.items()))
        colour = found if target == "yes" else rng.choice([c for c in COLOURS if c != found])
    article = "an" if colour[0] in "aeiou" else "a"
    evidence = f"{shape} is {found}" if found else f"no {shape}"
    return Draft(f"is there {article} {colour} {shape} ?", "yes" if target == "yes" else "no", evidence)


_ASK: dict[str, Callable[[Cells, Target, Random], Draft | None]] = {
    "attribute": _attribute,
    "reading": _reading,
    "pair": _pair,
    "spatial": _spatial,
    "reasoning": _reasoning,
    "existence": _existence,
}


def draw_targets(tasks: Iterable[str], rng: Random) -> dict[str, Target]:
    """A wanted answer per task, uniform in the sense of `chance`; None where the scene itself decides."""
    draw: dict[str, Callable[[], Target]] = {
        "attribute": lambda: rng.randrange(len(OPTION_LETTERS)),
        "spatial": lambda: rng.randrange(4) if rng.random() < 0.5 else rng.choice(list(RELATIONS)),
        "reasoning": lambda: rng.choice(COLOURS),
        "existence": lambda: rng.choice(("yes", "yes", "other colour", "other shape")),
    }
    return {task: draw[task]() if task in draw else None for task in tasks}


def compose(cells: Cells, targets: dict[str, Target], rng: Random) -> dict[str, Draft] | None:
    """One question per task with the wanted answers, or None if this scene cannot realise one of them."""
    drafts = {}
    for task, target in targets.items():
        draft = _ASK[task](cells, target, rng)
        if draft is None:
            return None
        drafts[task] = draft
    return drafts


def chance(question: Question) -> float:
    """Expected accuracy of a uniform guess among the answers that the text allows. Raises ClearError on other tasks."""
    if question.task == "attribute":
        return 1 / len(question.options)
    if question.task == "spatial":
        return 1 / 4 if question.text.startswith("how many ") else 1 / 2
    known = {"reading": 1 / len(LETTERS), "pair": 1 / 2, "reasoning": 1 / len(COLOURS), "existence": 1 / 2}
    if question.task not in known:
        raise ClearError(f"question {question.id}: task '{question.task}' is not one of {', '.join(TASKS)}.")
    return known[question.task]


def _contexts(question: Question) -> tuple[tuple[str, str], ...]:
    return ("text", question.text), ("template", template(question.text)), ("task", question.task)


def _as_seen(question: Question) -> int | str:
    """The answer as a template knows it: its place among the words of the text where it is one ("red or blue")."""
    words = question.text.split()
    return words.index(question.answer) if question.answer in words else question.answer


def blind_baseline(train: Iterable[Sample], test: Iterable[Sample]) -> dict[str, dict[str, float]]:
    """How far the question's text alone carries: learn answers on `train`, guess without image on `test`.

    The guess is the most frequent answer after exactly this text, or after its template, or in its task, whichever
    is known first (ties: the first in alphabetical order). An answer that the text itself names counts by its place
    there, so that backing off never guesses a colour that was not offered.
    Returns {task or "total": {accuracy, chance, count}}.
    Raises ClearError if a task of `test` does not occur in `train` or `test` has no questions.
    """
    seen: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for sample in train:
        for question in sample.questions:
            for context in _contexts(question):
                seen[context][_as_seen(question)] += 1
    guess = {context: min(answers, key=lambda a: (-answers[a], str(a))) for context, answers in seen.items()}
    rows: dict[str, list[tuple[bool, float]]] = defaultdict(list)
    for sample in test:
        for question in sample.questions:
            known = next((guess[context] for context in _contexts(question) if context in guess), None)
            if known is None:
                raise ClearError(f"{question.id}: no task '{question.task}' in the training samples; add some of it.")
            for name in (question.task, "total"):
                rows[name].append((known == _as_seen(question), chance(question)))
    if not rows:
        raise ClearError("blind baseline: the test samples hold no questions; pass samples that have some.")
    return {
        name: {
            "accuracy": sum(hit for hit, _ in found) / len(found),
            "chance": sum(odds for _, odds in found) / len(found),
            "count": len(found),
        }
        for name, found in rows.items()
    }
