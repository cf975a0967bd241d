"""Rendered scenes: the clean source of the small profiles, with exact ground truth.

A scene is a 3x3 grid with one sign (a capital letter on a light plate) and four to six objects of different shapes
over a soft background. A model of the `tiny` profile sees 16 px per cell, so everything nearly fills its cell.
Images come in couples (samples 2k and 2k + 1): where the couple's questions include a minimal pair, the two images
differ in the colour of one object only; otherwise they are independent. A couple depends on nothing but
(seed, split, k), hence neither order nor worker count can change a byte.

This source is not in the publication, which samples LLaVA-OneVision (METHOD §6); it stands in for it where neither
data nor a GPU is available.
"""

import colorsys
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from clear.data.images import encode_image
from clear.data.records import Question, Sample, sha256
from clear.errors import ClearError
from clear.sources.scenes.questions import TASKS, Draft, compose, draw_targets, objects
from clear.sources.scenes.words import CELLS, COLOURS, LETTERS, SHAPES, SIGN, Cells

CELL_CLASSES = 1 + len(SHAPES) * len(COLOURS) + len(LETTERS)
"""Number of labels a cell can have: empty, shape and colour, sign letter."""

RGB = {
    "red": (175, 66, 71),
    "green": (65, 134, 79),
    "blue": (69, 96, 178),
    "yellow": (211, 189, 79),
    "purple": (141, 85, 165),
    "orange": (204, 131, 63),
}
"""Muted on purpose: like real surfaces, they are told apart with ease in a good picture and not in a faded one."""
_PLATE, _INK = (246, 246, 238), (28, 30, 40)
_ATTEMPTS = 20_000  # scenes tried for one couple; with all six families 14 are needed on average


@dataclass(frozen=True)
class Jitter:
    """How one cell's content departs from the ideal one."""

    x: float  # cell widths, to the right
    y: float  # cell heights, down
    scale: float  # factor of the ideal size
    angle: float  # degrees
    tint: tuple[int, int, int]  # added to RGB


@dataclass(frozen=True)
class Scene:
    """Content of the nine cells in raster order, and the style numbers that make the picture unique."""

    cells: Cells
    background: tuple[tuple[int, int, int], tuple[int, int, int]]  # RGB at both ends of the gradient
    vertical: bool  # direction of the gradient
    jitter: tuple[Jitter, ...]  # one per cell


def annotation(scene: Scene) -> str:
    """JSON {"cells": [nine labels]}: 0 empty, 1..36 = shape * 6 + colour + 1, 37..44 sign letters."""
    return json.dumps({"cells": [_label(cell) for cell in scene.cells]}, separators=(",", ":"))


def _label(cell: tuple[str, str] | None) -> int:
    if cell is None:
        return 0
    kind, value = cell
    if kind == SIGN:
        return 1 + len(SHAPES) * len(COLOURS) + LETTERS.index(value)
    return 1 + SHAPES.index(kind) * len(COLOURS) + COLOURS.index(value)


def cell_labels(annotation: str) -> list[int]:
    """The nine labels of an `annotation`, each in [0, CELL_CLASSES). Raises ClearError if it is not one."""
    try:
        cells = json.loads(annotation)["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise ClearError(f"annotation {annotation[:80]!r} is not of a rendered scene; remake the source.") from error
    if (
        not isinstance(cells, list)
        or len(cells) != 9
        or not all(type(c) is int and 0 <= c < CELL_CLASSES for c in cells)
    ):
        raise ClearError(f"annotation {annotation[:80]!r} needs nine labels in [0, {CELL_CLASSES}); remake the source.")
    return cells


FACTORS = (len(SHAPES) + 2, len(COLOURS) + 1, len(LETTERS) + 1, 3, 3)
"""Sizes of what there is to know about a cell: shape (or empty, or sign), colour, letter, row, column."""


def factors(annotation: str) -> list[tuple[int, int, int, int, int]]:
    """The nine cells of an annotation as numbers below FACTORS; 0 stands for empty, no colour, no letter."""
    found = []
    for i, cell in enumerate(_cells(annotation)):
        kind, value = cell or ("", "")
        shape = 0 if cell is None else len(SHAPES) + 1 if kind == SIGN else SHAPES.index(kind) + 1
        colour = COLOURS.index(value) + 1 if kind in SHAPES else 0
        letter = LETTERS.index(value) + 1 if kind == SIGN else 0
        found.append((shape, colour, letter, i // 3, i % 3))
    return found


def captions(annotation: str) -> tuple[str, str]:
    """All that the picture shows, in words of the vocabulary: shape by shape (the sign last), and colour by colour."""
    named = {cell[0]: (CELLS[i], cell[1]) for i, cell in enumerate(_cells(annotation)) if cell is not None}
    facts = [f"{shape} at {named[shape][0]} is {named[shape][1]}" for shape in SHAPES if shape in named]
    by_shape = " ".join([*facts, f"{SIGN} at {named[SIGN][0]} says {named[SIGN][1]}"])
    groups = {colour: [s for s in SHAPES if s in named and named[s][1] == colour] for colour in COLOURS}
    return by_shape, " ".join(f"{colour} : {' '.join(group) or 'none'}" for colour, group in groups.items())


def _cells(annotation: str) -> Cells:
    objects_ = len(SHAPES) * len(COLOURS)

    def cell(label: int) -> tuple[str, str] | None:
        if label == 0:
            return None
        if label > objects_:
            return SIGN, LETTERS[label - objects_ - 1]
        shape, colour = divmod(label - 1, len(COLOURS))
        return SHAPES[shape], COLOURS[colour]

    return tuple(cell(label) for label in cell_labels(annotation))


# --- drawing a scene -------------------------------------------------------------------------------------------------


def draw_cells(rng: Random) -> Cells:
    """One sign and 4 to 6 objects in random cells: shapes differ, colours and the letter are uniform."""
    count = rng.randint(4, 6)
    content = [(SIGN, rng.choice(LETTERS))]
    content += [(shape, rng.choice(COLOURS)) for shape in rng.sample(SHAPES, count)]
    content += [None] * (9 - len(content))
    rng.shuffle(content)
    return tuple(content)


def draw_scene(cells: Cells, rng: Random) -> Scene:
    """Give `cells` a style."""
    hue, saturation, value = rng.random(), rng.uniform(0.03, 0.16), rng.uniform(0.45, 0.95)
    ends = []
    for turn in (-1, 1):
        shade = min(value * (1 + turn * rng.uniform(-0.12, 0.12)), 1)
        rgb = colorsys.hsv_to_rgb((hue + turn * rng.uniform(0, 0.08)) % 1, saturation, shade)
        ends.append(tuple(round(255 * c) for c in rgb))
    jitter = tuple(
        Jitter(
            x=rng.uniform(-0.025, 0.025),
            y=rng.uniform(-0.025, 0.025),
            scale=rng.uniform(0.92, 1),
            angle=rng.uniform(-4, 4),
            tint=(rng.randint(-14, 14), rng.randint(-14, 14), rng.randint(-14, 14)),
        )
        for _ in range(9)
    )
    return Scene(cells, tuple(ends), rng.random() < 0.5, jitter)


# --- rendering -------------------------------------------------------------------------------------------------------

# Outlines in half cells around the centre, y down; circle and ring are drawn as such.
_ARM = 0.3
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.76, -0.76), (0.76, -0.76), (0.76, 0.76), (-0.76, 0.76)],
    "triangle": [(0, -0.86), (0.88, 0.76), (-0.88, 0.76)],
    "star": [
        (r * math.sin(math.pi * i / 5), 0.06 - r * math.cos(math.pi * i / 5)) for i, r in enumerate((0.94, 0.4) * 5)
    ],
    "cross": [
        *((-_ARM, -0.86), (_ARM, -0.86), (_ARM, -_ARM), (0.86, -_ARM), (0.86, _ARM), (_ARM, _ARM)),
        *((_ARM, 0.86), (-_ARM, 0.86), (-_ARM, _ARM), (-0.86, _ARM), (-0.86, -_ARM), (-_ARM, -_ARM)),
    ],
    SIGN: [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
}
_RADIUS, _RING_RADIUS, _RING_WIDTH, _STROKE = 0.82, 0.66, 0.36, 0.28

# Letters as strokes in the same units: a handful of thick lines stays legible at 16 px per cell.
_STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "a": [[(-0.62, 0.64), (0, -0.64), (0.62, 0.64)], [(-0.38, 0.28), (0.38, 0.28)]],
    "c": [[(0.55 * math.cos(t / 10), 0.64 * math.sin(t / 10)) for t in range(8, 56, 3)]],
    "h": [[(-0.5, -0.64), (-0.5, 0.64)], [(0.5, -0.64), (0.5, 0.64)], [(-0.5, 0), (0.5, 0)]],
    "k": [[(-0.5, -0.64), (-0.5, 0.64)], [(0.5, -0.64), (-0.42, 0.06)], [(-0.16, -0.12), (0.54, 0.64)]],
    "l": [[(-0.46, -0.64), (-0.46, 0.64), (0.52, 0.64)]],
    "t": [[(-0.58, -0.64), (0.58, -0.64)], [(0, -0.64), (0, 0.64)]],
    "x": [[(-0.54, -0.64), (0.54, 0.64)], [(0.54, -0.64), (-0.54, 0.64)]],
    "z": [[(-0.52, -0.64), (0.52, -0.64), (-0.52, 0.64), (0.52, 0.64)]],
}
_SHIFT = 4  # cv2 takes coordinates as integers with this many fractional bits


def render(scene: Scene, size: int) -> np.ndarray:
    """The picture: uint8 RGB (size, size, 3), anti-aliased."""
    ramp = np.linspace(scene.background[0], scene.background[1], size).round().astype(np.uint8)
    image = np.empty((size, size, 3), np.uint8)
    image[:] = ramp[:, None] if scene.vertical else ramp[None]
    for index, cell in enumerate(scene.cells):
        if cell is not None:
            _draw_cell(image, index, cell, scene.jitter[index])
    return image


def _draw_cell(image: np.ndarray, index: int, cell: tuple[str, str], jitter: Jitter) -> None:
    import cv2

    kind, value = cell
    side = image.shape[0] / 3
    half = side / 2 * jitter.scale
    centre = np.array([(index % 3 + 0.5 + jitter.x) * side, (index // 3 + 0.5 + jitter.y) * side])
    turn = math.radians(jitter.angle)
    rotation = half * np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])

    def place(points: list[tuple[float, float]]) -> np.ndarray:
        # A pixel's centre lies at its index + 0.5 of the plane.
        return np.rint((np.array(points) @ rotation + centre - 0.5) * 2**_SHIFT).astype(np.int32)

    colour = tuple(
        min(max(c + t, 0), 255) for c, t in zip(_PLATE if kind == SIGN else RGB[value], jitter.tint, strict=True)
    )
    if kind in _OUTLINES:
        cv2.fillPoly(image, [place(_OUTLINES[kind])], colour, cv2.LINE_AA, _SHIFT)
    else:
        radius = _RADIUS if kind == "circle" else _RING_RADIUS
        width = -1 if kind == "circle" else max(1, round(_RING_WIDTH * half))
        middle = tuple(int(c) for c in place([(0, 0)])[0])
        cv2.circle(image, middle, round(radius * half * 2**_SHIFT), colour, width, cv2.LINE_AA, _SHIFT)
    if kind == SIGN:
        edge, stroke = max(1, round(0.05 * half)), max(1, round(_STROKE * half))
        cv2.polylines(image, [place(_OUTLINES[SIGN])], True, _INK, edge, cv2.LINE_AA, _SHIFT)
        cv2.polylines(image, [place(line) for line in _STROKES[value]], False, _INK, stroke, cv2.LINE_AA, _SHIFT)


# --- samples ---------------------------------------------------------------------------------------------------------


def families(split: str, index: int, seed: int, questions: int) -> tuple[str, ...]:
    """The tasks of couple `index`, in the order they are asked; all six are equally frequent over a block of couples.

    A couple's tasks are a window of a cyclic order that is shuffled anew for every block, so tasks meet in all
    combinations. Both images of a couple ask them in one order: keeping only the first questions of an image
    keeps both halves of a minimal pair.
    """
    block = len(TASKS) // math.gcd(len(TASKS), questions)
    order = list(TASKS)
    Random(f"{seed}/{split}/block {index // block}").shuffle(order)
    start = index % block * questions
    chosen = [order[(start + j) % len(order)] for j in range(questions)]
    Random(f"{seed}/{split}/order {index}").shuffle(chosen)
    return tuple(chosen)


def couple(split: str, index: int, seed: int, size: int, questions: int) -> tuple[Sample, Sample]:
    """Samples 2 * index and 2 * index + 1 of a split.

    The wanted answers are drawn first; scenes that cannot realise them are drawn again, so that answers keep their
    distribution whatever the scenes allow.
    """
    rng = Random(f"{seed}/{split}/{index}")
    tasks = families(split, index, seed, questions)
    targets = (draw_targets(tasks, rng), draw_targets(tasks, rng))
    found = _paired(targets, rng) if "pair" in tasks else [_fitting(target, rng) for target in targets]
    first = draw_scene(found[0][0], rng)
    second = replace(first, cells=found[1][0]) if "pair" in tasks else draw_scene(found[1][0], rng)
    pair = f"scenes-{split}-pair-{index:06d}"
    return (
        _sample(f"scenes-{split}-{2 * index:06d}", split, first, size, found[0][1], pair),
        _sample(f"scenes-{split}-{2 * index + 1:06d}", split, second, size, found[1][1], pair),
    )


def _fitting(targets: dict, rng: Random) -> tuple[Cells, dict[str, Draft]]:
    for _ in range(_ATTEMPTS):
        cells = draw_cells(rng)
        drafts = compose(cells, targets, rng)
        if drafts is not None:
            return cells, drafts
    raise ClearError(f"No scene realises the answers {targets} in {_ATTEMPTS} attempts; choose another seed.")


def _paired(targets: tuple[dict, dict], rng: Random) -> list[tuple[Cells, dict[str, Draft]]]:
    for _ in range(_ATTEMPTS):
        cells = draw_cells(rng)
        shape, (place, colour) = rng.choice(list(objects(cells).items()))
        other = rng.choice([c for c in COLOURS if c != colour])
        partner = (*cells[:place], (shape, other), *cells[place + 1 :])
        change = (place, *rng.sample((colour, other), 2))
        found = []
        for content, target in zip((cells, partner), targets, strict=True):
            drafts = compose(content, target | {"pair": change}, rng)
            if drafts is None:
                break
            found.append((content, drafts))
        else:
            return found
    raise ClearError(f"No two scenes realise the answers {targets} in {_ATTEMPTS} attempts; choose another seed.")


def _sample(name: str, split: str, scene: Scene, size: int, drafts: dict[str, Draft], pair: str) -> Sample:
    asked = tuple(
        Question(
            id=f"{name}-{task}",
            task=task,
            text=draft.text,
            answer=draft.answer,
            options=draft.options,
            evidence=draft.evidence,
            pair=pair if task == "pair" else "",
        )
        for task, draft in drafts.items()
    )
    image = encode_image(render(scene, size))
    return Sample(name, "scenes", split, image, sha256(image), asked, annotation(scene))


def check_request(split: str, count: int, questions: int) -> None:
    """Raise ClearError unless `count` images with `questions` questions each can be made."""
    if count % 2:
        raise ClearError(f"params: source.{split} = {count} is odd; scenes come in couples, so make it {count + 1}.")
    if not 1 <= questions <= len(TASKS):
        raise ClearError(
            f"params: source.questions_per_image = {questions}; rendered scenes ask at most one question of each of "
            f"{len(TASKS)} families, so choose 1 to {len(TASKS)}."
        )


def scenes(split: str, count: int, seed: int, size: int, questions: int) -> Iterator[Sample]:
    """The samples 0 … count - 1 of a split, `size` px wide, with `questions` questions each of different families.

    Raises ClearError for an odd `count` or more questions than families.
    """
    check_request(split, count, questions)
    for index in range(count // 2):
        yield from couple(split, index, seed, size, questions)
