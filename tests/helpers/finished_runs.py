"""Finished runs with invented predictions, for what is pooled over seeds: a module takes the fixture `home` with
`pytest_plugins = ["tests.helpers.finished_runs"]`."""

import numpy as np
import pytest
import yaml

from clear.bench import predictions
from clear.bench.models import MODELS
from clear.bench.scoring import SEVERITIES
from clear.project import check, scratch, seeds

RIGHT = {"base": 0.5, "sft_direct": 0.6, "sft": 0.65, "reencode": 0.65, "bridge": 0.65, "grpo": 0.75}
"""Accuracy at hard of the invented predictions; on the other levels all are at .95."""


def workspace(folder, seed: int, **params):
    """A finished run of `seed` with invented predictions: 60 images in pairs, one question a level."""
    rng = np.random.default_rng(seed)
    for model in MODELS:
        rows = []
        for n in range(60):
            for severity in SEVERITIES:
                right = rng.random() < (RIGHT[model] if severity == "high" else 0.95)
                rows.append(
                    {
                        "sample": f"s{n}",
                        "corruption": "clean" if severity == "clean" else ("dark", "jpeg", "graffiti")[n % 3],
                        "severity": severity,
                        "question": "q",
                        "task": "colour",
                        "pair": f"p{n // 2}",
                        "text": "which ?",
                        "answer": f"a{n}",
                        "prediction": f"a{n}" if right else "b",
                        "output": "x" * 400,
                        "restored": model not in ("base", "sft_direct") and severity == "high" and n % 4 == 0,
                        "correct": bool(right),
                        "tokens": 5,
                    }
                    | dict.fromkeys(predictions.NULLABLE)
                )
        predictions.write(folder / f"data/predictions/{model}.parquet", rows)
    written = {"profile": "tiny", "seed": seed, "runtime": {"threads": seed}, "model": {"hidden": 8}, **params}
    (folder / "params.yaml").write_text(yaml.safe_dump(written))
    stages = {}
    for model in MODELS:
        out = {"path": seeds.PREDICTIONS.format(model), "md5": f"{model} of {seed}"}
        stages[f"evaluate@{model}"] = {"deps": [{"path": "clear/stages/evaluate.py", "md5": "1"}], "outs": [out]}
    (folder / "dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
    (folder / "docs").mkdir(exist_ok=True)
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A workspace whose own seed is 1; other seeds run in invented copies."""

    def run(folder, profile, overrides, name, targets=(), begin=None):
        seed = int(overrides[0].removeprefix("seed="))
        runs.append((profile, name, *overrides[1:], *targets, *([begin.name] if begin else [])))
        return workspace(tmp_path / "scratch" / name, seed)

    runs, stale = [], []
    monkeypatch.setenv("CLEAR_HOME", str(tmp_path))
    monkeypatch.setattr(scratch, "run", run)
    monkeypatch.setattr(check, "drifts", lambda folder: stale)
    found = workspace(tmp_path / "home", 1)
    return found, runs, stale
