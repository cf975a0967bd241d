"""What nobody may do through data or parameters: run code, read a secret. Text is in test_untrusted_text.py.

Who is trusted with what, and what follows where one of them lies, is in docs/THREATS.md.
"""

import ast
import json
import re
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clear.config import compose, load
from clear.data.images import encode_image
from clear.errors import ClearError, fail, say, without_secrets
from clear.project.compare import comment
from clear.project.retrain import request
from clear.project.scratch import write_params
from infra import remote
from infra import secrets as secret_forms
from tests.chat_server import completion, serving
from tests.conftest import ROOT, git
from tests.helpers.secrets import VARIABLES, leaks, marker, origin, planted
from tests.helpers.tables import b64, write_tsv

FOLDERS = ("clear", "flows", "infra", "plugins")

# --- nothing from data or parameters becomes code -------------------------------------------------------------------

PICKLES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle")
CODE = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pty.spawn"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "runpy.run_path", "runpy.run_module"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "pandas.read_pickle", "torch.jit.load"),
    *("hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_method", "hydra.utils.get_class"),
    *("omegaconf.OmegaConf.register_new_resolver", "jinja2.Template", "torch.serialization.safe_globals"),
}
"""Calls that make text into code."""
METHODS = ("exec_module", "to_pickle", "query", "extractall", "unpack_archive")
"""Methods that do so whatever they belong to, or that write where an archive tells them to."""
SHELLS = ("sh", "bash", "/bin/sh", "/bin/bash")
ALLOWED = {
    "clear/cli/pipeline.py importlib.import_module": "the names are those of STAGES, and of no file or parameter",
    "clear/data/pool.py multiprocessing.reduction.ForkingPickler.loads": "to a child of its own, through a pipe",
    "clear/degradation/registry.py exec_module": "plugins: files below plugins/ that params name, code like any other",
    "clear/interruption.py exec": "of nothing, for what Python does after it",
    "clear/training/loop/saved.py torch.serialization.safe_globals": "arrays of numpy, in states this code wrote",
    "flows/batch/worker.py sh": "a stage's command, of the commit whose code is run; DVC hands it to a shell as well",
}
"""`<file> <what>` → why it may."""


def _names(nodes: list[ast.AST]) -> dict[str, str]:
    """What a name of a module stands for, by its imports: `np` → numpy, `system` → os.system."""
    found = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.asname or name.name.split(".")[0]: name.name for name in node.names if name.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    return found


def _risky(node: ast.AST, names: dict[str, str]) -> str:
    """How a node makes code of something, "" if it does not."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        modules = [name.name for name in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        return next((f"import {name}" for name in modules if name.split(".")[0] in PICKLES), "")
    if isinstance(node, ast.List | ast.Tuple):
        first = node.elts[0] if node.elts else None
        return first.value if isinstance(first, ast.Constant) and first.value in SHELLS else ""
    if not isinstance(node, ast.Call):
        return ""
    first, *rest = _dotted(node.func).split(".")
    called = ".".join([names.get(first, first), *rest])
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called == "torch.load":
        return "" if given.get("weights_only") == "True" else called
    if called in ("yaml.load", "yaml.load_all") and given.get("Loader") in ("yaml.SafeLoader", "yaml.CSafeLoader"):
        return ""
    if called == "importlib.import_module":
        return "" if node.args and isinstance(node.args[0], ast.Constant) else called
    if called == "jinja2.Environment":
        return "" if given.get("autoescape") == "True" else called
    told = [name for name in ("shell", "allow_pickle", "trust_remote_code") if given.get(name, "False") != "False"]
    if told or called in CODE or called.startswith("os.spawn") or called.endswith("Pickler.loads"):
        return " ".join([called, *told])
    return rest[-1] if rest and rest[-1] in METHODS else ""


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of a call's function; what is no name is a question mark."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


@cache
def _nodes(file: Path) -> list[ast.AST]:
    """What could make code or print: imports, calls, lists of words."""
    kinds = ast.Import | ast.ImportFrom | ast.Call | ast.List | ast.Tuple
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds)]


def _sources(root: Path) -> list[Path]:
    return [file for folder in FOLDERS for file in sorted((root / folder).rglob("*.py"))]


def _code_from_text(root: Path) -> set[str]:
    found = set()
    for file in _sources(root):
        names = _names(_nodes(file))
        told = (_risky(node, names) for node in _nodes(file))
        found |= {f"{file.relative_to(root)} {what}" for what in told if what}
    return found


def test_no_data_and_no_parameter_becomes_code():
    assert _code_from_text(ROOT) == set(ALLOWED), "make it data, or say in ALLOWED why it cannot be anybody else's"
    assert "torch.load" in (ROOT / "clear/training/loop/saved.py").read_text(), "there is something to look at"


BAD = """
eval(x); exec(x); __import__(x); compile(x, x, x)
from os import system as s; s(x)
import os as o; o.popen(x)
import subprocess as sp; sp.run(x, shell=True); sp.run(['sh', '-c', x]); sp.getoutput(x)
import yaml; yaml.load(x, L)
from yaml import unsafe_load; unsafe_load(x)
import numpy as np; np.load(x, allow_pickle=True)
import torch; torch.load(x); torch.load(x, weights_only=False)
import pandas as pd; pd.read_pickle(x); frame.query(x)
import pickle; import joblib.numpy_pickle
from multiprocessing.reduction import ForkingPickler; ForkingPickler.loads(x)
import importlib; importlib.import_module(x); spec.loader.exec_module(x)
from hydra.utils import instantiate; instantiate(x)
import jinja2; jinja2.Environment(); jinja2.Template(x)
model.from_pretrained(x, trust_remote_code=True)
archive.extractall(x)
"""
GOOD = """
import re, yaml, torch, subprocess, importlib, jinja2, numpy as np
model.eval(); re.compile(x); yaml.safe_load(x); yaml.load(x, Loader=yaml.CSafeLoader);
torch.load(x, weights_only=True); subprocess.run([x], shell=False)
importlib.import_module('clear.bench'); jinja2.Environment(autoescape=True); np.load(x, allow_pickle=False)
"""


def test_whatever_makes_code_of_text_is_found(tmp_path):
    (tmp_path / "clear").mkdir()
    statements = [part for line in BAD.strip().splitlines() for part in line.split("; ")]
    imports = "\n".join(part for part in statements if re.match("(import|from) (?!pickle|joblib)", part))
    calls = [part for part in statements if not re.match("(import|from) (?!pickle|joblib)", part)]
    for number, call in enumerate(calls):
        (tmp_path / f"clear/bad{number}.py").write_text(f"{imports}\n{call}\n")
    (tmp_path / "clear/good.py").write_text(GOOD)
    assert {place.split()[0] for place in _code_from_text(tmp_path)} == {f"clear/bad{n}.py" for n in range(len(calls))}


@pytest.mark.parametrize("value", ["${oc.env:AWS_SECRET_ACCESS_KEY}", "${hydra:runtime.cwd}"])
def test_a_parameter_copies_nothing_from_the_environment(value, tmp_path):
    """Composed, the secret itself would be in params.yaml, which is in git."""
    with pytest.raises(ClearError, match=r"would copy something from outside into a tracked file"):
        compose(["profile=smoke", f"teacher.model='{value}'"])
    write_params(tmp_path / "params.yaml", ["profile=smoke", "teacher.model=here"])
    text = (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("model: here", f'model: "{value}"'))
    with pytest.raises(ClearError, match=r"params\.yaml: \$\{.*would copy something from outside"):
        load(tmp_path / "params.yaml")


# --- no secret is kept or shown -------------------------------------------------------------------------------------


def _asked_of_the_environment() -> set[str]:
    """Names of variables that the code reads: os.environ.get(…), os.environ[…]."""
    read = re.compile(r'environ(?:\.get)?[(\[]\s*"(\w+)"')
    return {name for file in _sources(ROOT) for name in read.findall(file.read_text())}


def test_every_variable_with_a_secret_is_planted_by_the_tests():
    read = _asked_of_the_environment()
    assert {"GITHUB_TOKEN", "CLEAR_HOME"} <= read, "there is something to look at"
    words = "KEY", "TOKEN", "SECRET", "PASS", "AUTH", "WEBHOOK", "CREDENTIAL"
    assert {name for name in read if any(word in name for word in words)} <= set(VARIABLES)


def test_an_error_a_line_and_a_log_hold_no_secret(monkeypatch, capsys):
    for name, value in planted().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-short")  # 8 characters are enough
    everything = " ".join([*planted().values(), origin(), "http://me:pw@host/v1", "sk-short"])
    for text in (str(ClearError(everything)), without_secrets(everything), repr(ClearError(everything))):
        assert leaks(Path("/nonexistent"), [text]) == [] and "pw@" not in text and "sk-short" not in text
    assert fail(ClearError(everything)) == 1
    say(everything)
    assert leaks(Path("/nonexistent"), capsys.readouterr()) == []
    for text in ("git@host:a/b", "a@b.org", "s3://bucket/a@b", "https://host/@you"):
        assert without_secrets(text) == text
    monkeypatch.setenv("ONE_KEY", "1234567")
    assert without_secrets("1234567") == "1234567", "so short a value may be any word"


@settings(max_examples=50)
@given(st.from_regex(r"[^\s/]{1,40}", fullmatch=True))
@example("user:p@:w?#")
def test_what_stands_before_the_at_of_a_url_is_hidden(user):
    assert without_secrets(f"to https://{user}@host/x") == "to https://***@host/x"


class _Echo(BaseHTTPRequestHandler):
    """Refuses everything and repeats all headers in what it says, as badly made services do."""

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        told = json.dumps({"message": dict(self.headers), "error": {"code": dict(self.headers)}})
        data = f"<Error><Code>AccessDenied</Code><Message>{told}</Message></Error>".encode()
        self.send_response(403)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_PATCH = _refuse

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module")
def echo():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Echo) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def secrets(monkeypatch, tmp_path):
    """Every secret in the environment, an empty ~/.aws, and a project with a token in the address of its remote."""
    for name, value in planted().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    folder = tmp_path / "project"
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc/config").write_text("")
    write_params(folder / "params.yaml", ["profile=smoke", "teacher.retries=0", "judge.retries=0"])
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "params.yaml")
    git(folder, "commit", "-qm", "a project")
    git(folder, "remote", "add", "origin", origin())
    monkeypatch.chdir(folder)
    return folder


def test_a_model_behind_an_endpoint_gets_its_key_and_nothing_else_does(secrets, clear, tmp_path):
    """Tables, journals, rejects, the ledger of replies and messages, of a server that answers, refuses and denies."""

    def answers(body: dict, number: int) -> tuple[int, dict, object]:
        told = {"error": {"message": f"Incorrect API key provided: {server.keys[number]}"}}
        return [(200, {}, completion("A")), (400, {}, told), (401, {}, told)][min(number, 2)]

    cells = {"A": "x", "B": "y", "answer": "A"}
    rows = [
        {"index": n, "image": b64(encode_image(np.full((8, 8, 3), n, np.uint8))), "question": f"Which {n}?", **cells}
        for n in range(3)
    ]
    file = write_tsv(tmp_path / "MMStar.tsv", rows)
    asked = "answer", file, "--name", "M", "--out", secrets / "out", "--key-from", "CLEAR_TEACHER_KEY"
    with serving(answers) as server:
        told = clear(*asked, "--endpoint", server.url)
        assert told[0] == 1 and f"Bearer {marker('CLEAR_TEACHER_KEY')}" in server.keys
        again = clear(*asked, "--endpoint", server.url.replace("//", f"//{marker('origin')}:x@"), "--format", "xlsx")
    assert again[0] == 1 and "***" in told[2] + again[2]
    assert list((secrets / "out").rglob("*.jsonl")) and list((secrets / "out").rglob("*.sqlite"))
    assert leaks(secrets, [*told[1:], *again[1:]], [secrets / ".git/config"]) == []


def test_a_store_and_a_forge_that_repeat_what_they_are_sent_tell_nobody(secrets, echo, capsys, monkeypatch, tmp_path):
    assert remote.main(["bucket/prefix", echo]) == 1
    monkeypatch.setenv("GITHUB_API_URL", echo)
    monkeypatch.setenv("GITHUB_REPOSITORY", "owner/name")
    with pytest.raises(ClearError) as refused:
        request.propose(secrets, "retrain/x", "main", "title", "text")
    monkeypatch.delenv("GITHUB_REPOSITORY")
    git(secrets, "remote", "set-url", "origin", origin().replace("/owner/name.git", ""))
    with pytest.raises(ClearError, match="no repository of a forge can be read from it") as unread:
        request.repository(secrets)
    given = ["--repository", "a/b", "--number", "1", "--commit", "c", "--run-url", "u", "--report", "none"]
    assert comment.main(given) == 1
    told = [str(refused.value), str(unread.value), *capsys.readouterr()]
    assert "403" in told[0] and all("***" in text for text in (*told[:2], told[3])), told
    assert leaks(secrets, told, [secrets / ".git/config"]) == []


def test_git_says_its_remote_without_the_token(secrets):
    """`git remote -v` shows it; what this project asks git to do does not."""
    git(secrets, "branch", "retrain/x")
    with pytest.raises(ClearError, match=r"git push .* failed: .*127\.0\.0\.1") as refused:
        request.publish(secrets, "retrain/x", "main", "title", "text", lambda line: None)
    assert leaks(secrets, [str(refused.value)], [secrets / ".git/config"]) == []


def test_the_search_for_secrets_finds_them(tmp_path):
    """In a text, a commit that was made and undone, a table's cell, a database and a workbook."""
    import pandas as pd
    from openpyxl import Workbook

    from clear.llm.ledger import ReplyStore

    (tmp_path / "a.log").write_text(f"x{marker('HF_TOKEN')}")
    pd.DataFrame({"a": [marker("GITHUB_TOKEN")]}).to_parquet(tmp_path / "b.parquet", compression="zstd")
    store = ReplyStore(tmp_path / "c.sqlite")
    ticket, _ = store.reserve("k", 0.0, 1.0)
    store.settle(ticket, 0.0, "k", (marker("PREFECT_API_KEY"), 1, 1, False))
    store.close()
    book = Workbook()
    book.active.append([marker("WANDB_API_KEY")])
    book.save(tmp_path / "d.xlsx")
    repository = tmp_path / "e"
    repository.mkdir()
    git(repository, "init", "-q", "-b", "main")
    (repository / "f").write_text(marker("origin"))
    git(repository, "add", "f")
    git(repository, "commit", "-qm", "one")
    git(repository, "rm", "-q", "f")
    git(repository, "commit", "-qm", "two")
    found = leaks(tmp_path, [marker("AWS_SESSION_TOKEN")])
    names = {line.split(": ")[1] for line in found}
    assert names >= {"HF_TOKEN", "GITHUB_TOKEN", "PREFECT_API_KEY", "WANDB_API_KEY", "origin", "AWS_SESSION_TOKEN"}


LOOK_LIKE_SECRETS = {
    "an AWS access key": "AKIA" + "Q" * 16,
    "a token of GitHub": "ghp_" + "a1" * 18,
    "a token of GitLab": "glpat-" + "a" * 20,
    "a key of OpenAI or Anthropic": "sk-ant-" + "a" * 40,
    "a token of Hugging Face": "hf_" + "a" * 34,
    "a key of Prefect": "pnu_" + "a" * 36,
    "a webhook of Slack": "https://hooks.slack" + ".com/services/T0/B0/" + "a" * 24,
    "a key of Google": "AIza" + "a" * 35,
    "a private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "a password in an address": "https://me:" + "correct-horse@host/",
}


def test_no_tracked_file_holds_what_looks_like_a_secret(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert secret_forms.main() == 0, capsys.readouterr().err
    assert secret_forms.FORMS.keys() == LOOK_LIKE_SECRETS.keys()
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    for number, text in enumerate(LOOK_LIKE_SECRETS.values()):
        (tmp_path / f"{number}.txt").write_bytes(b"\xff\x00\n" + text.encode())
    git(tmp_path, "add", ".")
    assert secret_forms.main() == 1
    said = capsys.readouterr().err.splitlines()
    assert sorted(line.partition(";")[0] for line in said) == sorted(
        f"{number}.txt:2: {kind}" for number, kind in enumerate(LOOK_LIKE_SECRETS)
    )
    assert not any(text in line for line in said for text in LOOK_LIKE_SECRETS.values())


# --- what is printed goes through one place ------------------------------------------------------------------------

SAYS = {
    "clear/__main__.py": "a constant, before anything can be imported",
    "clear/data/pool.py": "names of this project and counts",
    "clear/stages/traces.py": "counts",
    "clear/training/loop/trainer.py": "a phase's name and figures",
    "flows/pipeline.py": "a constant",
    "flows/service/deploy.py": "names of infra/prefect.yaml and of blocks, which Prefect limits to letters and dashes",
    "flows/service/local.py": "constants and a port",
    "flows/sweep.py": "a count",
    "infra/secrets.py": "places and kinds",
    "infra/plots.py": "the folder that the caller named; it runs without the package",
    "clear/data/lock.py": "a constant",
}
"""Files that print by themselves, and what: everything else goes through `say`."""


def test_everything_that_is_printed_goes_through_one_place():
    calls = {file: [node for node in _nodes(file) if isinstance(node, ast.Call)] for file in _sources(ROOT)}
    ways = "print", "typer.echo", "click.echo", "sys.stdout.write"
    printing = {str(file.relative_to(ROOT)) for file in calls if any(_dotted(c.func) in ways for c in calls[file])}
    assert printing == {"clear/errors.py", *SAYS}
