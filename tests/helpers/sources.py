"""Real data as a user has it below data/raw, and what the stage `source` makes of it in the working directory."""

import json
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from omegaconf import OmegaConf
from PIL import Image

from clear.config import compose, from_dict


def picture(number: int, width: int = 80, height: int = 64) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)


def encoded(number: int, kind: str = "PNG", **size) -> bytes:
    out = BytesIO()
    Image.fromarray(picture(number, **size)).save(out, kind)
    return out.getvalue()


@cache
def _shipped():
    return OmegaConf.create(compose(["degrade.workers=2"]))


def config_of(*overrides: str):
    """The shipped parameters with changes; Hydra, which would take a third of a second for each, composes them once."""
    return from_dict(OmegaConf.merge(_shipped(), OmegaConf.from_dotlist(list(overrides))))


def rejects() -> pd.DataFrame:
    return pd.read_parquet("data/rejects/source.parquet")


def metrics() -> dict:
    return json.loads(Path("data/metrics/source.json").read_text())


def write_jsonl(place, rows) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- lmudata ---------------------------------------------------------------------------------------------------------


def tsv(file, rows) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(file, sep="\t", index=False)
