"""Stage `evaluate@<model>`: answer the whole benchmark and write per-question predictions and their summary.

What came degraded (data/bench/incoming) and copies by further degradations (data/bench/extra) are answered apart, after
MMD-Bench, so that no figure of MMD-Bench depends on them.
"""

from collections.abc import Container
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clear.bench import predictions
from clear.bench.scoring import is_correct
from clear.config import Config
from clear.errors import ClearError
from clear.records import CLEAN, Sample, encode_image, read_samples, write_json
from clear.runtime import apply_runtime

MODELS = {
    "base": ("base", "plain", "bridge"),
    "sft_direct": ("sft_direct", "plain", "bridge"),
    "sft": ("sft", "auto", "reencode"),
    "reencode": ("bridge", "auto", "reencode"),
    "bridge": ("bridge", "auto", "bridge"),
    "grpo": ("grpo", "auto", "bridge"),
}
"""Model name → (folder under data/models, restoration mode, feedback). `sft` reads its pictures by decode-reencode
until the mlp bridge is trained; with the parameter-free `direct` bridge it answers through the bridge path."""


def run(config: Config, model: str) -> None:
    """Evaluate one model of MODELS on data/bench."""
    if model not in MODELS:
        raise ClearError(f"evaluate: model '{model}' is not one of {', '.join(MODELS)}.")
    apply_runtime(config)
    from clear.reasoning.answering import Answerer
    from clear.stages.paths import model_folder

    folder, restore, feedback = MODELS[model]
    if model == "sft" and config.bridge.kind == "direct":
        feedback = "bridge"
    answerer = Answerer.load(model_folder(folder, config), config)
    benchmark = [*read_samples("data/bench/clean"), *read_samples("data/bench/degraded")]
    rows = _answered(answerer, benchmark, model, restore, feedback)
    if came := list(read_samples("data/bench/incoming")):
        partners = [replace(s, degraded=None, corruption=CLEAN, severity=CLEAN, questions=()) for s in came]
        rows += _answered(answerer, partners + came, model, restore, feedback, "milliseconds_per_incoming_question")
    if extra := list(read_samples("data/bench/extra")):
        shown = {s.id for s in extra}
        partners = [replace(s, questions=()) for s in benchmark if s.degraded is None and s.id in shown]
        rows += _answered(answerer, partners + extra, model, restore, feedback, "milliseconds_per_extra_question")
    out = Path("data/predictions") / f"{model}.parquet"
    predictions.write(out, rows)
    e = config.evaluate
    found = predictions.metrics(predictions.read(out), confidence=e.confidence, resamples=e.bootstrap, seed=config.seed)
    if came:
        found["incoming"] = predictions.incoming_metrics(predictions.read_incoming(out))
    if extra:
        found["extra"] = predictions.extra_metrics(predictions.read_extra(out))
    write_json(f"data/metrics/evaluate_{model}.json", found)


def _answered(
    answerer, samples: list[Sample], model: str, restore: str, feedback: str, figure: str = "milliseconds_per_question"
) -> list[dict]:
    """Rows of clear.bench.predictions for every question of `samples`; the time goes to the run record as `figure`."""
    from clear.stages.paths import record_run

    bank = answerer.bank([s.seen for s in samples], [s.key for s in samples])
    clean = {s.id: i for i, s in enumerate(samples) if s.degraded is None}
    asked = [(i, q) for i, s in enumerate(samples) for q in s.questions]
    with tqdm(total=len(asked), desc=f"evaluate {model}", unit="question", mininterval=2) as bar:
        answers = answerer.answer(bank, asked, restore, feedback, bar.update)
        record_run(f"evaluate_{model}", **{figure: 1000 * bar.format_dict["elapsed"] / len(asked)})
    pictures = _pictures(answerer, answers)
    kept = _kept([samples[i] for i, _ in asked], pictures)
    rows = []
    for n, ((i, question), answer) in enumerate(zip(asked, answers, strict=True)):
        sample = samples[i]
        row = {
            "sample": sample.id,
            "corruption": sample.corruption,
            "severity": sample.severity,
            "question": question.id,
            "task": question.task,
            "pair": question.pair,
            "text": question.text,
            "answer": question.answer,
            "prediction": answer.prediction,
            "output": answer.trace,
            "restored": answer.restored,
            "correct": is_correct(answer.prediction, question),
            "tokens": answer.tokens,
            "restored_png": encode_image(pictures[n]) if n in kept else None,
        }
        rows.append(row | _quality(bank.uint8(clean[sample.id]), bank.uint8(i), pictures.get(n), sample))
    return rows


def _pictures(answerer, answers) -> dict[int, np.ndarray]:
    """The restored picture of every answer that restored, decoded in batches."""
    import torch

    chosen = [n for n, answer in enumerate(answers) if answer.restored]
    found: dict[int, np.ndarray] = {}
    for grid in sorted({answers[n].grid for n in chosen}):
        same = [n for n in chosen if answers[n].grid == grid]
        for start in range(0, len(same), 128):
            part = same[start : start + 128]
            decoded = answerer.pictures(torch.stack([answers[n].latent for n in part]), grid)
            found |= dict(zip(part, decoded, strict=True))
    return found


def _kept(samples: list[Sample], restored: Container[int]) -> set[int]:
    """Numbers of the restored pictures that are stored with the predictions: the first of each corruption and level."""
    first: dict[tuple[str, str], int] = {}
    for n, sample in enumerate(samples):
        if n in restored:
            first.setdefault((sample.corruption, sample.severity), n)
    return set(first.values())


def _quality(clean: np.ndarray, shown: np.ndarray, restored: np.ndarray | None, sample: Sample) -> dict:
    """PSNR and SSIM at the model's own resolution; absent where there is nothing to compare."""
    from clear.validation.metrics import psnr, ssim

    row = {f"{name}_{kind}": None for name in ("psnr", "ssim") for kind in ("degraded", "restored")}
    if sample.degraded is not None and sample.paired:
        row |= {"psnr_degraded": psnr(clean, shown), "ssim_degraded": ssim(clean, shown)}
        if restored is not None:
            row |= {"psnr_restored": psnr(clean, restored), "ssim_restored": ssim(clean, restored)}
    return row
