"""A proxy in the environment never gets a request to this machine: with the clients that are used, in any spelling."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest
import requests
from botocore.utils import get_environ_proxies

from clear.data.ports import spare_loopback
from flows import dvc_commands, pipeline
from tests.conftest import ROOT

DEAD = "http://127.0.0.1:9"
NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"me")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def port():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def bare(monkeypatch):
    """The environment without proxies."""
    for name in (*NAMES, *map(str.upper, NAMES)):
        monkeypatch.setenv(name, "")  # so that what the tests set is taken back
        monkeypatch.delenv(name)
    return monkeypatch


CLIENTS = {
    "httpx": lambda url: httpx.get(url).text,
    "requests": lambda url: requests.get(url).text,
    # `urlopen` keeps the proxies of its first call for the whole process, and so for every test after this one.
    "urllib": lambda url: urllib.request.build_opener().open(url).read().decode(),
    "boto3": lambda url: "me" if get_environ_proxies(url) == {} else "the proxy",  # and DVC, for S3
}


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("given", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"])
def test_every_client_reaches_this_machine(bare, port, client, host, given):
    bare.setenv(given, DEAD)
    bare.setenv("NO_PROXY", "intern.example")
    spare_loopback()
    assert CLIENTS[client](f"http://{host}:{port}/") == "me"


@pytest.mark.parametrize("given", ["http_proxy", "HTTPS_PROXY", "ALL_PROXY"])
def test_other_hosts_keep_the_proxy_and_the_exceptions_they_had(given):
    environment = {given: DEAD, "NO_PROXY": "a.example, [::1]", "no_proxy": "b.example,localhost"}
    spare_loopback(environment)
    expected = "b.example,localhost,a.example,::1,127.0.0.1"
    assert environment == {given: DEAD, "NO_PROXY": expected, "no_proxy": expected}
    before = dict(environment)
    spare_loopback(environment)
    assert environment == before, "once is enough"


def test_brackets_do_not_break_httpx(bare):
    bare.setenv("HTTP_PROXY", DEAD)
    bare.setenv("NO_PROXY", "[::1]")
    spare_loopback()
    with httpx.Client() as client:
        assert client._transport_for_url(httpx.URL("http://[::1]:80/")) is client._transport
        assert client._transport_for_url(httpx.URL("http://example.org/")) is not client._transport


@pytest.mark.parametrize("listed", [{}, {"NO_PROXY": "a.example"}, {"http_proxy": ""}])
def test_without_a_proxy_nothing_changes(listed):
    environment = dict(listed)
    spare_loopback(environment)
    assert environment == listed


def test_no_proxy_for_anybody_stays(bare, port):
    bare.setenv("http_proxy", DEAD)
    bare.setenv("NO_PROXY", "*")
    spare_loopback()
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "*"
    assert all(get(f"http://127.0.0.1:{port}/") == "me" for get in CLIENTS.values())


PROGRAMS = """
import importlib, json, os, sys
plain, modules = dict(os.environ), sys.argv[1:]
for module in modules:
    main = importlib.import_module(module).main
    os.environ.clear()
    os.environ.update(plain)  # what the one before it has set is taken back
    sys.argv = [module, "nonsense"]
    try:
        main()
    except SystemExit:
        pass
    print(json.dumps({module: [os.environ.get("no_proxy"), os.environ.get("NO_PROXY")]}))
"""


def test_every_program_spares_it_for_itself_and_its_children(bare, tmp_path):
    """Each is called where it has nothing to do, and leaves its environment behind."""
    modules = ["clear.cli", "flows.service.deploy", "flows.service.local", "flows.sweep"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HTTP_PROXY": DEAD, "PREFECT_HOME": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAMS, *modules]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    left = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    assert left == [{module: ["localhost,127.0.0.1,::1"] * 2} for module in modules], done.stderr


def test_flows_spare_it(bare, tmp_path):
    bare.setenv("HTTP_PROXY", DEAD)
    assert dvc_commands.environment(tmp_path)["no_proxy"] == "localhost,127.0.0.1,::1"
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pipeline.on_the_command_line():
            assert os.environ["NO_PROXY"] == "localhost,127.0.0.1,::1"
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.mark.slow
def test_a_flow_behind_a_proxy_finds_its_own_server(bare, tmp_path):
    """It waited three minutes for the temporary server that it had started itself."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HTTP_PROXY": DEAD, "PREFECT_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "flows.pipeline", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and f"error: {tmp_path} has no dvc.yaml" in done.stderr, "the flow itself has run"
