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
    step = max(1, round(1 / config.traces.clean_share)) if config.traces.clean_share else len(asked) + 1
    # Without a clean partner there is neither a clean image to show nor one to restore.
    shown_clean = {n for n in range(0, len(asked), step) if degraded[asked[n][0]].paired}

    def right(images: list[bytes], chosen: list[int]) -> dict[int, bool]:
        """Whether the base answers each chosen question from these images."""
        bank = answerer.bank(images, [s.key for s in degraded])
        with tqdm(total=len(chosen), desc="traces", unit="question", mininterval=2) as bar:
            answers = answerer.answer(bank, [asked[n] for n in chosen], restore="plain", progress=bar.update)
        return {n: is_correct(a.prediction, asked[n][1]) for n, a in zip(chosen, answers, strict=True)}

    seen = right([s.seen for s in degraded], list(range(len(asked))))
    # The clean image is asked only where its answer matters: in a clean trace, or after a failure.
    clean = right([s.image for s in degraded], [n for n in range(len(asked)) if n in shown_clean or not seen[n]])
    rows = []
    for n, (i, question) in enumerate(asked):
        restore = degraded[i].paired and restores(config.traces.restore_when, seen[n], clean.get(n, True))
        rows.append(trace_row(degraded[i], question, restore, seen[n]))
    for n in sorted(shown_clean):
        i, question = asked[n]
        rows.append(trace_row(degraded[i], question, False, clean[n], clean=True))
    write_traces(OUT, rows)
    shown = Counter(row.severity for row in rows)
    restored = Counter(row.severity for row in rows if row.reply_2)
    answered = Counter(row.severity for row in rows if row.base_correct)
    write_json(
        METRICS,
        {
            "traces": len(rows),
            "restoring_share": {s: restored[s] / shown[s] for s in sorted(shown)},
            "base_accuracy": {s: answered[s] / shown[s] for s in sorted(shown)},
        },
    )
