"""Sets of naturally degraded images, written as a user would."""

import json
from pathlib import Path

import numpy as np

from clear.data.images import decode_image, encode_image
from clear.degradation.corruptions import corrupt
from clear.sources.scenes.render import scenes

# Of this seed the first six and the last twelve have two pictures each in the benchmark slice, which a set has to have.
SCENES = list(scenes("rl", 24, 36, 256, 4))


def picture(n: int, kind: str = "dark") -> tuple[bytes, bytes, object]:
    """Degraded bytes, clean bytes and the questions of scene n."""
    sample = SCENES[n]
    image = corrupt(kind, decode_image(sample.image), 0.6, np.random.default_rng(n), 0.4)
    return encode_image(image, "jpeg"), sample.image, sample.questions


def put(folder: Path, numbers, paired: bool = True, table: str = "rows.jsonl", kind: str = "dark") -> None:
    """Write a set with one row per scene and question, pictures as files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for n in numbers:
        degraded, clean, questions = picture(n, kind)
        (folder / f"{n}.jpg").write_bytes(degraded)
        row = {"image": f"{n}.jpg"}
        if paired:
            (folder / f"{n}_clean.png").write_bytes(clean)
            row["clean"] = f"{n}_clean.png"
        rows += [row | {"question": q.text, "answer": q.answer, "task": q.task} for q in questions]
    (folder / table).write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(folder: Path, *rows, table: str = "rows.jsonl") -> None:
    with (folder / table).open("a") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
