"""`clear browse`: what it lists, and the page itself in a real browser, wide, narrow and by keyboard."""

import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from unittest.mock import ANY

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from clear.bench import predictions
from clear.browse import data
from clear.browse.data import ALL, EVERY, FILTERS, GAINED, LOST, RESTORED, RIGHT, WRONG
from clear.config import compose, from_dict
from clear.data.images import encode_image
from clear.data.records import Question, Sample, sha256, write_samples
from clear.degradation.protocol import SEVERITIES, degrade
from clear.errors import ClearError
from clear.project.scratch import write_params
from clear.stages import evaluate
from tests.browser import PATIENCE, chromium
from tests.conftest import ROOT
from tests.helpers.processes import free_port, wait_until
from tests.tiny import save_random_model

SETTINGS = ["profile=smoke", "runtime.threads=1", "sampling.max_think_tokens=4", "sampling.flow_steps=2"]
TEXTS = ("which colour is the circle ?", "is there a red circle ?")
ATTACK = "<img src=x onerror='window.hit=1'> ![b](http://127.0.0.1:9/b.png) [a](javascript:window.hit=1) **b** :red[c]"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Two pictures at two levels, answered by two untrained models; of one answer a restored picture is kept."""
    folder = tmp_path_factory.mktemp("browse")
    write_params(folder / "params.yaml", SETTINGS)
    config = from_dict(compose(SETTINGS))
    generator = np.random.default_rng(0)
    clean, degraded = [], []
    for i in range(2):
        image = generator.integers(0, 256, (48, 48, 3), dtype=np.uint8)
        questions = tuple(Question(f"q{n}", "reading", text, "red") for n, text in enumerate(TEXTS))
        encoded = encode_image(image)
        sample = Sample(f"scene-{i}", "test", "bench", encoded, sha256(encoded), questions)
        clean.append(sample)
        for severity in ("low", "high"):
            shown = encode_image(degrade(image, "dark", severity, sample.id, 1.0))
            copy = {"degraded": shown, "corruption": "dark", "severity": severity, "intensity": SEVERITIES[severity]}
            degraded.append(Sample(**{**vars(sample), **copy}))
    write_samples(folder / "data/bench/clean", clean)
    write_samples(folder / "data/bench/degraded", degraded)
    for part in ("incoming", "extra"):
        write_samples(folder / "data/bench" / part, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CLEAR_HOME", str(folder / "home"))
        for model in ("base", "grpo"):
            save_random_model(folder / "data/models" / model, config)
            evaluate.run(config, model)
    rows = rows_of(folder, "base")
    for row in rows:
        if row["question"] == "q1":  # as below: both models are asked the same
            row |= {"text": f"{TEXTS[1]} {ATTACK}", "answer": ATTACK}
    predictions.write(folder / "data/predictions/base.parquet", rows)
    rows = rows_of(folder, "grpo")
    for row in rows:
        row["correct"], row["prediction"] = row["question"] == "q0", "red" if row["question"] == "q0" else ATTACK
        if row["severity"] == "high" and row["question"] == "q1":
            row |= {"restored": True, "psnr_restored": 20.5, "ssim_restored": 0.5, "restored_png": clean[0].image}
        if row["question"] == "q1":
            row |= {"text": f"{TEXTS[1]} {ATTACK}", "answer": ATTACK, "output": ATTACK}
    predictions.write(folder / "data/predictions/grpo.parquet", rows)
    return folder


def rows_of(folder, model: str) -> list[dict]:
    """The predictions of a model as they can be written again."""
    frame = predictions.read(folder / f"data/predictions/{model}.parquet").astype(object)
    return frame.where(frame.notna(), None).to_dict("records")


def test_the_lists_hold_what_their_names_say(workspace):
    frames, notes = data.load(workspace)
    assert notes == []
    assert list(frames) == ["base", "grpo"] and all(len(frame) == 12 for frame in frames.values())
    found = {show: data.select(frames, "grpo", "base", ALL, ALL, ALL, show) for show in FILTERS}
    assert len(found[EVERY]) == 12 and found[WRONG] == [key for key in found[EVERY] if key[3] == "q1"]
    assert sorted(found[WRONG] + found[RIGHT]) == found[EVERY]
    assert {key[2:] for key in found[RESTORED]} == {("high", "q1")} and len(found[RESTORED]) == 2
    base = frames["base"].correct
    assert found[GAINED] == [key for key in found[RIGHT] if not base[key]]
    assert found[LOST] == [key for key in found[WRONG] if base[key]]
    assert len(data.select(frames, "grpo", "base", "dark", "low", "reading", EVERY)) == 4
    assert data.select(frames, "grpo", "base", "clean", "low", ALL, EVERY) == []


@pytest.fixture
def page_in(monkeypatch):
    """The page of a workspace, run by Streamlit without a browser."""

    def run(folder):
        monkeypatch.chdir(folder)
        return AppTest.from_file(data.__file__.replace("data.py", "page.py"), default_timeout=60).run()

    return run


def test_what_not_every_model_was_asked_is_left_out_and_said(workspace, tmp_path, page_in):
    for model in ("base", "grpo", "sft"):
        rows = rows_of(workspace, "base" if model == "sft" else model)
        if model == "sft":  # of another benchmark, whose second picture has another question under the same key
            rows = [row | {"text": "what else ?"} if row["sample"] == "scene-1" else row for row in rows[:-1]]
        predictions.write(tmp_path / f"data/predictions/{model}.parquet", rows)
    frames, (note,) = data.load(tmp_path)
    assert {name: len(frame) for name, frame in frames.items()} == dict.fromkeys(("base", "sft", "grpo"), 6)
    for said in (
        "6 of the 12 answers of base",
        "5 of the 11 answers of SFT, restoring",
        "6 of the 12 answers of CLEAR",
    ):
        assert said in note
    page = page_in(tmp_path)
    assert [warning.value for warning in page.warning] == [note] and "make repro" in note and not page.exception
    rows = [row | {"sample": f"other-{row['sample']}"} for row in rows_of(workspace, "base")]
    predictions.write(tmp_path / "data/predictions/sft.parquet", rows)
    with pytest.raises(ClearError, match=r"base, sft, grpo share no question: .*`make repro`"):
        data.load(tmp_path)


def test_a_page_without_predictions_says_so(tmp_path, page_in):
    page = page_in(tmp_path)
    assert [error.value for error in page.error] == [ANY] and "no model was evaluated here" in page.error[0].value
    assert not page.exception


def test_a_benchmark_without_the_question_gives_no_picture(workspace, tmp_path, page_in):
    folder = shutil.copytree(workspace, tmp_path / "copy", ignore=shutil.ignore_patterns("home", "server.log"))
    for model in ("base", "grpo"):
        rows = [row | {"question": f"new-{row['question']}"} for row in rows_of(workspace, model)]
        predictions.write(folder / f"data/predictions/{model}.parquet", rows)
    rows = [row | {"restored": True, "restored_png": None} for row in rows_of(folder, "grpo")]
    predictions.write(folder / "data/predictions/grpo.parquet", rows)
    page = page_in(folder)
    assert not page.exception and any("its weights or the question" in info.value for info in page.info)


@pytest.mark.parametrize("shape", [(6000, 1), (1, 6000), (20, 30), (320, 48), (900, 700)])
def test_a_picture_is_enlarged_by_its_longer_side(tmp_path, monkeypatch, shape):
    monkeypatch.chdir(tmp_path)
    enlarged = runpy.run_path(data.__file__.replace("data.py", "page.py"))["enlarged"]
    height, width, _ = enlarged(np.zeros((*shape, 3), np.uint8)).shape
    assert (height // shape[0], height % shape[0]) == (width // shape[1], width % shape[1])
    assert max(shape) <= max(height, width) < 320 + max(shape)
    assert max(height, width) >= 320


def test_a_sample_is_found_or_said_to_be_missing(workspace, tmp_path):
    found = data.sample_of(workspace, ("scene-1", "dark", "high", "q0"))
    assert found.id == "scene-1" and found.severity == "high" and found.degraded
    assert data.sample_of(workspace, ("scene-9", "dark", "high", "q0")) is None
    assert data.sample_of(tmp_path, ("scene-1", "dark", "high", "q0")) is None


def test_a_question_asked_again_gets_the_evaluations_answer(workspace):
    models, frame = data.Models(workspace), data.load(workspace)[0]["base"]
    assert models.here() == ["base", "grpo"]
    key = ("scene-0", "dark", "high", "q1")
    sample = data.sample_of(workspace, key)
    again = models.ask("base", sample.seen, sample.questions[1], number=int(frame.number.loc[key]))
    assert again.trace == frame.output.loc[key] and again.picture is None
    first, second, other = (models.ask("grpo", sample.seen, sample.questions[0], "always", n) for n in (3, 3, 4))
    assert first.picture.shape == (48, 48, 3)
    assert np.array_equal(first.picture, second.picture) and not np.array_equal(first.picture, other.picture)
    with pytest.raises(ClearError, match="data/models/sft: no model here"):
        models.ask("sft", sample.seen, sample.questions[0])
    with pytest.raises(ClearError, match="this picture: 3 bytes are not a complete image"):
        models.ask("base", b"abc", sample.questions[0])


def _command(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CLEAR_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "clear", "browse", "--no-open", *arguments]
    return {"args": command, "cwd": folder, "env": environment, "text": True}


def test_the_development_split_is_answered_aside_and_without_the_benchmark(workspace, tmp_path, clear, monkeypatch):
    folder = shutil.copytree(workspace, tmp_path / "copy", ignore=shutil.ignore_patterns("home", "server.log"))
    (folder / "data/bench").rename(folder / "data/development")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CLEAR_HOME", str(folder / "home"))
    before = {file: file.read_bytes() for file in (folder / "data").rglob("*") if file.is_file()}
    status, stdout, stderr = clear("evaluate", "base", "--development")
    figures = folder / "home/development/smoke/base.json"
    assert status == 0 and stdout.strip() == f"figures: {figures}", stderr
    found = predictions.read(figures.with_suffix(".parquet"))
    made = predictions.read(workspace / "data/predictions/base.parquet")
    changed = ["text", "answer"]  # by the fixture
    assert found.drop(columns=changed).equals(made.drop(columns=changed)), "the same pictures, the same answers"
    assert json.loads(figures.read_text()) == json.loads((workspace / "data/metrics/evaluate_base.json").read_text())
    assert {file: file.read_bytes() for file in (folder / "data").rglob("*") if file.is_file()} == before


def test_nothing_to_show_and_a_taken_port_are_one_line(workspace, tmp_path, clear, monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("it would become the server"))
    monkeypatch.chdir(tmp_path)
    status, _, stderr = clear("browse", "--no-open")
    assert status == 1 and "no model was evaluated here" in stderr and stderr.count("\n") == 1
    monkeypatch.chdir(workspace)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, _, stderr = clear("browse", "--no-open", "--port", taken.getsockname()[1])
    assert status == 1 and "is taken; name another one with --port" in stderr and stderr.count("\n") == 1


def _answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return answer.status == 200
    return False


@pytest.fixture(scope="module")
def address(workspace):
    """The page, served as a user would."""
    port = free_port()
    with (workspace / "server.log").open("w") as log:
        server = subprocess.Popen(**_command(workspace, "--port", str(port)), stdout=log, stderr=log)
        try:
            health = f"http://127.0.0.1:{port}/_stcore/health"
            wait_until(lambda: server.poll() is not None or _answers(health), PATIENCE, "the page")
            assert server.poll() is None, (workspace / "server.log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            assert server.wait(20) is not None


@pytest.fixture
def opened(workspace, tmp_path):
    """The page as `clear browse` opens it by itself, with an assistant's folder at home; BROWSER opens nothing."""
    home = tmp_path / "home"
    (home / ".claude").mkdir(parents=True)
    port = free_port()
    command = _command(workspace, "--port", str(port))
    command["args"] = [part for part in command["args"] if part != "--no-open"]
    command["env"] |= {"HOME": str(home), "BROWSER": "true", "STREAMLIT_SERVER_HEADLESS": "false"}
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(**command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            wait_until(
                lambda: server.poll() is not None or _answers(f"http://127.0.0.1:{port}/_stcore/health"), PATIENCE, "it"
            )
            assert server.poll() is None, (tmp_path / "server.log").read_text()
            yield f"http://127.0.0.1:{port}", tmp_path / "server.log"
        finally:
            server.terminate()
            assert server.wait(20) is not None


@pytest.fixture
def page(tmp_path):
    with chromium(tmp_path / "browser") as found:
        yield found


PICTURES = "[...document.querySelectorAll('[data-testid=stImage] img')].filter(i => i.complete && i.naturalWidth)"
SPILLS = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


def _ready(page, text: str) -> None:
    """Wait until the page says `text` and its script has stopped running."""
    page.wait(f"document.body?.innerText.includes({text!r}) && !document.querySelector('[data-testid=stStatusWidget]')")


def test_a_wide_window_shows_pictures_answers_and_traces(address, page, tmp_path):
    page.open(address, 1280, 900)
    _ready(page, TEXTS[0])
    page.wait(f"{PICTURES}.length == 2")
    text = page.text()
    assert "right answer: red" in text and "dark, hard" in text and "it answered without restoring" in text
    assert "trace of CLEAR" in text and "trace of base" in text and "Question (1 to 4; CLEAR is right in 2)" in text
    tops = page.run(f"{PICTURES}.map(i => Math.round(i.getBoundingClientRect().top))")
    assert len(set(tops)) == 1, "pictures of one question stand side by side"
    assert not page.run(SPILLS)
    page.screenshot(tmp_path / "wide.png")


@pytest.mark.slow
def test_nothing_of_the_librarys_own_lies_over_the_page(opened, page, tmp_path):
    """No offer to install something, no button to deploy, no dialog; in the terminal no question."""
    address, log = opened
    page.open(address, 1280, 900)
    _ready(page, TEXTS[0])
    page.wait(f"{PICTURES}.length == 2")
    time.sleep(3)  # such offers come a moment after the page
    page.screenshot(tmp_path / "opened.png")
    over = "[data-testid=stSkillsNudge], [data-testid=stToast], [data-testid=stAppDeployButton], [role=dialog]"
    assert page.run(f"[...document.querySelectorAll({over!r})].map(e => e.innerText)") == []
    assert not re.search("install|deploy|streamlit", page.text(), re.I)
    told = log.read_text()
    assert address in told, "where the page is"
    assert not re.search("e-?mail|welcome|statistics|skills|new version", told, re.I), told


def test_the_keyboard_alone_reaches_the_next_question(address, page):
    page.open(address, 1280, 900)
    _ready(page, TEXTS[0])
    page.tab_to("e.type == 'number'")
    page.press("ArrowUp")
    page.press("Enter")
    _ready(page, TEXTS[1])
    page.wait(f"{PICTURES}.length == 3")
    assert "20.5 dB" in page.text() and "restored by CLEAR" in page.text()
    page.wait(f"document.body.innerText.split({json.dumps(ATTACK)}).length > 3")  # question, right answer, answer
    made = "img[src*='127.0.0.1:9'], img[src=x], a[href^=javascript]"
    assert page.run(f"[window.hit, document.querySelectorAll({json.dumps(made)}).length]") == [None, 0]


def test_a_phone_shows_everything_below_each_other(address, page, tmp_path):
    page.open(address, 390, 844, mobile=True)
    _ready(page, TEXTS[0])
    page.wait(f"{PICTURES}.length == 2")
    assert not page.run(SPILLS)
    lefts = page.run(f"{PICTURES}.map(i => Math.round(i.getBoundingClientRect().left))")
    tops = page.run(f"{PICTURES}.map(i => Math.round(i.getBoundingClientRect().top))")
    assert len(set(lefts)) == 1 and len(set(tops)) == 2
    page.screenshot(tmp_path / "phone.png")


@pytest.mark.slow
def test_an_own_picture_is_degraded_and_asked_about_by_keyboard(address, page, tmp_path):
    picture = tmp_path / "own.png"
    picture.write_bytes(encode_image(np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)))
    page.open(address, 1280, 900)
    _ready(page, TEXTS[0])
    page.tab_to("e.type == 'radio'")
    page.press("ArrowRight")
    _ready(page, "Choose a picture to degrade and to ask about.")
    page.choose_file("input[type=file]", picture)
    page.wait(f"{PICTURES}.length == 1")
    page.tab_to("e.role == 'combobox' && e.ariaLabel.includes('Degrade it by')")
    page.type("lens_blur")
    page.press("Enter")
    _ready(page, "lens_blur, 0.90")
    page.tab_to("e.type == 'range'")
    page.press("ArrowRight")
    _ready(page, "lens_blur, 0.95")
    page.tab_to("e.type == 'text'")
    page.type("which nonsense is this ?")
    page.press("Enter")
    _ready(page, "nonsense")
    page.run("document.activeElement.select()")
    page.type(TEXTS[0])
    page.press("Enter")
    _ready(page, "Answer:")
    assert "Traceback" not in page.text()
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:50])
    page.choose_file("input[type=file]", tmp_path / "broken.png")
    _ready(page, "broken.png: 50 bytes are not a complete image")
