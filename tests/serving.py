"""A real `clear serve` for the tests: its own process, a small random model, a port of the system's choice."""

import base64
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import torch

from clear.config import compose, from_dict
from clear.data.images import encode_image
from clear.model.checkpoint import load_bagel
from clear.model.checkpoint.save import save_bagel
from clear.project.scratch import write_params
from clear.schema import Config
from tests.conftest import ROOT
from tests.tiny import save_random_model

QUESTION = "which colour is the circle ?"
TOKENS = 400
"""Each reply of an endless model, at most."""


def make_workspace(folder: Path, *overrides: str, endless: bool = False) -> Config:
    """A folder with params.yaml and a random model in `model`; an `endless` one never ends a reply by itself."""
    settings = ["profile=smoke", "runtime.threads=1", "sampling.flow_steps=3", *overrides]
    folder.mkdir(parents=True, exist_ok=True)
    write_params(folder / "params.yaml", settings)
    config = from_dict(compose(settings))
    save_random_model(folder / "model", config)
    if endless:
        model, vae, tokenizer = load_bagel(folder / "model")
        with torch.no_grad():  # the end gets 0, and some other of a hundred words always more
            model.language_model.lm_head.weight[model.config.special.eos] = 0.0
        save_bagel(folder / "model", model, vae, tokenizer)
    return config


def picture(seed: int = 0, size: tuple[int, int] = (48, 48)) -> bytes:
    """A PNG of noise."""
    return encode_image(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def data_url(data: bytes) -> str:
    """A picture as clients send it."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def asking(question: str = QUESTION, image: bytes | None = None, **more) -> dict:
    """The body of a request."""
    content: list[dict] = [{"type": "text", "text": question}]
    if image is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": data_url(image)}})
    return {"model": "model", "messages": [{"role": "user", "content": content}]} | more


def saying(content: object) -> dict:
    """The body of a request whose one message has this content."""
    return asking() | {"messages": [{"role": "user", "content": content}]}


def with_url(url: str) -> dict:
    """The body of a request with a picture by its address."""
    return saying([{"type": "image_url", "image_url": {"url": url}}])


class Server:
    """A running server; `http` is a client of it, `url` its address without /v1, `log` all it has said."""

    def __init__(self, process: subprocess.Popen, log: Path, url: str, key: str) -> None:
        self.process, self.url, self._log = process, url, log
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, timeout=60, headers=headers, trust_env=False)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def ask(self, body: dict | None = None, **more) -> httpx.Response:
        """Send a chat completion."""
        return self.http.post("/v1/chat/completions", json=body if body is not None else asking(**more))

    def metric(self, name: str) -> float:
        """A value of /metrics, summed over its labels."""
        lines = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", self.http.get("/metrics").text, re.MULTILINE)
        assert lines, name
        return sum(map(float, lines))

    def wait_for(self, name: str, value: float, seconds: float = 20) -> None:
        """Wait until a metric has this value."""
        until = time.monotonic() + seconds
        while self.metric(name) != value:
            assert time.monotonic() < until, f"{name} = {self.metric(name)}"
            time.sleep(0.02)


@contextmanager
def serving(
    folder: Path, *options: str, key: str = "", environment: dict[str, str] | None = None, ready: bool = True
) -> Iterator[Server]:
    """`clear serve model` in `folder`, until the block ends."""
    log = folder / f"serve-{time.monotonic_ns()}.log"
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CLEAR_SERVE_KEY": key}
    variables |= {"CLEAR_HOME": str(folder / "home"), "PYTHONUNBUFFERED": "1"} | (environment or {})
    command = [sys.executable, "-m", "clear", "serve", "model", "--port", "0", *options]
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=variables, stdout=out, stderr=subprocess.STDOUT)
    try:
        server = Server(process, log, _until(process, log, r"(http://\S+)/v1"), key)
        if ready:
            _until(process, log, r"(ready)")
        yield server
    finally:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def patched(folder: Path, code: str) -> dict[str, str]:
    """The environment of a server that runs this code before its own; `folder` takes a file for it."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def _until(process: subprocess.Popen, log: Path, pattern: str, seconds: float = 120) -> str:
    until = time.monotonic() + seconds
    while not (found := re.search(pattern, log.read_text())):
        assert process.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.05)
    return found[1]


def events(response: httpx.Response) -> list[dict]:
    """The events of a streamed answer, which has to end as OpenAI's do."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def joined(found: Sequence[dict], field: str, choice: int = 0) -> str:
    """The pieces of a field of one choice, put together."""
    choices = [c for event in found for c in event.get("choices", ()) if c["index"] == choice]
    return "".join(c["delta"].get(field) or "" for c in choices)
