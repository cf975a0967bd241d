"""Stage `traces`: let the base answer the degraded training images and write the demonstrations."""

from collections import Counter
from pathlib import Path

from tqdm import tqdm

from clear.bench.scoring import is_correct
from clear.config import Config
from clear.records import read_samples, write_json
from clear.runtime import apply_runtime
from clear.traces.oracle import restores, trace_row
from clear.traces.records import write_traces

OUT, METRICS = Path("data/traces"), Path("data/metrics/traces.json")


def run(config: Config) -> None:
    """Write data/traces and the share of each pathway per severity."""
    apply_runtime(config)
    from clear.reasoning.answering import Answerer
    from clear.stages.paths import model_folder

    degraded = list(read_samples("data/degraded/sft"))
    asked = [(i, q) for i, s in enumerate(degraded) for q in s.questions[: config.traces.questions]]
    clean = asked[:: max(1, round(1 / config.traces.clean_share))] if config.traces.clean_share else []
    answerer = Answerer.load(model_folder("base", config), config)
    rows = []
    with tqdm(total=len(asked) + len(clean), desc="traces", unit="question", mininterval=2) as bar:
        for questions, is_clean in ((asked, False), (clean, True)):
            images = [s.image if is_clean else s.seen for s in degraded]
            bank = answerer.bank(images, [s.key for s in degraded])
            answers = answerer.answer(bank, questions, restore="plain", progress=bar.update)
            for (i, question), answer in zip(questions, answers, strict=True):
                good = is_correct(answer.prediction, question)
                restore = not is_clean and restores(config.traces.restore_when, good)
                rows.append(trace_row(degraded[i], question, restore, good, is_clean))
    write_traces(OUT, rows)
    seen = Counter(row.severity for row in rows)
    restored = Counter(row.severity for row in rows if row.reply_2)
    right = Counter(row.severity for row in rows if row.base_correct)
    write_json(
        METRICS,
        {
            "traces": len(rows),
            "restoring_share": {s: restored[s] / seen[s] for s in sorted(seen)},
            "base_accuracy": {s: right[s] / seen[s] for s in sorted(seen)},
        },
    )
