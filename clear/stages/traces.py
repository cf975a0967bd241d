"""Stage `traces`: let the base answer the degraded training images and write the demonstrations.

With `traces.kind: oracle` their words come from the evidence of the source, with `teacher` from a model behind an
endpoint (clear/traces/teacher.py): what it cannot write goes to data/rejects/traces.parquet, its cost to the run
record. With `given` they come with the data (clear/traces/given.py), no base is asked, and a demonstration that is not
as it must be is rejected. The written table is then checked by named expectations (clear/traces/checks.py); a violated
one stops the stage once metrics, rejects and Data Docs (traces/data_docs in the report folder) are written, so that its
rows can be looked up.

Images are streamed from the shards, so that memory does not grow with their number: once to ask the base about the
degraded ones, once about the clean ones, and again for a teacher, who is shown them. Everything else reads the text
alone. A question keeps only two verdicts and its trace, some hundred bytes.
"""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from clear.bench.scoring import is_correct
from clear.data.io import write_json
from clear.data.records import Question, Sample, drawn, read_samples
from clear.data.rejects import Reject, RejectWriter
from clear.errors import ClearError
from clear.model.runtime import apply_runtime
from clear.schema import Config
from clear.traces.checks import TRACE_CHECKS, trace_frame
from clear.traces.given import given
from clear.traces.oracle import restores, trace_row
from clear.traces.table import TraceRow, read_traces, write_traces
from clear.validation.expectations import Check, Failure, as_json, listed, run_checks

if TYPE_CHECKING:
    from clear.reasoning.answering import Answerer

OUT, METRICS, REJECTS = Path("data/traces"), Path("data/metrics/traces.json"), Path("data/rejects/traces.parquet")

TEXT = ("id", "questions", "corruption", "severity", "paired")
"""What a trace needs of a sample besides its pictures."""


def run(config: Config) -> None:
    """Write data/traces, the share of each pathway per severity, and the verdict on the written traces.

    Raises ClearError naming expectation and rows if an expectation fails.
    """
    kind = config.traces.kind
    if kind == "teacher":
        _check_endpoints(config)  # before anything that takes long
    found = _given(config) if kind == "given" else _demonstrated(config)
    rejected, shown, restored, answered = Counter(), Counter(), Counter(), Counter()

    def kept() -> Iterator[TraceRow]:
        """The traces, counted as they pass; what is rejected goes its own way."""
        for one in found:
            if isinstance(one, Reject):
                rejects.add(one)
                rejected[one.reason] += 1
                continue
            shown[one.severity] += 1
            restored[one.severity] += bool(one.reply_2)
            answered[one.severity] += one.base_correct
            yield one

    with RejectWriter(REJECTS) as rejects:
        count = write_traces(OUT, kept())
        if not count:
            who = "the data brought" if kind == "given" else "the teacher wrote"
            raise ClearError(f"traces: {who} no usable trace; {REJECTS} says why ({dict(rejected)}).")
        failures = _failures(config, rejects)
    figures = {
        "traces": count,
        "validation": {"success": not failures, "expectations": len(TRACE_CHECKS), "failed": as_json(failures)},
        "restoring_share": {s: restored[s] / shown[s] for s in sorted(shown)},
    }
    if kind == "given":
        figures["rejects"] = rejected
    else:
        figures["base_accuracy"] = {s: answered[s] / shown[s] for s in sorted(shown)}
    write_json(METRICS, figures | (_teaching(config, rejected) if kind == "teacher" else {}))
    if failures:
        verdict = listed({"data/traces": failures}, "traces")
        raise ClearError(f"traces: {verdict}. See {REJECTS}; repair the samples, or the code that wrote these traces.")


def _given(config: Config) -> Iterator[TraceRow | Reject]:
    """The traces that came with the data; each of them that breaks an expectation is rejected under its name."""
    rows, wanted = [], ("id", "source", "questions", "annotation", "corruption", "severity")
    for _, sample, question in _asked(config, wanted):
        found = given(sample, question)
        if isinstance(found, Reject):
            yield found
        else:
            rows.append(found)
    if not rows:
        return
    frame = trace_frame(rows, read_samples("data/degraded/sft", TEXT))
    broken: dict[int, Check] = {}
    for check in TRACE_CHECKS:
        broken |= {n: check for n in frame.index[check.failing(frame)] if n not in broken}
    for n, row in enumerate(rows):
        if check := broken.get(n):
            yield Reject(frame.at[n, "key"], row.severity, check.name, f"not true that {check.means}")
        else:
            yield row


def _demonstrated(config: Config) -> Iterable[TraceRow | Reject]:
    """The traces that the oracle or the teacher writes, once the base has answered."""
    apply_runtime(config)
    from clear.data.workspace import latents_dir, model_folder
    from clear.reasoning.answering import Answerer

    total = _checked(config)
    answerer = Answerer.load(model_folder("base", config), config, latents_dir())
    # Without a clean partner there is neither a clean image to show nor one to restore.
    paired = array("q")  # numbers of the questions of those with one

    def names() -> Iterator[str]:
        for n, sample, question in _asked(config, TEXT):
            if sample.paired:
                paired.append(n)
                yield f"{sample.id}/{question.id}"

    chosen = drawn(names(), round(config.traces.clean_share * total))
    shown_clean = {paired[place] for place in chosen}
    seen = _right(config, answerer, ((n, s.key, s.seen, q) for n, s, q in _asked(config)), total)
    # The clean image is asked only where its answer matters: in a clean trace, or after a failure.
    asked = shown_clean | {n for n, right in seen.items() if not right}
    tasks = ((n, s.key, s.image, q) for n, s, q in _asked(config) if n in asked)
    clean = _right(config, answerer, tasks, len(asked))
    columns = None if config.traces.kind == "teacher" else TEXT

    def wanted() -> Iterator[tuple[Sample, Question, bool | None, bool, bool]]:
        """(sample, question, whether to restore, base_correct, clean) of every trace."""
        rule = config.traces.restore_when
        for n, sample, question in _asked(config, columns):
            restore = None if rule == "teacher" else restores(rule, seen[n], clean.get(n, True))
            yield sample, question, restore if sample.paired else False, seen[n], False
        for n, sample, question in _asked(config, columns):
            if n in shown_clean:
                yield sample, question, False, clean[n], True

    if config.traces.kind == "teacher":
        total += len(shown_clean)
        return tqdm(_taught(config, wanted()), desc="teacher", total=total, unit="trace", mininterval=2)
    return (trace_row(*task) for task in wanted())


def _failures(config: Config, rejects: RejectWriter) -> list[Failure]:
    """The expectations that the table on disk violates; all of their rows go to the rejects, Data Docs to the report's
    folder."""
    from clear.data.workspace import report_dir

    frame = trace_frame(read_traces(OUT), read_samples("data/degraded/sft", TEXT), config.traces.judge)
    for check in TRACE_CHECKS:
        for row in frame[check.failing(frame)].itertuples():
            rejects.add(Reject(row.key, row.severity, check.name, f"not true that {check.means}"))
    return run_checks({"traces": frame}, {"traces": TRACE_CHECKS}, report_dir() / "traces" / "data_docs")["traces"]


def _asked(config: Config, columns: Iterable[str] | None = None) -> Iterator[tuple[int, Sample, Question]]:
    """(number, sample, question) of every question to demonstrate, in order. Read anew on each call: there may be more
    pictures than memory holds. `columns` as in read_samples."""
    samples = read_samples("data/degraded/sft", columns)
    pairs = ((sample, question) for sample in samples for question in sample.questions[: config.traces.questions])
    return ((n, *pair) for n, pair in enumerate(pairs))


def _checked(config: Config) -> int:
    """How many questions there are. Raises ClearError if the oracle knows no evidence for any of them."""
    total, bare, last = 0, 0, ""
    for _, _, question in _asked(config, ("id", "questions")):
        total += 1
        if not question.evidence:
            bare, last = bare + 1, question.id
    if config.traces.kind == "oracle" and bare:
        if bare == total:
            raise ClearError(
                f"traces: none of {total} questions brings evidence (the last is {last}), so that no thought can be "
                "composed; set traces.kind = teacher, or add the key `evidence` to the questions."
            )
        print(f"traces: {bare} of {total} questions bring no evidence; their thoughts note the answer alone.")
    return total


def _right(
    config: Config, answerer: "Answerer", tasks: Iterable[tuple[int, str, bytes, Question]], total: int
) -> dict[int, bool]:
    """Whether the base answers each of `total` (number, image name, image, question) right, by number.

    Only the images of `sampling.batch` questions are in memory at once; the engine answers no more at once either.
    """
    found: dict[int, bool] = {}
    tasks = iter(tasks)
    with tqdm(total=total, desc="traces", unit="question", mininterval=2) as bar:
        while block := list(islice(tasks, config.sampling.batch)):
            images = {name: image for _, name, image, _ in block}
            bank, place = answerer.bank(list(images.values()), list(images)), {name: i for i, name in enumerate(images)}
            questions = [(place[name], question) for _, name, _, question in block]
            answers = answerer.answer(bank, questions, restore="plain", progress=bar.update)
            said = {n: (q, a.prediction) for (n, _, _, q), a in zip(block, answers, strict=True)}
            found |= {n: is_correct(prediction, q) for n, (q, prediction) in said.items()} | _agreeing(config, said)
    return found


def _check_endpoints(config: Config) -> None:
    from clear.data.workspace import replies_file
    from clear.llm.endpoint import connect

    for name in ("teacher", *(("judge",) if config.traces.judge else ())):
        connect(getattr(config, name), name, replies_file(name)).close()


def _taught(config: Config, tasks: Iterator[tuple]) -> Iterator[TraceRow | Reject]:
    """The teacher's trace of each task; what it cost goes to the run record, also when it stops half-way."""
    from clear.data.workspace import record_run, replies_file
    from clear.llm.endpoint import connect
    from clear.traces.teacher import Task, write

    judge = connect(config.judge, "judge", replies_file("judge")) if config.traces.judge else nullcontext()
    with connect(config.teacher, "teacher", replies_file("teacher")) as teacher, judge as judge:
        try:
            yield from write(teacher, (Task(*task) for task in tasks), config.traces.give_answer, judge)
        finally:
            cost = {"teacher": teacher.report()} | ({"judge": judge.report()} if judge else {})
            record_run("traces", **cost)
            spent = cost["teacher"]
            print(
                f"teacher: {spent['replies']} replies, {spent['prompt_tokens']} + {spent['completion_tokens']} tokens, "
                f"{spent['spent_usd']:.2f} of {spent['budget_usd']:.2f} USD"
            )


def _teaching(config: Config, rejected: Counter) -> dict:
    from clear.llm.endpoint import setting
    from clear.traces.teacher import prompt_hash

    model = setting(config.teacher.model, "teacher.model")
    return {"rejects": rejected, "teacher": {"model": model, "prompts": prompt_hash()}}


def _agreeing(config: Config, answers: dict[int, tuple[Question, str]]) -> dict[int, bool]:
    """The judge's verdict on the base's free answers that do not match exactly; an outage stops the stage."""
    from clear.bench.judge import agreements
    from clear.data.workspace import replies_file
    from clear.llm.endpoint import Outage, connect
    from clear.reasoning.prompts import question_text

    open_ = {n: (q, a) for n, (q, a) in answers.items() if not q.options and a and not is_correct(a, q)}
    if not config.traces.judge or not open_:
        return {}
    with connect(config.judge, "judge", replies_file("judge")) as judge:
        verdicts = agreements(judge, [(question_text(q), q.answer, a) for q, a in open_.values()])
    failed = [v for v in verdicts if isinstance(v, str)]
    if failed:
        raise Outage(f"traces: the judge gave no verdict on {len(failed)} answers of the base, the first: {failed[0]}")
    return dict(zip(open_, verdicts, strict=True))
