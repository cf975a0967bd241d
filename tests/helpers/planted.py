"""A workspace with planted effects: accuracies and call rates that are known, in predictions, frames and files."""

from functools import cache

import numpy as np

from clear.bench import predictions
from clear.bench.models import MODELS
from clear.data.images import encode_image
from clear.data.io import write_json
from clear.data.records import Question, Sample, sha256, write_samples
from clear.report import claims as claim_rules
from clear.report.claims import Bootstrap

CORRUPTIONS = (
    *("motion_blur", "lens_blur", "gaussian_noise", "block_exchange", "jpeg", "mean_shift", "color_diffusion"),
    *("sharpness", "dark", "hsv_saturation", "turbulence", "dirty_lens", "scan_lines", "graffiti"),
    *("watermark_damage", "lens_flare"),
)
FLOATS = ("psnr_degraded", "psnr_restored", "ssim_degraded", "ssim_restored")
TASKS = ("attribute", "existence", "pair", "reading", "reasoning", "spatial")
LEVELS = ("clean", "low", "mid", "high")
RIGHT = {
    "base": (0.93, 0.88, 0.80, 0.55),
    "sft_direct": (0.94, 0.91, 0.86, 0.66),
    "sft": (0.93, 0.87, 0.82, 0.68),
    "reencode": (0.93, 0.88, 0.83, 0.72),
    "bridge": (0.93, 0.88, 0.83, 0.72),
    "grpo": (0.93, 0.90, 0.87, 0.80),
}
CALLS = {
    "base": (0, 0, 0, 0),
    "sft_direct": (0, 0, 0, 0),
    "sft": (0.01, 0.05, 0.1, 0.45),
    "reencode": (0.02, 0.07, 0.14, 0.5),
    "bridge": (0.02, 0.07, 0.14, 0.5),
    "grpo": (0.05, 0.18, 0.33, 0.68),
}
SHARED = Bootstrap(resamples=400)


def picture(seed: int, size: int = 48) -> np.ndarray:
    """A grid of coloured squares."""
    colours = np.random.default_rng(seed).integers(30, 230, (3, 3, 3))
    return np.kron(colours, np.ones((size // 3, size // 3, 1))).astype(np.uint8)


def damaged(seed: int, size: int = 48) -> np.ndarray:
    noise = np.random.default_rng(seed + 1).normal(0, 60, (size, size, 3))
    return np.clip(picture(seed, size) + noise, 0, 255).astype(np.uint8)


def question_of(image: int, number: int) -> tuple[str, str, str, str, str]:
    """(question id, task, pair, text, answer) of question `number` of image `image`; partners are 2k and 2k + 1."""
    task = TASKS[(image // 2 + number) % len(TASKS)]
    pair = f"pair{image // 2}" if task == "pair" else ""
    answer = ("red", "blue", "green", "white")[(image // 2 + image + number) % 4]
    return f"q{image:04d}-{number}", task, pair, f"what is the {task} of object {number} ?", answer


@cache
def draw(*seed: int) -> tuple[float, float, float]:
    return tuple(np.random.default_rng(seed).random(3))


def rows_of(model: str, images: int, right=RIGHT, calls=CALLS, tied=0.3) -> list[dict]:
    """Predictions with planted accuracies and call rates; the difficulty of a question is shared by all models.

    A restoration is more likely by the share `tied` where the base fails.
    """
    rows = []
    for level, severity in enumerate(LEVELS):
        for image in range(images):
            corruption = "clean" if severity == "clean" else CORRUPTIONS[(image // 2) % len(CORRUPTIONS)]
            for number in range(3 if severity == "clean" else 1):
                difficulty, own, call = draw(level, image, number)
                noise = draw(level, image, number, list(MODELS).index(model))[0]
                score = difficulty if own < 0.7 else noise
                base = difficulty if own < 0.7 else draw(level, image, number, 0)[0]
                rate = calls[model][level] * (1 + tied if base >= right["base"][level] else 1 - tied / 2)
                restored, correct = bool(call < rate), bool(score < right[model][level])
                name, task, pair, text, answer = question_of(image, number)
                silent = not correct and noise > 0.97
                said = answer if correct else "" if silent else "black"
                base_psnr = {"clean": None, "low": 25.0, "mid": 20.5, "high": 16.0}[severity]
                gallery = restored and severity == "high" and image < 40
                rows.append(
                    {
                        "sample": f"s{image:04d}",
                        "corruption": corruption,
                        "severity": severity,
                        "question": name,
                        "task": task,
                        "pair": pair,
                        "text": text,
                        "answer": answer,
                        "prediction": said,
                        "output": f"<think>{'blurred, restore' if restored else 'clear enough'}</think>"
                        + ("<image_restore><think>now it is red</think>" if restored else "")
                        + ("" if silent else f"<answer>{said}</answer>"),
                        "restored": restored,
                        "correct": correct,
                        "tokens": 12,
                        "psnr_degraded": base_psnr and base_psnr + 2 * difficulty,
                        "ssim_degraded": base_psnr and base_psnr / 30,
                        "psnr_restored": 21.0 + 2 * difficulty + 2 * own if restored else None,
                        "ssim_restored": 0.8 if restored else None,
                        "restored_png": encode_image(picture(image)) if gallery else None,
                    }
                )
    return rows


def frames_of(images: int = 300, right=RIGHT, calls=CALLS, models=MODELS, tied=0.3) -> dict:
    import pandas as pd

    made = {model: pd.DataFrame(rows_of(model, images, right, calls, tied)) for model in models}
    return {model: frame.astype(dict.fromkeys(FLOATS, float)) for model, frame in made.items()}


def decide(frames: dict) -> dict:
    return {claim.id: claim for claim in claim_rules.evaluate(frames, SHARED)}


def bench_samples(images: int):
    for image in range(images):
        clean = encode_image(picture(image, 96))
        for severity in LEVELS[1:]:
            yield Sample(
                id=f"s{image:04d}",
                source="scenes",
                split="bench",
                image=clean,
                image_sha256=sha256(clean),
                questions=(Question("q", "attribute", "?", "red"),),
                degraded=encode_image(damaged(image, 96)),
                corruption=CORRUPTIONS[(image // 2) % len(CORRUPTIONS)],
                severity=severity,
            )


def fill(data, images: int = 300) -> None:
    """A workspace's data folder as the pipeline leaves it before the report."""
    for model in MODELS:
        predictions.write(data / f"predictions/{model}.parquet", rows_of(model, images))
    write_samples(data / "bench/degraded", bench_samples(40))
    generator = np.random.default_rng(0)
    (data / "plots").mkdir()
    phases = {"base": ("vit", "vae", "joint"), "sft": ("restoration", "traces"), "sft_direct": ("traces",)}
    for stage, names in (phases | {"bridge": ("distill", "answer")}).items():
        lines = ["phase,step,loss"]
        for phase in names:
            lines += [
                f"{phase},{s},{2 * np.exp(-s / 300) + 0.2 + generator.normal(0, 0.05):.4f}" for s in range(0, 1000, 20)
            ]
        (data / f"plots/{stage}.csv").write_text("\n".join(lines) + "\n")
    names = (
        "loss reward reward_accuracy reward_format reward_decision call_rate kl ratio_error entropy accuracy_holdout"
    )
    lines = ["phase,step," + names.replace(" ", ",")]
    for step in range(60):
        rise, wobble = step / 60, generator.normal(0, 0.02, 9)
        values = [0.1 - 0.05 * rise, 0.6 + 0.2 * rise, 0.65 + 0.15 * rise, 0.97, 0.5 + 0.1 * rise, 0.3, 0.02 * rise]
        values = [f"{value + noise:.4f}" for value, noise in zip(values, wobble, strict=False)]
        values += [
            "1.2e-06",
            f"{0.9 - 0.4 * rise + wobble[8]:.4f}",
            f"{0.7 + 0.1 * rise:.3f}" if step % 10 == 0 else "",
        ]
        lines.append(f"policy,{step}," + ",".join(values))
    (data / "plots/grpo.csv").write_text("\n".join(lines) + "\n")
    blind = {task: {"accuracy": 0.31, "chance": 0.3, "count": 500} for task in (*TASKS, "total")}
    checked = {"images": 300, "questions": 900, "expectations": 14, "failed": [], "psnr": {"low": 24.1}}
    metrics = {
        "source": {"images": {"sft": 6000, "bench": 300}, "blind_baseline": {"bench": blind}},
        "degrade": {"copies": 9000, "per_corruption": dict.fromkeys(CORRUPTIONS, 560)},
        "validate": {"success": True, "rejected": 0, "datasets": {"bench_clean": checked, "bench_degraded": checked}},
        "sft": {"loss": 0.21, "accuracy_validation": {"clean": 0.93, "high": 0.7}},
    }
    for name, value in metrics.items():
        write_json(data / f"metrics/{name}.json", value)


def nested(rates: dict[str, tuple[float, float]], images: int = 80) -> dict:
    """Models that answer the easiest share of the questions, at clean and at hard; a guesser is right in a quarter."""
    import pandas as pd

    frames = {}
    for model, levels in rates.items():
        rows = [
            row | {"correct": place < round(rate * images), "restored": False}
            for rate, severity in zip((levels[0], *levels[:2], levels[1]), LEVELS, strict=True)
            for place, row in enumerate(bare(images, severity))
        ]
        frames[model] = pd.DataFrame(rows)
    return frames


@cache
def bare(images: int, severity: str) -> list[dict]:
    rows = [row for row in rows_of("base", images) if row["severity"] == severity and row["question"].endswith("-0")]
    return [row | {"pair": ""} for row in rows]
