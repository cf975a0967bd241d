"""What benches share that answer data/development with variants of one model: rows kept on disk, paired differences."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from clear.bench.answers import answer, digest_of
from clear.bench.models import UnderTest
from clear.bench.predictions import KEY
from clear.bench.statistics import Interval, clusters, paired_difference
from clear.config import PARAMS
from clear.data.io import write_json
from clear.data.records import Sample
from clear.schema import Config


def rows_of(name: str, tested: UnderTest, samples: list[Sample], file: Path, columns: Sequence[str]) -> pd.DataFrame:
    """`columns` of what a variant answers, one row per question, the seconds in `attrs`.

    They are kept in `file`, bound to the model's files and to params.yaml: of others it is answered anew.
    """
    digest = digest_of(tested.folder, tested.config)
    key = hashlib.sha256(f"{PARAMS.read_text()}{digest}{tested.restore}{len(samples)}".encode()).hexdigest()
    known = json.loads(file.read_text()) if file.exists() else {}
    if known.get("key") != key:
        total = sum(len(sample.questions) for sample in samples)
        with tqdm(total=total, desc=name, unit="question", mininterval=2) as bar:
            rows, seconds = answer(tested, samples, bar.update)
        known = {"key": key, "seconds": seconds, "rows": [{name: row[name] for name in columns} for row in rows]}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, known)
    frame = pd.DataFrame(known["rows"], columns=list(columns))
    frame.attrs["seconds"] = known["seconds"]
    return frame


def difference(frame: pd.DataFrame, other: pd.DataFrame, column: str, config: Config) -> Interval:
    """Mean of `column` less that of `other` on the same questions, resampled by image."""
    if not frame[KEY].equals(other[KEY]):
        raise SystemExit("the variants were asked different questions; delete --out and repeat the command.")
    e = config.evaluate
    return paired_difference(frame[column], other[column], clusters(other), e.confidence, e.bootstrap, config.seed)


def shown(found: Interval, scale: float = 100) -> str:
    """An interval, in percentage points unless `scale` says otherwise."""
    return f"{scale * found.estimate:+.2f} [{scale * found.low:+.2f}, {scale * found.high:+.2f}]"
