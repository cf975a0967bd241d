"""Revisions to compare: folders with the metrics, predictions, parameters and lock that a run commits."""

from pathlib import Path

import numpy as np
import yaml

from clear.bench import predictions
from clear.bench.models import MODELS
from clear.data.images import encode_image
from clear.data.io import write_json
from tests.conftest import git

LEVELS = ("clean", "low", "mid", "high")
CORRUPTIONS = ("dark", "jpeg", "motion_blur", "turbulence")
TASKS = ("pair", "reading")
RIGHT = {"clean": 0.9, "low": 0.85, "mid": 0.8, "high": 0.65}
IMAGES = 120
GATE = {"model": "grpo", "clean_margin": 0.01, "hard_margin": 0.0, "confidence": 0.95, "bootstrap": 200, "pictures": 2}
PNG = encode_image(np.full((48, 48, 3), 90, np.uint8))


def rows_of(right=RIGHT, seed=0, images=IMAGES, calls=0.3, damage=0.0) -> list[dict]:
    """Two questions per image and level. A question's difficulty is fixed; `seed` decides one answer in twelve anew."""
    fixed, own = np.random.default_rng(1), np.random.default_rng(seed)
    rows = []
    for image in range(images):
        for level, severity in enumerate(LEVELS):
            clean = severity == "clean"
            for number, task in enumerate(TASKS):
                difficulty = fixed.random()
                again, other = own.random(2)
                correct = bool((other if again < 1 / 12 else difficulty) < right[severity])
                restored = not clean and (image + number) % 10 < 10 * calls
                said = "red" if correct else "blue"
                rows.append(
                    {
                        "sample": f"bench-{image:04d}",
                        "corruption": "clean" if clean else CORRUPTIONS[image // 2 % len(CORRUPTIONS)],
                        "severity": severity,
                        "question": f"q{number}",
                        "task": task,
                        "pair": f"p{image // 2}" if task == "pair" else "",
                        "text": f"which colour is shape {image} ?",
                        "answer": "red",
                        "prediction": said,
                        "output": f"<think>look | at it</think><answer>{said}</answer>",
                        "restored": restored,
                        "correct": correct,
                        "tokens": 12,
                        "psnr_degraded": None if clean else 30.0 - 5 * level + image / 97 + damage,
                        "ssim_degraded": None if clean else 0.9 - 0.1 * level,
                        "psnr_restored": 22.0 if restored else None,
                        "ssim_restored": 0.8 if restored else None,
                        "restored_png": PNG if restored and severity == "high" and image < 8 else None,
                    }
                )
    return rows


def lock_of(bench: str = "a", grpo: str = "1") -> dict:
    def entry(path: str, value: str) -> dict:
        return {"path": path, "hash": "md5", "md5": value}

    bench_outs = [entry("data/bench/clean", f"{bench}c"), entry("data/bench/degraded", f"{bench}d")]
    return {
        "schema": "2.0",
        "stages": {
            "mmd_bench": {"cmd": "python -m clear mmd_bench", "outs": bench_outs},
            "grpo": {
                "cmd": "python -m clear grpo",
                "deps": [entry("clear/training/rl/grpo.py", grpo)],
                "params": {"params.yaml": {"grpo.lr": float(grpo)}},
                "outs": [entry("data/models/grpo", f"m{grpo}")],
            },
            "evaluate@grpo": {"cmd": "python -m clear evaluate grpo", "deps": [entry("data/models/grpo", f"m{grpo}")]},
        },
    }


def fill(folder: Path, models=MODELS, right=RIGHT, seed=0, profile="tiny", gate=GATE, grpo="1", **rows) -> Path:
    """What a revision keeps in git; only `grpo` has the given accuracies, the other models answer as always."""
    for model in MODELS:
        file = folder / f"data/predictions/{model}.parquet"
        file.unlink(missing_ok=True)
        if model in models:
            given = {"right": right, "seed": seed} if model == "grpo" else {}
            predictions.write(file, rows_of(**given, **rows))
    degraded = {"sft": {name: {"low": 2, "mid": 3, "high": 5} for name in CORRUPTIONS}}
    write_json(folder / "data/metrics/validate.json", {"success": True, "rejected": 0, "datasets": {}})
    write_json(folder / "data/metrics/degrade.json", {"images": degraded})
    write_json(folder / "data/metrics/source.json", {"images": {"sft": 40, "bench": IMAGES}})
    write_json(folder / "data/metrics/grpo.json", {"last_reward": 0.8, "holdout_after": 0.7, "steps": 80})
    params = {"seed": 7, "grpo": {"lr": float(grpo)}, "gate": gate, "profile": profile}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock_of(grpo=grpo)))
    return folder


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", message)
