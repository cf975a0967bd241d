"""`clear ask` with a real model: what cannot be asked is one line, whatever stands in it."""

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from clear.bench.vlmeval.answering import answer_table
from clear.bench.vlmeval.respond import Folder
from clear.config import load
from clear.model.checkpoint import load_bagel, save_bagel
from tests.conftest import ROOT
from tests.helpers.tables import b64, write_tsv
from tests.serving import QUESTION, Server, asking, make_workspace, picture, serving

BOMB = 50_000, 20_000
"""The sides of a picture of 10⁹ pixels."""


def header(width: int, height: int) -> bytes:
    """A PNG that states a size and holds nothing."""
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    chunk = (13).to_bytes(4, "big") + head + zlib.crc32(head).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IEND\xaeB`\x82"


@pytest.fixture(scope="module")
def _workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ask")
    make_workspace(folder, "sampling.max_think_tokens=3")
    (folder / "p.png").write_bytes(picture())
    return folder


@pytest.fixture
def here(_workspace, tmp_path, monkeypatch) -> Path:
    """A workspace with a picture `p.png` and a model of 40 positions."""
    folder = Path(shutil.copytree(_workspace, tmp_path / "here"))
    limit(folder, 40)
    monkeypatch.chdir(folder)
    return folder


def limit(folder: Path, positions: int) -> None:
    file = folder / "model/llm_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": positions}))


def refused(clear, *arguments) -> str:
    status, out, said = clear("ask", *arguments, "--model", "model")
    assert status == 1 and not out and said.startswith("error: ") and said.count("\n") == 1, said
    return said


def test_a_picture_is_not_replaced_by_its_restoration_and_an_empty_question_is_none(here, clear):
    (here / "link.png").symlink_to("p.png")
    before = (here / "p.png").read_bytes()
    for path in ("p.png", "./p.png", "link.png"):
        assert "is the picture itself; name another file" in refused(clear, "p.png", "red ?", "--save", path)
    assert (here / "p.png").read_bytes() == before
    for question in ("", "  \n"):
        assert "the question is empty" in refused(clear, "p.png", question)


def test_a_question_within_the_positions_is_answered(here, clear):
    assert clear("ask", "p.png", " ".join(["red"] * 34), "--model", "model")[0] == 0


@pytest.mark.parametrize(
    ("question", "said"),
    [
        # 2 for the markers of the text, 1 for each of the picture's two splits
        (" ".join(["red"] * 37), "takes 37 tokens and its prompt 41 positions, this model has 40"),
        ("which elephant ?", "'elephant' is not in this model's vocabulary"),
        ("какой\nцвет\u2028\U0001f418 ?", "'какой' is not in this model's vocabulary"),
        ("red \udced", "The text contains U+DCED, which is no character"),
        ("<|im_end|>", "vocabulary"),
    ],
)
def test_a_question_that_the_model_cannot_read_is_one_line(here, clear, question, said):
    assert said in refused(clear, "p.png", question)


def test_a_picture_that_is_none_is_one_line_whatever_its_name(here, clear):
    for name, data, said in (
        ("a\nb\u2028ü\U0001f418.png", b"no picture", "not a complete image"),
        ("cut.png", picture()[:-400], "not a complete image"),
        ("empty.png", b"", "not a complete image"),
        ("bomb.png", header(*BOMB), "1000000000 pixels"),
        ("page.png", b"<!DOCTYPE html><html>", "a web page"),
    ):
        Path(name).write_bytes(data)
        assert said in refused(clear, name, QUESTION)
    Path("folder.png").mkdir()
    assert "no such file" in refused(clear, "folder.png", QUESTION)


def test_a_header_of_a_thousand_million_pixels_takes_no_memory(here):
    """In a process that may not have a tenth of what the pixels would take."""
    Path("bomb.png").write_bytes(header(*BOMB))
    code = (
        "import resource, sys; from clear.data.images import decode_image; from clear.errors import ClearError\n"
        "import cv2, PIL.Image\n"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode_image(open('bomb.png', 'rb').read())\n"
        "except ClearError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 100 * 1024, "kB"


def test_a_model_without_a_tokenizer_is_one_line(here, clear):
    Path("model/tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refused(clear, "p.png", QUESTION)


def test_rows_that_are_too_long_or_too_large_are_rejected_and_the_others_answered(here):
    good = {"image": b64(picture()), "question": QUESTION, "answer": "red", "category": "é\n\U0001f418\t"}
    rows = [good, good | {"question": " ".join(["red"] * 37)}, good | {"image": b64(header(*BOMB) + b"behind" * 9)}]
    file = write_tsv(here / "MMStar.tsv", [{"index": n} | row for n, row in enumerate(rows)])
    found = answer_table(file, here / "out", "M", Folder(here / "model", load(), "plain"), "plain")
    assert found.rows == 1
    said = {reject.id: (reject.reason, reject.detail) for reject in found.rejects}
    assert said["MMStar-1"][0] == "question" and "this model has 40" in said["MMStar-1"][1]
    assert said["MMStar-2"][0] == "image" and "1000000000 pixels" in said["MMStar-2"][1]


def test_the_positions_of_a_model_survive_load_and_save(here):
    model, vae, tokenizer = load_bagel(here / "model")
    assert model.config.llm.positions == 40
    save_bagel(here / "again", model, vae, tokenizer)
    assert load_bagel(here / "again")[0].config == model.config
    assert "max_position_embeddings" in (here / "again/llm_config.json").read_text()


@pytest.mark.slow
def test_a_served_model_refuses_what_is_beyond_its_positions(here):
    server: Server
    with serving(here) as server:
        assert server.ask(asking(" ".join(["red"] * 34), picture(), max_tokens=1)).status_code == 200
        reply = server.ask(asking(" ".join(["red"] * 39), max_tokens=1))
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "context_length_exceeded"
        assert "this model has 40" in reply.json()["error"]["message"]
