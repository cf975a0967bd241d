"""How well a model decides when to restore: what its restorations gain, question by question, and whether it knows.

A model with two paths answers every question along both, forced (METHOD §5), and the probability of its deciding token
says how much it wants to restore. From these three columns follow the accuracy at every budget of restorations (restore
the pictures with the highest probability first), beside never, always, a random choice and the oracle that restores
exactly where only the restored answer is right.

This is an addition: the published evaluation counts calls and does not ask whether they help.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np

from clear.bench import statistics
from clear.bench.answers import answer, loaded
from clear.bench.models import UnderTest
from clear.bench.predictions import KEY
from clear.bench.scoring import SEVERITIES
from clear.data.records import CLEAN, Sample
from clear.errors import ClearError

if TYPE_CHECKING:
    import pandas as pd

    from clear.reasoning.answering import Answerer

DECIDES = 0.5
"""Probability above which a greedy model restores: there are two continuations that it was taught."""


def outcomes(model: UnderTest, samples: Sequence[Sample], progress: Callable[[int], None] | None = None):
    """A frame with a row per question: KEY, `pair`, `probability`, and whether each path is right (`direct`,
    `restored`). `progress` is called with the number of answers given; there are two per question.

    Raises ClearError for a model without two paths.
    """
    import pandas as pd

    if model.restore != "auto":
        raise ClearError(f"decision: the model in {model.folder} never restores, so there is nothing to decide.")
    paths = {path: answer(replace(model, restore=path), samples, progress)[0] for path in ("never", "always")}
    frame = pd.DataFrame([{name: row[name] for name in (*KEY, "pair")} for row in paths["never"]])
    frame["direct"] = [row["correct"] for row in paths["never"]]
    frame["restored"] = [row["correct"] for row in paths["always"]]
    with loaded(model.folder, model.config, latents=model.latents) as answerer:
        frame["probability"] = probabilities(answerer, samples)
    return frame


def probabilities(answerer: "Answerer", samples: Sequence[Sample]) -> np.ndarray:
    """Probability of the trigger at the deciding token, against the direct reply, of every question in order (float64).

    Only the two tokens that begin the two replies are compared; what stands before them is forced.
    """
    import torch

    from clear.model.runtime import autocast
    from clear.reasoning import engine

    tokenizer, model = answerer.tokenizer, answerer.model
    begun, direct, trigger = engine.deciding(tokenizer)
    asked = [(sample, question) for sample in samples for question in sample.questions]
    found: list[float] = []
    size = answerer.config.sampling.batch
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        pictures = {sample.key: sample.seen for sample, _ in part}
        bank, number = (
            answerer.bank(list(pictures.values()), list(pictures)),
            {key: n for n, key in enumerate(pictures)},
        )
        prompts = answerer.prompts(bank, [(number[s.key], q) for s, q in part])
        with torch.inference_mode(), autocast(model):
            rows = engine.prefill(model, prompts[:])
            fed = torch.tensor([[model.config.special.bos, *begun]] * len(part), device=rows.rope.device)
            logits = engine.feed(model, rows, fed)
        found += torch.sigmoid(logits[:, trigger] - logits[:, direct]).double().tolist()
    return np.array(found)


def curve(frame: "pd.DataFrame") -> tuple[np.ndarray, np.ndarray]:
    """Share of questions restored (n + 1,), from 0 to 1, and the accuracy there, in the order of the probability."""
    ranked = frame.sort_values("probability", ascending=False, kind="stable")
    gain = ranked["restored"].to_numpy(int) - ranked["direct"].to_numpy(int)
    accuracy = (ranked["direct"].sum() + np.concatenate([[0], np.cumsum(gain)])) / len(frame)
    return np.arange(len(frame) + 1) / len(frame), accuracy


def figures(frame: "pd.DataFrame", confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> dict:
    """What the rows of `outcomes` say, per severity and per corruption at high, and the odds of a call where it helps.

    own: the model's decision, with its accuracy against the direct path and against a random choice of as many
    questions (differences with intervals); best: the highest point of the curve, which knows the answers.
    """
    rest = {"confidence": confidence, "resamples": resamples, "seed": seed}
    found: dict = {"severity": {}, "corruption": {}}
    for severity in SEVERITIES:
        rows = frame[frame["severity"] == severity]
        if len(rows):
            found["severity"][severity] = _summary(rows, rest)
    high = frame[frame["severity"] == SEVERITIES[-1]]
    for corruption, rows in high.groupby("corruption", sort=True):
        found["corruption"][corruption] = _summary(rows, None)
    damaged = frame[(frame["severity"] != CLEAN) & (frame["direct"] != frame["restored"])]
    if len(damaged):
        ratio = statistics.odds_ratio(
            damaged["restored"].to_numpy(bool),
            (damaged["probability"] > DECIDES).to_numpy(bool),
            (damaged["corruption"] + " " + damaged["severity"]).to_numpy(str),
            statistics.clusters(damaged),
            **rest,
        )
        found["odds_of_a_call_where_it_helps"] = ratio and asdict(ratio)
    return found


def _summary(rows: "pd.DataFrame", rest: dict | None) -> dict:
    direct, restored = rows["direct"].to_numpy(float), rows["restored"].to_numpy(float)
    called = (rows["probability"] > DECIDES).to_numpy()
    own = np.where(called, restored, direct)
    calls, accuracy = curve(rows)
    best = int(accuracy.argmax())
    summary = {
        "questions": len(rows),
        "never": direct.mean(),
        "always": restored.mean(),
        "either": np.maximum(direct, restored).mean(),
        "own": own.mean(),
        "calls": called.mean(),
        "best": accuracy[best],
        "best_calls": calls[best],
    }
    summary = {name: value if isinstance(value, int) else float(value) for name, value in summary.items()}
    if rest:
        groups = statistics.clusters(rows)
        random = direct + called.mean() * (restored - direct)
        summary["own_over_never"] = asdict(statistics.paired_difference(own, direct, groups, **rest))
        summary["own_over_random"] = asdict(statistics.paired_difference(own, random, groups, **rest))
    return summary
