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
    answerer = Answerer.load(model_folder("base", config), config)
    right: dict[bool, list[bool]] = {}
    with tqdm(total=2 * len(asked), desc="traces", unit="question", mininterval=2) as bar:
        for is_clean in (True, False):
            bank = answerer.bank([s.image if is_clean else s.seen for s in degraded], [s.key for s in degraded])
            answers = answerer.answer(bank, asked, restore="plain", progress=bar.update)
            right[is_clean] = [is_correct(a.prediction, q) for a, (_, q) in zip(answers, asked, strict=True)]
    rows = []
    for (i, question), clean, seen in zip(asked, right[True], right[False], strict=True):
        rows.append(trace_row(degraded[i], question, restores(config.traces.restore_when, seen, clean), seen))
    step = max(1, round(1 / config.traces.clean_share)) if config.traces.clean_share else len(asked) + 1
    for (i, question), clean in list(zip(asked, right[True], strict=True))[::step]:
        rows.append(trace_row(degraded[i], question, False, clean, clean=True))
    write_traces(OUT, rows)
    seen = Counter(row.severity for row in rows)
    restored = Counter(row.severity for row in rows if row.reply_2)
    answered = Counter(row.severity for row in rows if row.base_correct)
    write_json(
        METRICS,
        {
            "traces": len(rows),
            "restoring_share": {s: restored[s] / seen[s] for s in sorted(seen)},
            "base_accuracy": {s: answered[s] / seen[s] for s in sorted(seen)},
        },
    )
