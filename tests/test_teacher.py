"""Traces by a teacher behind a real HTTP server: pathways, filters, rejects, budget, and a SIGKILL in the middle."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from clear.config import compose, from_dict
from clear.data.images import decode_image, encode_image
from clear.data.records import Question, Sample, read_samples
from clear.data.rejects import Reject
from clear.degradation.build import degraded_samples
from clear.errors import ClearError
from clear.llm.endpoint import BudgetSpent, Outage, connect
from clear.reasoning.grammar import asks_restoration, extract_answer, well_formed
from clear.sources.scenes.render import scenes
from clear.traces.table import read_traces
from clear.traces.teacher import ATTEMPTS, Task, demonstrate, write
from tests.chat_server import completion, serving, settings, user_text
from tests.conftest import ROOT
from tests.tiny import trace_workspace

CLEAN, BAD = (encode_image(np.full((8, 8, 3), value, np.uint8)) for value in (200, 20))
QUESTION = Question("q1", "colour", "which colour is the cup ?", "red")
SAMPLE = Sample("s1", "folder", "sft", CLEAN, "", (QUESTION,), degraded=BAD, corruption="dark", severity="high")
GOOD = "<think>The cup has\nthe colour of blood.</think>\n<answer> Red </answer>"
DAMAGE = "<think>Too dark to tell colours.</think><image_restore>"


def task(restore, **changes) -> Task:
    return Task(**{"sample": SAMPLE, "question": QUESTION, "restore": restore, "base_correct": False} | changes)


def images(body: dict) -> list[bytes]:
    """The pictures of a request, in order."""
    parts = [p for m in body["messages"] if isinstance(m["content"], list) for p in m["content"]]
    return [base64.b64decode(p["image_url"]["url"].split(",")[1]) for p in parts if p["type"] == "image_url"]


def teach(tmp_path, answer, one: Task, give_answer=True, judge=None, **changes):
    """The trace of one task by a server that answers with `answer(body, number)` (a text), and the requests."""
    with serving(lambda body, number: (200, {}, completion(answer(body, number)))) as server:
        client = connect(settings(server.url, **changes), "teacher", tmp_path / "t.sqlite", pause=0.01)
        found = demonstrate(client, one, give_answer, judge)
        client.close()
    return found, server.bodies


def test_a_direct_trace_shows_the_degraded_image_only(tmp_path):
    row, bodies = teach(tmp_path, lambda body, number: GOOD, task(False, base_correct=True))
    assert images(bodies[0]) == [BAD] and len(bodies) == 1
    assert "which colour is the cup ?" in user_text(bodies[0]) and "The right answer is: red" in user_text(bodies[0])
    assert (
        row.reply_1
        == row.direct
        == "<think> sufficient : The cup has the colour of blood. </think> <answer> Red </answer>"
    )
    assert row.reply_2 == "" and row.base_correct and (row.corruption, row.severity) == ("dark", "high")


def test_a_clean_trace_shows_the_clean_image(tmp_path):
    row, bodies = teach(tmp_path, lambda body, number: GOOD, task(False, clean=True), give_answer=False)
    assert images(bodies[0]) == [CLEAN] and (row.corruption, row.severity) == ("clean", "clean")
    assert "red" not in user_text(bodies[0]).lower()


@pytest.mark.parametrize("kind", ["WEBP", "TIFF", "GIF", "JPEG", "turned JPEG", "turned PNG"])
def test_the_teacher_is_sent_what_every_server_reads_and_sees_it_as_the_student_does(tmp_path, kind):
    stream, exif = BytesIO(), Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(np.indices((8, 16)).sum(0).astype(np.uint8) * 9).convert("RGB")
    picture.save(stream, kind.split()[-1], **({"exif": exif} if "turned" in kind else {}))
    data = stream.getvalue()
    _, bodies = teach(tmp_path, lambda body, number: GOOD, task(False, sample=replace(SAMPLE, degraded=data)))
    (url,) = (p["image_url"]["url"] for p in bodies[0]["messages"][1]["content"] if p["type"] == "image_url")
    (sent,) = images(bodies[0])
    assert url.startswith("data:image/jpeg" if kind == "JPEG" else "data:image/png")
    assert Image.open(BytesIO(sent)).format == ("JPEG" if kind == "JPEG" else "PNG")
    assert (np.asarray(Image.open(BytesIO(sent)).convert("RGB")) == decode_image(data)).all()


def test_a_restoring_trace_sees_the_degraded_and_then_the_clean_image(tmp_path):
    row, bodies = teach(tmp_path, lambda body, number: (DAMAGE, GOOD)[number], task(True))
    assert [images(body) for body in bodies] == [[BAD], [BAD, CLEAN]]
    assert bodies[1]["messages"][2] == {"role": "assistant", "content": DAMAGE}
    assert "red" not in user_text(bodies[0]).lower(), "who has to say what is hidden is not told the answer"
    assert row.reply_1 == "<think> insufficient : Too dark to tell colours. </think> <image_restore>"
    assert asks_restoration(row.reply_1) and QUESTION.text in row.reply_2 and extract_answer(row.reply_2) == "Red"
    assert well_formed(list(row.trace.replies)) and well_formed([row.direct]) and row.restored == row.reply_2


@pytest.mark.parametrize("restoring", [True, False])
def test_the_teacher_decides_where_it_is_let(tmp_path, restoring):
    row, bodies = teach(tmp_path, lambda body, number: GOOD if number or not restoring else DAMAGE, task(None))
    assert row.trace.restores is restoring and len(bodies) == 1 + restoring
    assert "Judge first" in user_text(bodies[0])


@pytest.mark.parametrize(
    ("restore", "reply", "reason"),
    [
        (False, "Red.", "form"),
        (False, "<think>x</think>", "form"),
        (False, f"{GOOD} and more", "form"),
        (False, "<think>a <think>b</think><answer>red</answer>", "form"),
        (False, "<think> </think><answer>red</answer>", "form"),
        (False, "<think>The reference answer says red.</think><answer>red</answer>", "leak"),
        (False, "<think>It is blue.</think><answer>blue</answer>", "answer"),
        (False, DAMAGE, "pathway"),
        (True, GOOD, "pathway"),
        (None, DAMAGE, "pathway"),  # twice
    ],
)
def test_a_reply_that_fails_the_filter_is_asked_again_and_after_three_the_question_is_rejected(
    tmp_path, restore, reply, reason
):
    found, bodies = teach(tmp_path, lambda body, number: reply, task(restore))
    assert isinstance(found, Reject) and (found.reason, found.id) == (reason, "s1/dark/high/q1") and found.detail
    assert len(bodies) == (6 if restore is None else 3)
    good = (DAMAGE, GOOD) if restore else (GOOD,)
    script = [reply, *good] if restore is not None else [reply, reply, GOOD]
    row, bodies = teach(tmp_path / "second", lambda body, number: script[number], task(restore))
    assert not isinstance(row, Reject) and len(bodies) == len(script)


def test_a_reply_that_was_cut_off_is_no_trace(tmp_path):
    with serving(lambda body, number: (200, {}, completion(GOOD, finish="length"))) as server:
        client = connect(settings(server.url), "teacher", tmp_path / "t.sqlite")
        found = demonstrate(client, task(False), True, None)
        client.close()
    assert found.reason == "cut" and "max_tokens = 50" in found.detail


def test_a_refused_request_rejects_its_row_and_an_outage_stops(tmp_path):
    def answer(body, number):
        if "first" in user_text(body):
            return 400, {}, {"error": "filtered"}
        return (503, {}, {}) if "third" in user_text(body) else (200, {}, completion(GOOD))

    tasks = [task(False, question=Question(n, "t", f"{n} ?", "red")) for n in ("first", "second", "third")]
    with serving(answer) as server:
        client = connect(settings(server.url, retries=1), "teacher", tmp_path / "t.sqlite", pause=0.01)
        found = write(client, tasks, True)
        assert next(found).reason == "refused" and next(found).question == "second"
        with pytest.raises(Outage, match="503"):
            next(found)
        client.close()


@pytest.mark.parametrize(("verdict", "reason"), [("true", ""), ("false", "answer"), ('"maybe"', "judge")])
def test_a_judge_lets_pass_what_only_sounds_different(tmp_path, verdict, reason):
    said = "<think>It is dark.</think><answer>crimson</answer>"
    with serving(lambda body, number: (200, {}, completion(f'{{"consistent": {verdict}}}'))) as server:
        with connect(settings(server.url), "judge", tmp_path / "j.sqlite") as judge:
            found, _ = teach(tmp_path, lambda body, number: said, task(False), judge=judge)
        assert "crimson" in user_text(server.bodies[0]) and "red" in user_text(server.bodies[0])
    assert found.reason == reason if reason else extract_answer(found.reply_1) == "crimson"


def test_a_judge_of_a_choice_reads_options_and_not_letters_alone(tmp_path):
    choice = Question("q1", "colour", "which ?", "B", ("crimson", "navy"))
    said = "<think>It is dark.</think><answer>A</answer>"
    with serving(lambda body, number: (200, {}, completion('{"consistent": false}'))) as server:
        with connect(settings(server.url), "judge", tmp_path / "j.sqlite") as judge:
            found, bodies = teach(tmp_path, lambda body, number: said, task(False, question=choice), judge=judge)
        text = user_text(server.bodies[0])
    assert found.reason == "answer" and "which ?\nA. crimson\nB. navy" in user_text(bodies[0])
    assert "which ?\nA. crimson\nB. navy" in text and "Reference: B. navy\nAnswer: A. crimson" in text


def test_a_judge_that_is_out_of_service_stops_too(tmp_path):
    said = "<think>It is dark.</think><answer>crimson</answer>"
    judge = connect(settings("http://127.0.0.1:9/v1", retries=0), "judge", tmp_path / "j.sqlite")
    with judge, pytest.raises(Outage, match="no connection"):
        teach(tmp_path, lambda body, number: said, task(False), judge=judge)


def test_the_budget_stops_and_what_was_written_is_kept(tmp_path):
    tasks = [task(False, question=Question(f"q{i}", "t", f"{i} ?", "red")) for i in range(30)]
    with serving(lambda body, number: (200, {}, completion(GOOD, 3000, 50))) as server:
        with connect(settings(server.url, budget=0.08, concurrency=1), "teacher", tmp_path / "t.sqlite") as client:
            with pytest.raises(BudgetSpent):
                list(write(client, tasks, True))
            assert 0 < client.report()["replies"] < 30 and client.report()["spent_usd"] <= 0.08
            first = len(server.bodies)
        with connect(settings(server.url, budget=9.0), "teacher", tmp_path / "t.sqlite") as client:
            assert len(list(write(client, tasks, True))) == 30
        assert len(server.bodies) == 30 and first < 30


def test_settings_of_the_teacher_do_not_fit_the_oracle():
    for override in ("traces.restore_when=teacher", "traces.judge=true"):
        with pytest.raises(ClearError, match=r"need traces.kind = teacher"):
            from_dict(compose([override]))


# --- the stage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A workspace with a few degraded scenes and an untrained base."""
    folder = tmp_path_factory.mktemp("prepared")
    teacher = ["traces.kind=teacher", "traces.restore_when=always", "traces.questions=1", "teacher.url=$T_URL"]
    quick = ["teacher.key=''", "teacher.concurrency=1", "teacher.timeout=60", "traces.clean_share=0.5"]
    made = [(sample, "dark", "high") for sample in scenes("sft", 6, 1, 256, 4)]
    trace_workspace(folder, [*teacher, *quick], degraded_samples(made, 0.4, 1))
    return folder


def run_stage(folder: Path, url: str, **environment: str) -> subprocess.Popen:
    plain = {k: v for k, v in os.environ.items() if k != "CLEAR_HOME"} | {"PYTHONPATH": str(ROOT), "T_URL": url}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "clear", "traces"], cwd=folder, env=plain | environment, **pipes)


@pytest.mark.slow
def test_the_stage_resumes_after_sigkill_and_asks_nothing_twice(prepared):
    """Nine traces: six restoring ones of two requests each, three clean ones; the last question has no good reply."""
    asked = [s.questions[0] for s in read_samples(prepared / "data/degraded/sft")]
    assert [q.text for q in asked].count(asked[-1].text) == 1
    reached, go = threading.Event(), threading.Event()

    def answer(body, number):
        if number == 7:
            reached.set()
            go.wait(60)
        if "degraded too badly" in user_text(body):
            return 200, {}, completion(DAMAGE)
        question = next(q for q in asked if json.dumps(q.text)[1:-1] in json.dumps(body["messages"]))
        right = "no idea" if question == asked[-1] else question.answer
        return 200, {}, completion(f"<think>I look.</think><answer>{right}</answer>")

    with serving(answer) as server:
        with run_stage(prepared, server.url) as process:
            assert reached.wait(120), process.poll()
            process.send_signal(signal.SIGKILL)
        assert not (prepared / "data/traces/traces.parquet").exists()
        go.set()
        with run_stage(prepared, server.url) as process:
            stdout, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr
    bodies = [json.dumps(body) for body in server.bodies]
    times = Counter(bodies)
    # What was under way when the process died is asked again; the last question is asked three times by design.
    assert times.pop(bodies[7]) == 2
    assert sorted(times.values()) == [1] * (len(times) - 2) + [ATTEMPTS] * 2
    assert len(bodies) == 6 * 2 + 3 + 1 + 2 * (ATTEMPTS - 1)
    rows = list(read_traces(prepared / "data/traces"))
    rejects = pd.read_parquet(prepared / "data/rejects/traces.parquet")
    assert len(rows) == 8 and rejects.reason.tolist() == ["answer"] and asked[-1].id in rejects.id[0]
    assert all(row.trace.restores == (row.severity == "high") for row in rows)
    assert Counter(row.severity for row in rows) == {"high": 5, "clean": 3}
    metrics = json.loads((prepared / "data/metrics/traces.json").read_text())
    assert metrics["rejects"] == {"answer": 1} and metrics["traces"] == 8
    assert metrics["teacher"]["model"] == "gpt-4.1" and "usd" not in json.dumps(metrics)
    record = json.loads(next((prepared / ".clear/runs").rglob("traces.json")).read_text())
    assert record["teacher"]["attempts"] == len(bodies) and record["teacher"]["asked_now"] == len(bodies) - 8
    assert "replies," in stdout and "USD" in stdout


def test_the_stage_names_what_is_missing(prepared, clear, monkeypatch):
    monkeypatch.chdir(prepared)
    monkeypatch.setenv("T_URL", "")
    status, _, stderr = clear("traces")
    assert status == 1 and "the environment variable T_URL is not set" in stderr and stderr.count("\n") == 1
