"""Stage `traces`: let the base answer the degraded training images and write the demonstrations."""

from collections import Counter
from pathlib import Path

from tqdm import tqdm

from clear.bench.scoring import is_correct
from clear.config import Config, apply_runtime
from clear.records import CLEAN, read_samples, write_json
from clear.traces.oracle import restores, trace_row
from clear.traces.records import write_traces

OUT, METRICS = Path("data/traces"), Path("data/metrics/traces.json")


def run(config: Config) -> None:
    """Write data/traces and the share of each pathway per severity."""
    apply_runtime(config)
    from clear.reasoning.answering import Answerer

    degraded = list(read_samples("data/degraded/sft"))
    asked = [(i, q) for i, s in enumerate(degraded) for q in s.questions[: config.traces.questions]]
    answerer = Answerer.load("data/models/base", config)
    bank = answerer.bank([s.seen for s in degraded], [s.key for s in degraded])
    with tqdm(total=len(asked), desc="traces", unit="question", mininterval=2) as bar:
        answers = answerer.answer(bank, [(i, q) for i, q in asked], restore="plain", progress=bar.update)
    rows = []
    for (i, question), answer in zip(asked, answers, strict=True):
        good = is_correct(answer.prediction, question)
        rows.append(trace_row(degraded[i], question, restores(config.traces.restore_when, good), good))
    clean = round(config.traces.clean_share * len(asked))
    for i, question in asked[:: max(1, len(asked) // max(1, clean))][:clean]:
        rows.append(trace_row(degraded[i], question, False, True, clean=True))
    write_traces(OUT, rows)
    seen = Counter(row.severity for row in rows)
    restored = Counter(row.severity for row in rows if row.reply_2)
    right = Counter(row.severity for row in rows if row.base_correct)
    write_json(
        METRICS,
        {
            "traces": len(rows),
            "restoring_share": {s: restored[s] / seen[s] for s in sorted(seen)},
            "base_accuracy": {s: right[s] / seen[s] for s in sorted(seen) if s != CLEAN},
        },
    )
