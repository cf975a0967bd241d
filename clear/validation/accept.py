"""Whether a set of naturally degraded images is fit to be trained on and measured with: rules about the set as a whole.

The rules about its samples are in clear/validation/suites.py. These here have thresholds in params (`incoming.limits`)
and state the measured value, so that a refusal says how far off the set is. `clear incoming check` and stage `validate`
apply the same ones.
"""

from collections import Counter
from dataclasses import dataclass

import cv2
import numpy as np
import pandas as pd

from clear.data.images import decode_image
from clear.data.records import INCOMING, Sample
from clear.schema import Limits
from clear.sources.scenes.words import normalise
from clear.validation.expectations import Check
from clear.validation.metrics import Measured, measure


@dataclass(frozen=True)
class Seen(Measured):
    """A row of a validation frame with what only naturally degraded images are measured for."""

    contrast: float | None = None  # grey levels, see `contrast`


def measure_sample(sample: Sample) -> Measured:
    """`measure`, and the contrast of the picture where it is a naturally degraded one that can be read."""
    found = measure(sample)
    if sample.severity != INCOMING or not found.decodable:
        return found
    shown = decode_image(sample.image if sample.degraded is None else sample.degraded)
    return Seen(**vars(found), contrast=contrast(shown))


def contrast(image: np.ndarray) -> float:
    """Standard deviation of a uint8 RGB image (H, W, 3) as a thumbnail of 32x32 px, in grey levels, of its most varied
    channel. Averaging removes sensor noise: a black frame of 96x128 px with noise of sd 2 has 0.6, and less if larger;
    the darkest of the sixteen corruptions leaves 6.
    """
    small = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float64)
    return float(small.std(axis=(0, 1)).max())


def set_checks(frame: pd.DataFrame, rows: int, rejected: int, limits: Limits) -> list[Check]:
    """Add the columns that judge a set as a whole to its frame and return their checks.

    `rows` and `rejected` count the rows of its tables, pictures that no table names included. The text of a check has
    the value that was found, and the remedy.
    """
    blank = frame["contrast"].lt(limits.contrast)
    bench = int(frame["split"].eq("bench").sum())
    frame["rejected_share"] = rejected / max(rows, 1)
    frame["blank_share"] = np.where(blank, blank.mean(), np.nan)  # a value in the rows concerned only, which are named
    frame["bench_pictures"] = bench
    commonest = add_answer_p(frame, limits.answer)
    return [
        Check(
            "few_rejected",
            "rejected_share",
            f"at most {limits.rejected:.0%} of the rows are rejected (incoming.limits.rejected): {rejected} of {rows} "
            "are; correct the rows that the rejects file names, or remove them",
            high=limits.rejected,
            whole=True,
        ),
        Check(
            "few_blank",
            "blank_share",
            f"at most {limits.blank:.0%} of the pictures show next to nothing (incoming.limits.blank), with a contrast "
            f"below {limits.contrast:g} grey levels (incoming.limits.contrast): {int(blank.sum())} of {len(frame)} do; "
            "replace or remove them",
            high=limits.blank,
        ),
        Check(
            "answers_vary",
            "answer_p",
            f"no answer is given to more than {limits.answer:.0%} of the questions of a task or of the set "
            f"(incoming.limits.answer, tested at incoming.limits.alpha = {limits.alpha:g}): {commonest}; "
            "add questions with other answers",
            low=limits.alpha,
        ),
        Check(
            "enough_bench",
            "bench_pictures",
            f"at least {limits.bench} pictures are in the benchmark slice (incoming.limits.bench): {bench} of "
            f"{len(frame)} are; add pictures, or raise incoming.bench_share",
            low=limits.bench,
            whole=True,
        ),
    ]


def add_answer_p(frame: pd.DataFrame, share: float) -> str:
    """Column `answer_p`: how surprising it is that the row's commonest answer is so common; returns that of the set.

    Exact binomial tests of "at most `share` of the questions have this answer": of each (task, answer), times the
    number of tasks, and of each answer over all tasks. The value is the smallest p of the row's answers, so that it is
    a test at any size: at share 0.7 and level 0.05 nine equal answers of one task are refused and eight are not, and
    of 10,000 answers 70.8 % equal ones are. At any size a set whose answers come from two equally likely ones is
    refused in at most 0.4 % of cases, at shares of 60 and 40 % in at most 1.1 %, and at the share itself at the level
    (one task; simulated in tests/test_accept.py).
    """
    from scipy.stats import binom

    answers = [[(task, normalise(answer)) for task, answer in row] for row in frame["answers"]]
    pairs = Counter(pair for row in answers for pair in row)
    tasks, texts = Counter(), Counter()
    for (task, text), number in pairs.items():
        tasks[task] += number
        texts[text] += number
    total = texts.total()
    by_pair = {
        (task, text): min(1.0, len(tasks) * binom.sf(n - 1, tasks[task], share)) for (task, text), n in pairs.items()
    }
    by_text = {text: binom.sf(n - 1, total, share) for text, n in texts.items()}
    p = {pair: float(min(own, by_text[pair[1]])) for pair, own in by_pair.items()}
    frame["answer_p"] = [min((p[pair] for pair in row), default=1.0) for row in answers]
    if not pairs:
        return "there is no question"
    task, text = min(p, key=lambda pair: (p[pair], -pairs[pair], pair))
    if by_pair[task, text] <= by_text[text]:
        return f"{text!r} answers {pairs[task, text]} of {tasks[task]} of task {task!r}"
    return f"{text!r} answers {texts[text]} of {total}"
