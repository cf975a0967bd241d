"""Scenes as pictures: content in its cell, classes told apart when small, labels read back."""

import json
from random import Random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clear.errors import ClearError
from clear.sources.scenes.render import (
    CELL_CLASSES,
    Scene,
    annotation,
    cell_labels,
    draw_cells,
    draw_scene,
    render,
)
from clear.sources.scenes.words import COLOURS, LETTERS, SHAPES


@settings(max_examples=40, deadline=None)
@example(13078, 256)
@given(st.integers(0, 10**6), st.sampled_from([256, 300, 512]))
def test_content_stays_in_its_cell_and_matches_its_colour(seed, size):
    rng = Random(seed)
    scene = draw_scene(draw_cells(rng), rng)
    full = render(scene, size)
    assert full.shape == (size, size, 3) and full.dtype == np.uint8
    empty = render(Scene((None,) * 9, scene.background, scene.vertical, scene.jitter), size)
    for i, cell in enumerate(scene.cells):
        alone = render(Scene((None,) * i + (cell,) + (None,) * (8 - i), *list(vars(scene).values())[1:]), size)
        changed = (alone != empty).any(axis=2)
        assert changed.any() == (cell is not None)
        top, left = (round(k * size / 3) for k in divmod(i, 3))
        # An anti-aliased edge reaches up to two pixels further.
        inside = changed[max(top - 2, 0) : top + size // 3 + 3, max(left - 2, 0) : left + size // 3 + 3]
        assert changed.sum() == inside.sum()
        assert cell is None or inside.sum() > 0.15 * (size / 3) ** 2


def test_every_class_is_told_apart_at_48_px():
    """A nearest-template reader with other jitter and background finds every label at 16 px per cell."""
    import cv2

    kinds = [("sign", letter) for letter in LETTERS] + [(s, c) for s in SHAPES for c in COLOURS]
    rng = Random(0)
    base = draw_scene(draw_cells(rng), rng)

    def look(style: Scene, cell: tuple[str, str]) -> np.ndarray:
        scene = Scene((None,) * 4 + (cell,) + (None,) * 4, style.background, style.vertical, style.jitter)
        small = cv2.resize(render(scene, 256), (48, 48), interpolation=cv2.INTER_AREA)
        return small[16:32, 16:32].astype(np.float32)

    templates = np.stack([look(base, cell) for cell in kinds])
    for _ in range(5):
        style = Scene(base.cells, base.background, base.vertical, draw_scene(draw_cells(rng), rng).jitter)
        for i, cell in enumerate(kinds):
            assert ((templates - look(style, cell)) ** 2).sum(axis=(1, 2, 3)).argmin() == i, cell


def test_annotation_round_trip_and_refusals():
    cells = (("sign", "a"), None, ("circle", "red"), ("ring", "orange"), None, ("sign", "z"), None, None, None)
    assert cell_labels(annotation(Scene(cells, ((0, 0, 0), (0, 0, 0)), True, ()))) == [37, 0, 1, 36, 0, 44, 0, 0, 0]
    assert CELL_CLASSES == 45
    for wrong in ("", "{}", "[]", '{"cells":[1]}', json.dumps({"cells": [45] * 9}), json.dumps({"cells": [True] * 9})):
        with pytest.raises(ClearError, match="annotation"):
            cell_labels(wrong)
