"""`clear answer`: prediction tables that VLMEvalKit would have written, resumable, with every row accounted for."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import openpyxl
import pandas as pd
import pytest

from clear.bench.vlmeval import collect, respond
from clear.bench.vlmeval.answering import answer_table
from clear.bench.vlmeval.prompts import prompt_of
from clear.bench.vlmeval.respond import Asked, Folder, Served, shards_of
from clear.config import load
from clear.data.records import Question
from clear.data.rejects import read_rejects
from clear.errors import ClearError
from clear.llm.endpoint import Denied, connect
from clear.reasoning.answering import Answerer
from clear.sources.scenes.render import scenes
from tests.chat_server import completion, settings, user_text
from tests.chat_server import serving as chatting
from tests.conftest import ROOT
from tests.helpers.respondents import Says
from tests.helpers.tables import b64, png, write_tsv
from tests.serving import make_workspace, serving


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("answer")
    make_workspace(folder, "sampling.max_think_tokens=8", "sampling.batch=4")
    return folder


@pytest.fixture
def folder(workspace, monkeypatch) -> Folder:
    monkeypatch.chdir(workspace)
    return Folder(workspace / "model", load())


def sheet(folder: Path, name: str = "MMStar.tsv", count: int = 10) -> Path:
    """A table of free questions in the words of scenes; every third row names the picture of another."""
    words = ["which colour is the circle ?", "how many red shapes ?", "is there a red circle ?"]
    rows = [
        {
            "index": n,
            "image": str(n - 1) if n % 3 == 2 else b64(png(n)),
            "question": words[n % 3],
            "answer": ["red", "2", "yes"][n % 3],
            "category": 'a "quoted"\tname,\nin two lines é \U0001f418',
        }
        for n in range(count)
    ]
    return write_tsv(folder / name, rows)


# --- prompts --------------------------------------------------------------------------------------------------------


def test_prompts_are_those_of_vlmevalkit():
    cells = {"index": "1", "question": "Which?", "A": "red", "B": "None", "C": "", "answer": "A", "hint": "Look."}
    assert prompt_of("MMBench_DEV_EN_V11", cells) == (
        "Hint: Look.\nQuestion: Which?\nOptions:\nA. red\nB. None\n"
        "Please select the correct answer from the options above. \n"
    )
    assert prompt_of("RealWorldQA_LOW_LEVEL_HIGH", cells | {"hint": ""}).startswith("Question: Which?\nOptions:\n")
    assert prompt_of("MMVet", {"index": "1", "question": "Why?", "answer": "x"}) == "Why?"
    whole = cells | {"prompt": "Whole text.\n(A) red"}
    assert prompt_of("CV-Bench-2D_LOW_LEVEL_MID", whole) == "Whole text.\n(A) red"
    assert prompt_of("MMBench", cells, "plain") == "Hint: Look.\nWhich?\nA. red\nB. None"


# --- a folder that answers ------------------------------------------------------------------------------------------


def test_a_table_is_answered_as_clear_ask_answers_it(folder, tmp_path):
    file, steps = sheet(tmp_path), []
    folder = replace(folder, restore="always")
    found = answer_table(file, tmp_path / "out", "M", folder, progress=steps.append)
    assert found.table == tmp_path / "out/M/M_MMStar.tsv" and found.rows == 10 and not found.rejects
    assert sum(steps) == 10
    before, after = pd.read_csv(file, sep="\t"), pd.read_csv(found.table, sep="\t", keep_default_na=False)
    assert list(after) == ["index", "question", "answer", "category", "prediction"]
    pd.testing.assert_frame_equal(before.drop(columns="image"), after.drop(columns="prediction"))
    details = pd.read_parquet(found.table.with_suffix(".parquet"))
    assert details["index"].tolist() == [str(n) for n in range(10)]
    assert details.restored.all() and (details.seconds > 0).all() and (details.tokens > 7).all()
    answerer = Answerer.load(folder.folder, folder.config)
    pictures = [png(n - 1 if n % 3 == 2 else n) for n in range(10)]
    for n in (0, 5, 9):  # the picture of row 5 is that of row 4
        bank = answerer.bank([pictures[n]], ["p"])
        text = before.question[n]
        alone = answerer.answer(bank, [(0, Question("q", "t", text, ""))], "always", first=n)[0]
        assert details.trace[n] == alone.trace


def test_a_run_that_was_interrupted_asks_nothing_twice_and_ends_with_the_same_bytes(folder, tmp_path, monkeypatch):
    file = sheet(tmp_path)
    whole = answer_table(file, tmp_path / "whole", "M", folder)
    real, asked = respond._answer, []

    def stops(job):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(job[1].number)
        return real(job)

    monkeypatch.setattr(respond, "_answer", stops)
    with pytest.raises(KeyboardInterrupt):
        answer_table(file, tmp_path / "parts", "M", folder)
    journal = tmp_path / "parts/M/M_MMStar.jsonl"
    with journal.open("ab") as lines:
        lines.write(b'{"shard": 2, "rows": [{"ind')  # the power failed here
    monkeypatch.setattr(respond, "_answer", lambda job: asked.append(job[1].number) or real(job))
    found = answer_table(file, tmp_path / "parts", "M", folder)
    assert asked == [0, 1, 2], "each shard once"
    assert found.table.read_bytes() == whole.table.read_bytes()
    again = answer_table(file, tmp_path / "parts", "M", folder, form="xlsx")
    assert asked == [0, 1, 2], "another format needs no further answers"
    assert again.table.suffix == ".xlsx"


@pytest.mark.slow
def test_sigkill_at_any_moment_is_survived(workspace, tmp_path):
    file = sheet(tmp_path, count=40)
    command = [sys.executable, "-m", "clear", "answer", str(file), "--model", "model", "--prompt", "plain"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(tmp_path / "whole")], cwd=workspace, env=environment, check=True)
    journal = tmp_path / "parts/model/model_MMStar.jsonl"
    for lines in (2, 5, 8):
        process = subprocess.Popen([*command, "--out", str(tmp_path / "parts")], cwd=workspace, env=environment)
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") >= lines):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run([*command, "--out", str(tmp_path / "parts")], cwd=workspace, env=environment, check=True)
    name = "model/model_MMStar.tsv"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    shards = [json.loads(line).get("shard") for line in journal.read_text().splitlines()]
    assert shards == [None, *range(10)]


def test_a_journal_of_something_else_is_refused(folder, tmp_path):
    file = sheet(tmp_path, count=4)
    answer_table(file, tmp_path, "M", folder)
    for other, style in ((replace(folder, restore="never"), "vlmeval"), (folder, "plain")):
        with pytest.raises(ClearError, match=r"M_MMStar\.jsonl: answers to another table"):
            answer_table(file, tmp_path, "M", other, style)
    sheet(tmp_path, count=5)
    with pytest.raises(ClearError, match="answers to another table"):
        answer_table(file, tmp_path, "M", folder)
    journal = tmp_path / "M/M_MMStar.jsonl"
    journal.write_bytes(journal.read_bytes().split(b"\n")[0] + b'\n{"shard": 0}\n')
    with pytest.raises(ClearError, match="answers to another table"):  # the table differs: said first
        answer_table(file, tmp_path, "M", folder)


def test_rows_that_cannot_be_answered_are_rejected_and_the_others_kept(workspace, tmp_path, clear, monkeypatch):
    good = {"image": b64(png(1)), "question": "is there a red circle ?", "answer": "yes"}
    rows = [
        {"index": 0, **good},
        {"index": 1, **good, "image": b64(b"no picture" * 20)},
        {"index": 2, **good, "question": "which elephant ?"},
        {"index": 3, **good, "image": "77"},
        {"index": 4, **good, "question": " "},
        {"index": 5, **good},
    ]
    file = write_tsv(tmp_path / "MMStar.tsv", rows)
    monkeypatch.chdir(workspace)
    status, out, said = clear("answer", file, "--out", tmp_path / "out", "--model", "model", "--prompt", "plain")
    assert status == 1 and "4 rows have no prediction" in said.splitlines()[-1]
    table = tmp_path / "out/model/model_MMStar.tsv"
    assert out.splitlines()[-1] == str(table)
    assert pd.read_csv(table, sep="\t")["index"].tolist() == [0, 5]
    rejects = {reject.id: reject.reason for reject in read_rejects(tmp_path / "out/model/model_MMStar_rejects.parquet")}
    assert rejects == {
        "MMStar-1": "image",
        "MMStar-2": "question",
        "MMStar-3": "no image",
        "MMStar-4": "question",
    }


def test_a_table_without_answers_is_answered_and_scoring_says_why_not(workspace, tmp_path, clear, monkeypatch):
    rows = [{"index": n, "image": b64(png(n)), "question": "is there a red circle ?"} for n in range(2)]
    file = write_tsv(tmp_path / "MMStar.tsv", rows)
    monkeypatch.chdir(workspace)
    assert clear("answer", file, "--out", tmp_path, "--model", "model", "--prompt", "plain")[0] == 0
    status, _, said = clear("score", tmp_path / "model/model_MMStar.tsv")
    assert status == 1 and "no column 'answer'" in said


def test_xlsx_holds_text_as_text_and_what_it_cannot_hold_is_rejected(tmp_path):
    texts = ["=1+1", "007", "x" * 40_000, "bell \x07", "None"]
    file = sheet(tmp_path, count=5)
    found = answer_table(file, tmp_path, "M", Says(lambda index: texts[int(index)]), form="xlsx")
    rows = list(openpyxl.load_workbook(found.table).active.values)
    assert rows[0] == ("index", "question", "answer", "category", "prediction")
    assert [(row[0], row[-1]) for row in rows[1:]] == [(0, "=1+1"), (1, "007"), (4, "None")]
    assert [(r.id, r.reason) for r in found.rejects] == [("MMStar-2", "xlsx"), ("MMStar-3", "xlsx")]


@pytest.mark.parametrize("form", ["tsv", "xlsx"])
def test_an_index_comes_back_as_it_was(tmp_path, form):
    """A sheet would make 7 of 007, another row's index, and keeps fifteen digits."""
    indices = ["0", "7", "007", "1" * 15, "1" * 16]
    rows = [{"index": index, "image": b64(png(0)), "question": "?", "answer": "x"} for index in indices]
    file = write_tsv(tmp_path / "MMStar.tsv", rows)
    found = answer_table(file, tmp_path / "out", "M", Says(str), form=form)
    assert collect.read([found.table])["index"].tolist() == indices


def test_a_picture_beside_the_table_that_changed_is_another_table(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    file = write_tsv(tmp_path / "MMStar.tsv", [{"index": 1, "image_path": "a.png", "question": "?", "answer": "x"}])
    answer_table(file, tmp_path / "out", "M", Says(str))
    answer_table(file, tmp_path / "out", "M", Says(str))
    (tmp_path / "a.png").write_bytes(png(1))
    with pytest.raises(ClearError, match="answers to another table"):
        answer_table(file, tmp_path / "out", "M", Says(str))


def test_shards_follow_the_table_whatever_its_length():
    rows = [Asked(str(n), "", b"") for n in range(7)]
    found = list(shards_of(rows, 3))
    assert [(s.number, s.first, len(s.rows)) for s in found] == [(0, 0, 3), (1, 3, 3), (2, 6, 1)]
    assert list(shards_of([], 3)) == []


# --- an endpoint that answers ---------------------------------------------------------------------------------------


def _by_text(body: dict, number: int):
    said = user_text(body)
    return 200, {}, completion(f"<think> hm </think> <answer> to {said} </answer>")


def test_an_endpoint_answers_and_is_asked_once(tmp_path):
    file = sheet(tmp_path)
    with chatting(_by_text) as server, connect(settings(server.url), "teacher", tmp_path / "r.sqlite", 0.01) as client:
        found = answer_table(file, tmp_path, "M", Served(client, 4))
        table = pd.read_csv(found.table, sep="\t")
        assert (table.prediction == "to " + table.question).all()
        details = pd.read_parquet(found.table.with_suffix(".parquet"))
        assert details.restored.isna().all() and details.trace[0].startswith("<think>")
        asked = len(server.bodies)
        (tmp_path / "M/M_MMStar.jsonl").unlink()
        answer_table(file, tmp_path, "M", Served(client, 4))
        assert len(server.bodies) == asked, "the replies are kept, too"
        assert collect.read([found.table])["restored"].isna().all(), "the server does not say"
        sent = {body["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2] for body in server.bodies}
        assert sent == {b64(png(n)) for n in range(10) if n % 3 != 2}, "in whichever order they arrived"


def test_an_outage_is_asked_again_by_the_next_run(tmp_path):
    file, down = sheet(tmp_path, count=6), [True]

    def answer(body, number):
        if down[0] and "how many" in user_text(body):
            return 503, {}, {}
        return _by_text(body, number)

    with chatting(answer) as server:
        how = settings(server.url, retries=0)
        with connect(how, "teacher", tmp_path / "r.sqlite", 0.01) as client:
            first = answer_table(file, tmp_path, "M", Served(client, 3))
            assert {reject.reason for reject in first.rejects} == {"outage"} and first.rows == 4
            down[0] = False
            before = len(server.bodies)
            second = answer_table(file, tmp_path, "M", Served(client, 3))
            assert second.rows == 6 and not second.rejects and len(server.bodies) == before + 2
            assert not (tmp_path / "M/M_MMStar_rejects.parquet").exists()


def test_an_endpoint_that_is_down_or_wrong_is_one_line(workspace, tmp_path, clear, monkeypatch):
    monkeypatch.chdir(workspace)
    file = sheet(tmp_path, count=2)
    with chatting(lambda body, number: (401, {}, {"error": "no key"})) as server:
        with pytest.raises(Denied), connect(settings(server.url), "teacher", tmp_path / "r.sqlite", 0.01) as client:
            answer_table(file, tmp_path, "M", Served(client))
        status, _, said = clear("answer", file, "--out", tmp_path / "two", "--endpoint", server.url, "--name", "M")
        assert status == 1 and "answers 401" in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either --model FOLDER or --endpoint URL"),
        (["--endpoint", "http://x/v1"], "--endpoint needs --name"),
        (["--model", "nothing"], "nothing: no model here"),
        (["--model", "model", "--format", "csv"], "--format csv: choose one of tsv, xlsx"),
        (["--model", "model", "--prompt", "none"], "--prompt none: choose one of vlmeval, plain"),
    ],
)
def test_misuse_is_one_line(workspace, tmp_path, clear, monkeypatch, arguments, said):
    monkeypatch.chdir(workspace)
    status, _, told = clear("answer", sheet(tmp_path, count=1), "--out", tmp_path, *arguments)
    assert status == 1 and said in told and told.count("\n") == 1


# --- the three commands ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_degrade_answer_score(workspace, tmp_path, clear, monkeypatch):
    """`clear mmd-bench`, `clear answer` by a folder and by a server, `clear score`: a table at the end."""
    rows = []
    for sample in scenes("bench", 4, 3, 256, 2):
        for question in sample.questions[:2]:
            rows.append(
                {
                    "index": len(rows),
                    "image": b64(sample.image),
                    "question": question.text,
                    "answer": question.answer,
                }
            )
    write_tsv(tmp_path / "LMUData/MMStar.tsv", rows)
    monkeypatch.chdir(workspace)
    made = clear("mmd-bench", "--source", tmp_path / "LMUData", "--out", tmp_path / "mmd", "--workers", "1")
    assert made[0] == 0, made[2]
    files = [tmp_path / "LMUData/MMStar.tsv", *sorted((tmp_path / "mmd").glob("MMStar_*.tsv"))]
    status, out, said = clear(
        "answer", *files, "--out", tmp_path / "out", "--model", "model", "--name", "CLEAR", "--prompt", "plain"
    )
    assert status == 0, said
    tables = sorted((tmp_path / "out/CLEAR").glob("*.tsv"))
    assert [table.name for table in tables] == [
        "CLEAR_MMStar.tsv",
        *(f"CLEAR_MMStar_LOW_LEVEL_{level}.tsv" for level in ("HIGH", "LOW", "MID")),
    ]
    status, table, said = clear("score", *tables)
    assert status == 0 and "MMStar" in table, said
    with serving(workspace) as server:
        arguments = ["--endpoint", f"{server.url}/v1", "--name", "model", "--prompt", "plain"]
        status, _, said = clear("answer", files[0], "--out", tmp_path / "served", *arguments)
    assert status in (0, 1), said
    served = pd.read_parquet(tmp_path / "served/model/model_MMStar.parquet")
    local = pd.read_parquet(tmp_path / "out/CLEAR/CLEAR_MMStar.parquet").set_index("index")
    for _, row in served.iterrows():
        assert row.prediction == local.prediction[row["index"]]


def test_an_endpoint_that_nobody_listens_at_is_one_line_with_every_row_accounted_for(
    workspace, tmp_path, clear, monkeypatch
):
    shutil.copy(workspace / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    text = Path("params.yaml").read_text()
    teacher = text.index("teacher:")
    Path("params.yaml").write_text(text[:teacher] + re.sub(r"retries: \d+", "retries: 0", text[teacher:], count=1))
    with socket.socket() as taken:  # bound and not listening: whoever connects is turned away
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        status, _, said = clear("answer", sheet(tmp_path, count=3), "--out", "out", "--endpoint", url, "--name", "a/b")
    last = said.splitlines()[-1]
    assert status == 1 and last.startswith("error: 3 rows have no prediction") and "outage" in last
    assert "Traceback" not in said
    assert [reject.reason for reject in read_rejects(tmp_path / "out/a_b/a_b_MMStar_rejects.parquet")] == ["outage"] * 3
