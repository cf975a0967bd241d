"""`clear ask` and `clear answer`: what cannot be done is refused in one line before a model or a server is asked."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from clear.serve.protocol import parse
from tests.chat_server import completion, user_text
from tests.chat_server import serving as chatting
from tests.helpers.tables import b64, png, write_tsv
from tests.serving import QUESTION, make_workspace, picture


@pytest.fixture(scope="module")
def _workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("use")
    make_workspace(folder, "sampling.max_think_tokens=3")
    (folder / "p.png").write_bytes(picture())
    rows = [{"index": n, "image": b64(png(n)), "question": QUESTION, "answer": "red"} for n in range(3)]
    write_tsv(folder / "MMStar.tsv", rows)
    return folder


@pytest.fixture
def here(_workspace, tmp_path, monkeypatch) -> Path:
    """A workspace with a model, a picture `p.png` and a table `MMStar.tsv`; the working directory."""
    folder = Path(shutil.copytree(_workspace, tmp_path / "here"))
    monkeypatch.chdir(folder)
    return folder


def refused(clear, *arguments) -> str:
    status, out, said = clear(*arguments)
    assert status == 1 and not out and said.startswith("error: ") and said.count("\n") == 1, said
    return said


# --- ask --save -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("save", "said"),
    [
        ("folder", r"--save folder: is a folder; name a file in it, such as folder/restored\.png"),
        ("", r"--save \.: is a folder; name a file in it, such as restored\.png"),
        ("p.png/sub/r.png", r"--save p\.png/sub/r\.png: p\.png is a file and not a folder"),
        ("folder/..", r"is a folder; name a file"),
    ],
)
def test_a_place_that_no_picture_can_be_saved_to_is_refused_before_the_model_is_loaded(here, clear, save, said):
    Path("folder").mkdir()
    shutil.rmtree("model")
    Path("model").mkdir()
    assert re.search(said, refused(clear, "ask", "p.png", QUESTION, "--model", "model", "--save", save))


def test_an_answer_is_said_also_where_its_picture_cannot_be_written(here, clear, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clear.data.images.encode_image", full)
    arguments = ["ask", "p.png", QUESTION, "--model", "model", "--save", "new/r.png", "--restore", "always"]
    status, out, said = clear(*arguments)
    assert status == 1 and "<think>" in out and "restored: yes" in out and "answer: " in out
    assert "No space left on device" in said and not Path("new/r.png").exists()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert clear(*arguments)[0] == 0 and Path("new/r.png").is_file()


# --- who answers ----------------------------------------------------------------------------------------------------


def answering(url: str, *more: str) -> list[str]:
    arguments = ["answer", "MMStar.tsv", "--endpoint", url, "--name", "M", "--prompt", "plain"]
    return [*arguments, *more, *([] if "--out" in more else ["--out", "out"])]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--base", "model"], "--base model: an endpoint has its own; leave it out"),
        (["--cluster", "tcp://x:1"], "--cluster tcp://x:1: an endpoint answers where it is; leave it out"),
        (["--restore", "maybe"], "--restore maybe: choose one of auto, always, never, plain"),
    ],
)
def test_an_endpoint_takes_no_option_of_a_folder(here, clear, options, said):
    assert said in refused(clear, *answering("http://127.0.0.1:9/v1", *options)) and not Path("out").exists()


def test_a_folder_takes_no_key(here, clear, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "x")
    arguments = ["answer", "MMStar.tsv", "--out", "out", "--model", "model", "--prompt", "plain"]
    said = refused(clear, *arguments, "--key-from", "SOME_KEY")
    assert "--key-from SOME_KEY: a model folder takes no key; leave it out" in said and not Path("out").exists()


def _with_wish(body: dict, number: int):
    return 200, {}, completion(f"{user_text(body)} {json.dumps(body.get('clear'))}")


def test_a_wish_is_sent_as_clear_serve_reads_it_and_replies_to_different_ones_are_kept_apart(here, clear):
    def predictions(name: str, *options: str) -> set[str]:
        assert clear(*answering(server.url, "--out", name, *options))[0] == 0
        return set(pd.read_csv(f"{name}/M/M_MMStar.tsv", sep="\t").prediction)

    with chatting(_with_wish) as server:
        assert predictions("out") == {f"{QUESTION} null"}
        assert not any("clear" in body for body in server.bodies), "a server of others may refuse the field"
        for options, wish in (
            (["--restore", "always"], {"restore": "always"}),
            (["--restore", "auto"], {"restore": "auto"}),  # the server's own default may be another
            (["--restore", "never", "--feedback", "reencode"], {"restore": "never", "feedback": "reencode"}),
        ):
            assert "answers to another table" in clear(*answering(server.url, *options))[2]
            shutil.copytree("out", "again", dirs_exist_ok=True)
            shutil.rmtree("again/M")  # the replies are those of other wishes
            assert predictions("again", *options) == {f"{QUESTION} {json.dumps(wish)}"}
            read = parse(json.dumps(server.bodies[-1]).encode()).clear
            assert read.model_dump(exclude_defaults=True) == wish
        asked = len(server.bodies)
        predictions("again", "--restore", "never", "--feedback", "reencode")
        assert len(server.bodies) == asked == 12


def test_what_was_answered_without_a_wish_is_still_valid(here, clear):
    """The journal's first line and the hash of a request, as they were before there were wishes."""
    with chatting(_with_wish) as server:
        assert clear(*answering(server.url))[0] == 0
    state = json.loads(Path("out/M/M_MMStar.jsonl").read_text().splitlines()[0])["state"]
    assert state["by"].keys() == {"model", "temperature", "max_tokens"}
    assert (state["by"]["model"], state["by"]["temperature"]) == ("M", 0.0)
    assert all(body.keys() == {"model", "messages", "temperature", "max_tokens"} for body in server.bodies)


# --- tables and names -----------------------------------------------------------------------------------------------


def _as(frame: pd.DataFrame, file: Path) -> Path:
    if file.suffix == ".json":
        frame.to_json(file, orient="records")
    else:
        {".parquet": frame.to_parquet, ".xlsx": frame.to_excel, ".csv": frame.to_csv}[file.suffix](file, index=False)
    return file


@pytest.mark.parametrize("suffix", [".parquet", ".json", ".xlsx"])
def test_a_picture_of_another_row_is_refused_where_rows_cannot_be_found(here, clear, suffix):
    """Before another table is answered, and without a journal. A table whose rows hold their own pictures is answered,
    and so is CSV."""
    rows = [{"index": n, "image": b64(png(0)), "question": QUESTION, "answer": "red"} for n in range(2)]
    frame = pd.DataFrame(rows)
    arguments = ["--out", "out", "--model", "model", "--prompt", "plain"]
    assert clear("answer", _as(frame, Path(f"Own{suffix}")), *arguments)[0] == 0
    shutil.rmtree("out")
    frame.loc[1, "image"] = "0"
    said = refused(clear, "answer", "MMStar.tsv", _as(frame, Path(f"Shared{suffix}")), *arguments)
    assert f"Shared{suffix}: row 2 names the picture of another row (image = '0')" in said
    assert "write the table as TSV" in said and not Path("out").exists()
    assert clear("answer", _as(frame, Path("Shared.csv")), *arguments)[0] == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a\nb.tsv", r"a\\nb\.tsv: the name has a line break or another character"),
        ("a\u2028b.tsv", r"the name has a line break or another character"),
        ("a\udcff.tsv", r"a\\xff\.tsv: the name is not UTF-8"),
    ],
)
def test_what_is_wrong_with_the_name_of_a_table_is_said(here, clear, name, said):
    Path("MMStar.tsv").rename(name)
    assert re.search(said, refused(clear, "answer", name, "--out", "out", "--model", "model"))


@pytest.mark.parametrize("name", ["a\nb", " ", "a ", "\x1b[2J", "a\udcff"])
@pytest.mark.parametrize("who", [["--model", "model"], ["--endpoint", "http://127.0.0.1:9/v1"]])
def test_a_name_after_which_no_folder_should_be_called_is_refused(here, clear, name, who):
    said = refused(clear, "answer", "MMStar.tsv", "--out", "out", *who, "--name", name)
    assert f"--name {name!r}: files are called after it" in said and not Path("out").exists()


def test_a_folder_with_such_a_name_needs_another_one(here, clear):
    Path("model").rename("a\nb")
    arguments = ["answer", "MMStar.tsv", "--out", "out", "--model", "a\nb", "--prompt", "plain"]
    assert "--name 'a\\nb': files are called after it" in refused(clear, *arguments)
    assert clear(*arguments, "--name", "a b")[0] == 0 and Path("out/a b/a b_MMStar.tsv").is_file()
