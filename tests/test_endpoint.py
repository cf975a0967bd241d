"""The client of an OpenAI-compatible endpoint against a real HTTP server: cache, failures, budget, interruption."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from clear.errors import ClearError
from clear.llm.endpoint import (
    BudgetSpent,
    Denied,
    Malformed,
    Outage,
    Refused,
    Reply,
    Request,
    connect,
    messages,
    retry_after,
)
from tests.chat_server import completion, serving, settings, user_text
from tests.conftest import ROOT


def echo(body, number):
    return 200, {}, completion(f"echo {user_text(body)}")


def request(text: str, **values) -> Request:
    return Request(messages(text), **values)


@pytest.fixture
def client_of(tmp_path):
    """Connect to a server with changed settings; closed at the end."""
    made = []

    def connected(server, **changes):
        made.append(connect(settings(server.url, **changes), "teacher", tmp_path / "r" / "t.sqlite", pause=0.01))
        return made[-1]

    yield connected
    for client in made:
        client.close()


def test_a_request_is_asked_once_and_then_read_from_the_cache(client_of):
    with serving(echo) as server:
        first = client_of(server).ask(request("hello"))
        again = client_of(server).ask(request("hello"))
        assert len(server.bodies) == 1
    assert first == Reply("echo hello", 100, 10) and again == Reply("echo hello", 100, 10, cached=True)
    assert client_of(server).ask(request("hello")) == again, "the server is not needed any more"


def test_whatever_can_change_the_reply_is_part_of_the_hash(client_of):
    with serving(echo) as server:
        client = client_of(server)
        variants = [
            request("hello"),
            request("hallo"),
            request("hello", temperature=0.5),
            request("hello", max_tokens=9),
            request("hello", draw=1),
            request("hello", as_json=True),
            Request(messages("hello", image=b"png")),
            Request(messages("hello", image=b"another")),
            Request(messages("hello", system="be brief")),
        ]
        for one in variants:
            client.ask(one)
        client_of(server, model="teacher-2").ask(variants[0])
        assert len(server.bodies) == len(variants) + 1
        client_of(server, timeout=4.0, retries=1, budget=99.0).ask(variants[0])
        assert len(server.bodies) == len(variants) + 1, "how it is asked is not part of it"
    assert server.bodies[3]["max_tokens"] == 9 and server.bodies[0]["max_tokens"] == 50
    assert server.bodies[5]["response_format"] == {"type": "json_object"}
    image = server.bodies[6]["messages"][0]["content"][0]
    assert image == {"type": "image_url", "image_url": {"url": "data:image/png;base64,cG5n"}}
    assert server.bodies[8]["messages"][0] == {"role": "system", "content": "be brief"}


def test_url_model_and_key_come_from_the_environment(client_of, tmp_path, monkeypatch):
    with serving(echo) as server:
        monkeypatch.setenv("THE_URL", server.url + "/")
        monkeypatch.setenv("THE_MODEL", "m-7")
        named = settings("$THE_URL", model="$THE_MODEL", key="$THE_KEY")
        with pytest.raises(ClearError, match=r"teacher.key = \$THE_KEY.*export it"):
            connect(named, "teacher", tmp_path / "t.sqlite")
        monkeypatch.setenv("THE_KEY", "secret")
        with connect(named, "teacher", tmp_path / "t.sqlite") as client:
            client.ask(request("hello"))
            assert "secret" not in repr(client)
        assert server.keys == ["Bearer secret"] and server.bodies[0]["model"] == "m-7"
    assert b"secret" not in (tmp_path / "t.sqlite").read_bytes()
    for key, odd in {"url": settings(""), "model": settings("http://x", model="")}.items():
        with pytest.raises(ClearError, match=f"teacher.{key} is empty"):
            connect(odd, "teacher", tmp_path / "t.sqlite")
    with pytest.raises(ClearError, match="must begin with http"):
        connect(settings("host/v1"), "teacher", tmp_path / "t.sqlite")


@pytest.mark.parametrize(
    ("failure", "billed"),
    [
        ((429, {}, {"error": "slow down"}), False),
        ((503, {}, b"<html>busy</html>"), False),
        ((200, {}, b"{not json"), True),
        ((200, {}, {"choices": []}), True),
        ((200, {}, [1]), True),
        ((200, {}, completion(None)), True),
        ((200, {}, completion("  ")), True),
        ((200, {}, completion("half an emoji \ud83d")), True),  # from whoever cut the text
        ((200, {}, b"[" * 100_000), True),
        ((200, {"Content-Encoding": "gzip"}, b"no gzip"), True),
    ],
)
def test_a_temporary_failure_is_tried_again(client_of, failure, billed):
    with serving(lambda body, number: failure if number < 2 else echo(body, number)) as server:
        client = client_of(server)
        assert client.ask(request("hello")).text == "echo hello"
        assert len(server.bodies) == 3
    report = client.report()
    assert report["attempts"] == 3 and report["replies"] == 1
    highest = client.forecast(client.body(request("hello")))
    assert report["unconfirmed_usd"] == pytest.approx(2 * highest if billed else 0)
    assert report["spent_usd"] == pytest.approx((100 * 2 + 10 * 8) / 1e6 + report["unconfirmed_usd"])


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_pause_that_the_server_asks_for_is_kept(client_of, form):
    def answer(body, number):
        if number:
            return echo(body, number)
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)  # whole seconds: 1 to 2 remain
        return 429, {"Retry-After": "0.7" if form == "seconds" else date}, {}

    with serving(answer) as server:
        client_of(server).ask(request("hello"))
        assert server.times[1] - server.times[0] >= 0.7


def test_pauses_grow(client_of):
    with serving(lambda body, number: (500, {}, {}) if number < 3 else echo(body, number)) as server:
        client = client_of(server)
        client.pause = 0.1
        client.ask(request("hello"))
        first, _, third = (b - a for a, b in zip(server.times, server.times[1:], strict=False))
        assert first >= 0.075 and third >= 0.3


def test_a_pause_of_hours_is_an_outage_at_once(client_of):
    with serving(lambda body, number: (429, {"Retry-After": "7200"}, {})) as server:
        with pytest.raises(Outage, match="pause of 7200 s"):
            client_of(server).ask(request("hello"))
        assert len(server.bodies) == 1
    assert retry_after("soon") == 0.0 and retry_after("") == 0.0 and retry_after("-3") == 0.0
    assert retry_after("Mon, 01 Jan 99999999999999999999 00:00:00 GMT") == 0.0


def test_lasting_failures_have_types_and_name_reason_and_remedy(client_of):
    with serving(lambda body, number: (502, {}, b"bad gateway")) as server:
        with pytest.raises(Outage, match=r"502 \(bad gateway\) after 3 attempts.*run the same command again"):
            client_of(server, retries=2).ask(request("hello"))
        assert len(server.bodies) == 3
    with pytest.raises(Outage, match="no connection"):
        client_of(server, retries=1).ask(request("hello"))
    login = serving(lambda body, number: (200, {}, b"<html>login</html>"))
    with login as server, pytest.raises(Malformed, match="no chat completion"):
        client_of(server, retries=1).ask(request("hello"))
    with serving(lambda body, number: (400, {}, {"error": "content filter"})) as server:
        with pytest.raises(Refused, match=r"400.*content filter"):
            client_of(server).ask(request("hello"))
        assert len(server.bodies) == 1, "what is refused is not repeated"
    for status in (401, 403, 404, 405, 308):
        with serving(lambda body, number, status=status: (status, {}, {"error": "no"})) as server:
            with pytest.raises(Denied, match=f"{status}.*key and model 'teacher-1'"):
                client_of(server).ask(request("hello"))
            assert len(server.bodies) == 1
    unpaid = serving(lambda body, number: (402, {}, {"error": "Insufficient Balance"}))
    with unpaid as server, pytest.raises(Denied, match=r"402.*Insufficient Balance.*its credit is used up"):
        client_of(server).ask(request("hello"))


@pytest.mark.parametrize("how", ["silent", "trickling"])
def test_a_server_that_does_not_finish_is_a_time_out(client_of, how):
    """A reply that comes byte by byte is late, too, although every single byte is in time."""
    import socket

    listener = socket.create_server(("127.0.0.1", 0))
    opened, done = [], threading.Event()

    def serve():
        while not done.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            opened.append(connection)
            threading.Thread(target=trickle, args=(connection,), daemon=True).start()

    def trickle(connection):
        connection.recv(65536)
        if how == "trickling":
            try:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                while not done.wait(0.05):
                    connection.sendall(b" ")
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()

    class Server:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    client = client_of(Server, timeout=0.3, retries=1)
    with pytest.raises(Outage, match=r"no reply within 0.3 s after 2 attempts"):
        client.ask(request("hello"))  # all 1,000 bytes would come, and be no JSON, within 50 s
    done.set()
    listener.close()
    assert client.report()["unconfirmed_usd"] == pytest.approx(2 * client.forecast(client.body(request("hello"))))


def test_the_budget_is_never_passed_and_counts_over_all_runs(client_of):
    def expensive(body, number):
        return 200, {}, completion("yes", prompt=12, answer=50)

    with serving(expensive) as server:
        one = client_of(server).forecast(client_of(server).body(request("n0")))
        real = (12 * 2 + 50 * 8) / 1e6
        assert real < one
        client = client_of(server, budget=3.5 * real + one, concurrency=1)
        replies = client.ask_all(request(f"n{i}") for i in range(9))
        with pytest.raises(BudgetSpent, match=r"Raise teacher.budget; what was answered is kept"):
            list(replies)
        asked = len(server.bodies)
        assert asked == 4 and client.report()["spent_usd"] <= client.config.budget
        with pytest.raises(BudgetSpent):
            client_of(server, budget=client.config.budget).ask(request("another day"))
        assert len(server.bodies) == asked
        assert client_of(server, budget=0.0).ask(request("n0")).cached, "what is kept costs nothing"
        assert client_of(server, budget=0.0, price_input=0.0, price_output=0.0, model="free").ask(request("n0"))


def test_many_requests_come_back_in_order_and_errors_take_their_place(client_of):
    def answer(body, number):
        if "n3" in user_text(body):
            return 400, {}, {"error": "odd"}
        time.sleep(0.01 * (number % 3))
        return echo(body, number)

    ticks = []
    with serving(answer) as server:
        found = list(client_of(server).ask_all((request(f"n{i}") for i in range(12)), ticks.append))
    assert [type(one).__name__ for one in found] == ["Refused" if i == 3 else "Reply" for i in range(12)]
    assert [one.text for i, one in enumerate(found) if i != 3] == [f"echo n{i}" for i in range(12) if i != 3]
    assert len(ticks) == 12


def test_equal_requests_under_way_at_once_are_asked_once(client_of):
    def slow(body, number):
        time.sleep(0.1)
        return echo(body, number)

    with serving(slow) as server:
        found = list(client_of(server, concurrency=8).ask_all([request("hello")] * 8))
        assert len(server.bodies) == 1 and {one.text for one in found} == {"echo hello"}


def test_requests_under_way_at_once_are_as_many_as_configured(client_of):
    most, now, lock, full = [0], [0], threading.Lock(), threading.Event()

    def answer(body, number):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            if most[0] >= 3:
                full.set()
        full.wait(20)  # on a busy machine the third request takes its time
        time.sleep(0.03)  # a fourth one would come now
        with lock:
            now[0] -= 1
        return echo(body, number)

    with serving(answer) as server:
        list(client_of(server, concurrency=3).ask_all(request(f"n{i}") for i in range(12)))
    assert most[0] == 3


def test_few_requests_are_held_at_once(client_of):
    taken = []

    def requests():
        for i in range(100):
            taken.append(i)
            yield request(f"n{i}")

    with serving(echo) as server:
        replies = client_of(server, concurrency=2).ask_all(requests())
        next(replies)
        assert len(taken) <= 9
        replies.close()


def test_a_denial_stops_the_whole_batch(client_of):
    with serving(lambda body, number: (401, {}, {})) as server:
        with pytest.raises(Denied):
            list(client_of(server, concurrency=1).ask_all(request(f"n{i}") for i in range(50)))
        assert len(server.bodies) <= 5


def test_a_cut_reply_says_so_and_missing_usage_counts_at_its_highest(client_of):
    with serving(lambda body, number: (200, {}, completion("so far", finish="length"))) as server:
        assert client_of(server).ask(request("hello")).cut
        assert client_of(server).ask(request("hello")).cut, "also from the cache"
    with serving(lambda body, number: (200, {}, completion("yes") | {"usage": None})) as server:
        client = client_of(server)
        before = client.report()["spent_usd"]
        reply = client.ask(request("no usage"))
        assert reply.completion_tokens == 50
        assert client.report()["spent_usd"] - before == pytest.approx(client.forecast(client.body(request("no usage"))))


def test_tokens_that_nobody_can_have_used_count_at_their_highest(client_of):
    with serving(lambda body, number: (200, {}, completion("yes", 10**30, 10**400))) as server:
        client = client_of(server)
        assert client.ask(request("hello")).completion_tokens == 50
        assert client.report()["spent_usd"] == pytest.approx(client.forecast(client.body(request("hello"))))


def test_a_damaged_cache_is_named(tmp_path):
    (tmp_path / "t.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(ClearError, match=r"t\.sqlite: not a usable reply file"):
        connect(settings("http://127.0.0.1:9/v1"), "teacher", tmp_path / "t.sqlite")


PROGRAM = """
import sys
from clear.llm.endpoint import Request, connect, messages
from tests.chat_server import settings
with connect(settings(sys.argv[1], concurrency=1, timeout=60.0), "teacher", sys.argv[2]) as client:
    for reply in client.ask_all(Request(messages(f"n{i}")) for i in range(10)):
        print(reply.text, flush=True)
"""


def test_after_sigkill_nothing_answered_is_asked_again(tmp_path):
    reached, go = threading.Event(), threading.Event()

    def answer(body, number):
        if number == 5:  # the sixth request is under way when the process dies
            reached.set()
            go.wait(30)
        return echo(body, number)

    file = tmp_path / "t.sqlite"
    with serving(answer) as server:
        command = [sys.executable, "-c", PROGRAM, server.url, str(file)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert reached.wait(30)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        go.set()
        with sqlite3.connect(file) as db:
            assert db.execute("SELECT count(*) FROM replies").fetchone() == (5,)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.stdout.split("\n")[:10] == [f"echo n{i}" for i in range(10)], done.stderr
        asked = [user_text(body) for body in server.bodies]
    assert sorted(asked) == sorted([*(f"n{i}" for i in range(10)), "n5"])
    with connect(settings(server.url), "teacher", file) as client:
        report = client.report()
        assert report["attempts"] == 11 and report["replies"] == 10
        assert report["unconfirmed_usd"] == pytest.approx(client.forecast(client.body(request("n5"))))


@pytest.mark.parametrize("key", ["…", "clé", "two words", "line\n", "tab\t"])
def test_a_key_that_no_request_can_carry_is_refused_without_being_shown(tmp_path, monkeypatch, key):
    monkeypatch.setenv("THE_KEY", key)
    with pytest.raises(ClearError, match=r"teacher\.key = \$THE_KEY, and that environment variable contains") as caught:
        connect(settings("http://127.0.0.1:9/v1", key="$THE_KEY"), "teacher", tmp_path / "t.sqlite")
    assert key not in str(caught.value) or key == "…"
