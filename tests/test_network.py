"""A network that fails before real clients and real servers: tried again, resumed, or one line that says what to do."""

import hashlib
import os

import pytest
from botocore.retries import standard
from moto.server import ThreadedMotoServer

from clear.data import aws
from clear.drift.place import Place
from clear.errors import ClearError
from clear.llm.endpoint import Outage, Request, connect, messages
from clear.model import weights
from clear.model.weights import fetch
from flows.batch.store import Store
from tests.chat_server import completion, serving, settings
from tests.helpers.network import Fault, before, s3_error
from tests.helpers.store import aws_environment

SIZE = 300_000
CONTENT = os.urandom(SIZE)
PART = SIZE // 4
PASSING = {
    "refused": Fault(reset=True),
    "reset": Fault(after=PART, reset=True),
    "cut short": Fault(after=PART),
    "500": s3_error(500, "InternalError"),
    "503": s3_error(503, "SlowDown"),
    "silent": Fault(wait=1.5),
}
"""What may pass, by name."""
LASTING = {
    "refused": (PASSING["refused"], "no answer .*check the network and AWS_ENDPOINT_URL"),
    "reset": (Fault(after=0, reset=True), "no answer .*check the network and AWS_ENDPOINT_URL"),
    "cut short": (Fault(after=0), "no answer .*check the network and AWS_ENDPOINT_URL"),
    "500": (PASSING["500"], "InternalError: InternalError was planted; "),
    "503": (PASSING["503"], "SlowDown: SlowDown was planted; "),
    "silent": (PASSING["silent"], "no answer .*check the network and AWS_ENDPOINT_URL"),
    "clock": (s3_error(403, "RequestTimeTooSkewed"), "this machine's clock is wrong; set it"),
    "expired": (s3_error(400, "ExpiredToken"), "log in again"),
}


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A proxy before a server of S3, with a client of the project's that asks three times and waits a second for data.

    It is made once, because boto3 takes long for that.
    """
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with before("http://{}:{}".format(*server.get_host_and_port())) as proxy, pytest.MonkeyPatch.context() as patch:
        places = {"AWS_ENDPOINT_URL": proxy.url, "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "3"}
        aws_environment(patch, tmp_path_factory.mktemp("aws"), **places)
        patch.setattr(aws, "_PATIENT", (1.0, 1.0))
        patch.setattr(aws, "_PAUSE", 0.01)
        patch.setattr(standard.ExponentialBackoff, "delay_amount", lambda *_: 0.01)
        client = aws.client()
        patch.setattr(aws, "client", lambda: client)
        client.create_bucket(Bucket="traffic")
        yield proxy
    server.stop()


@pytest.fixture
def bucket(s3, tmp_path, monkeypatch):
    """The client; the bucket `traffic` has one object."""
    monkeypatch.setenv("CLEAR_HOME", str(tmp_path / "home"))
    s3.fails()
    client = aws.client()
    client.put_object(Bucket="traffic", Key="models/7b/ema.safetensors", Body=CONTENT)
    return client


def fetched(tmp_path) -> bytes:
    return (fetch("s3://traffic/models/7b") / "ema.safetensors").read_bytes()


def read(tmp_path) -> bytes:
    place = Place("s3://traffic/models", client=aws.client(), bucket="traffic", prefix="models")
    assert place.listed()[0] == [("7b/ema.safetensors", SIZE)]
    return place.read("7b/ema.safetensors")


def noted(tmp_path) -> bytes:
    return Store(aws.client(), "traffic", "models").read_bytes("7b/ema.safetensors")


def loaded(tmp_path) -> bytes:
    store = Store(aws.client(), "traffic", "models")
    store.fetch("7b/ema.safetensors", tmp_path / "loaded", hashlib.sha256(CONTENT).hexdigest())
    return (tmp_path / "loaded").read_bytes()


READERS = (fetched, *(pytest.param(reader, marks=pytest.mark.slow) for reader in (read, noted, loaded)))
"""Weights; and pictures to watch, notes of a job, files of a job."""


def params(faults: dict) -> list:
    """Each fault by its name; those that cost seconds of waiting are slow."""
    slow = pytest.mark.slow
    return [pytest.param(fault, id=name, marks=[slow] if name == "silent" else []) for name, fault in faults.items()]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("fault", params(PASSING))
def test_what_passes_is_tried_again_and_the_content_is_whole(bucket, s3, tmp_path, reader, fault):
    s3.fails(fault, fault, only="ema.safetensors")
    assert reader(tmp_path) == CONTENT
    assert len([asked for asked in s3.seen if "ema.safetensors" in asked]) >= 3


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("lasting", params(LASTING))
def test_what_lasts_is_one_line_and_nothing_half_has_a_name(bucket, s3, tmp_path, reader, lasting):
    fault, said = lasting
    s3.fails(lasting=fault)
    with pytest.raises(ClearError, match=said) as refused:
        reader(tmp_path)
    assert "s3://traffic/" in str(refused.value) and "\n" not in str(refused.value)
    s3.fails(lasting=fault, only="ema.safetensors")  # the list arrives
    with pytest.raises(ClearError, match=said):
        reader(tmp_path)
    left = [file.name for file in tmp_path.rglob("*") if file.is_file()]
    assert all(name.endswith((".part", ".lock")) for name in left), left
    s3.fails()
    assert reader(tmp_path) == CONTENT


@pytest.mark.parametrize("fault", [Fault(after=0), Fault(200, b"<html>Log in to this network</html>")])
def test_an_answer_that_is_no_list_is_not_taken_for_an_empty_one(bucket, s3, fault):
    """It was: sets to take in were deleted here, and jobs were ended as nobody's."""
    client = aws.client()
    s3.fails(fault, fault, only="list-type=2")
    assert [item["Key"] for item in aws.listed(client, "traffic", "models/")] == ["models/7b/ema.safetensors"]
    s3.fails(lasting=fault, only="list-type=2")
    lost = pytest.raises(aws.Unreachable, match=r"s3://traffic: no answer \(.*an answer without a list\); check the")
    with lost, aws.explained("s3://traffic"):
        list(aws.listed(client, "traffic", "models/"))
    assert len(s3.seen) == 3


def test_a_body_that_breaks_goes_on_where_it_stopped(bucket, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_CHUNK", 50_000)
    s3.fails(Fault(after=PART, reset=True), only="ema.safetensors")
    assert fetched(tmp_path) == CONTENT
    first, second = (asked.partition(" bytes=")[2] for asked in s3.seen if "GET /traffic/models/7b/ema" in asked)
    assert first == "" and 0 < int(second.removesuffix("-")) <= PART


def test_the_rest_of_another_version_is_not_taken(bucket, s3, tmp_path):
    s3.fails(Fault(after=PART, reset=True), only="ema.safetensors")
    _, chunks = aws.opened(aws.client(), "traffic", "models/7b/ema.safetensors", size=PART)
    assert next(chunks) == CONTENT[:PART]
    bucket.put_object(Bucket="traffic", Key="models/7b/ema.safetensors", Body=CONTENT[::-1])
    changed = pytest.raises(ClearError, match=r"PreconditionFailed.*the object changed while it was read")
    with changed, aws.explained("s3://traffic/models/7b/ema.safetensors"):
        b"".join(chunks)


@pytest.mark.parametrize("reader", READERS)
def test_bytes_in_another_order_are_noticed_and_not_kept(bucket, s3, tmp_path, reader):
    """By the checksum that S3 sends along; of a range there is none, and the readers' own are asked."""
    s3.fails(Fault(swapped=True), only="ema.safetensors")
    with pytest.raises(aws.Unreachable, match=r"what arrived is not what was stored .*; repeat the command"):
        reader(tmp_path)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] in ([], ["7b.lock"])
    assert reader(tmp_path) == CONTENT


@pytest.mark.parametrize(("reader", "said"), [(fetched, "does not match the ETag"), (loaded, "it is not used")])
def test_the_rest_in_another_order_is_noticed_too(bucket, s3, tmp_path, reader, said):
    s3.fails(Fault(after=PART, reset=True), Fault(swapped=True, bare=True), only="ema.safetensors")
    with pytest.raises(ClearError, match=said):
        reader(tmp_path)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] in ([], ["7b.lock"])
    assert reader(tmp_path) == CONTENT


def test_keys_that_expire_in_the_middle_keep_what_has_arrived(bucket, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_CHUNK", 50_000)
    s3.fails(Fault(after=PART, reset=True), lasting=s3_error(400, "ExpiredToken"), only="ema.safetensors")
    with pytest.raises(ClearError, match=r"ExpiredToken.*log in again"):
        fetched(tmp_path)
    (part,) = (tmp_path / "home").rglob("*.part")
    assert 0 < (arrived := part.stat().st_size) <= PART
    s3.fails()
    assert fetched(tmp_path) == CONTENT
    assert f"GET /traffic/models/7b/ema.safetensors bytes={arrived}-" in s3.seen, "the rest alone"


@pytest.mark.parametrize("fault", params({name: PASSING[name] for name in ("refused", "500", "503", "silent")}))
def test_an_upload_is_tried_again_and_otherwise_one_line(bucket, s3, tmp_path, fault):
    file = tmp_path / "result"
    file.write_bytes(CONTENT)
    store = Store(aws.client(), "traffic", "compute")
    s3.fails(fault, fault, only="/traffic/compute")
    digest = store.keep(file)
    assert bucket.get_object(Bucket="traffic", Key=f"compute/objects/{digest}")["Body"].read() == CONTENT
    s3.fails(lasting=fault, only="/traffic/compute")
    with pytest.raises(aws.Unreachable, match=r"s3://traffic/compute/notes/a.json: .*repeat the command"):
        store.write("notes/a.json", {})
    with pytest.raises(aws.Unreachable, match=rf"s3://traffic/compute/objects/{digest}: .*repeat the command"):
        store.put(file, f"objects/{digest}")


REPLY = completion("restored", 100, 10)


@pytest.fixture
def teacher(tmp_path):
    """A client of a chat server behind a proxy, and the proxy."""
    with serving(lambda body, number: (200, {}, REPLY)) as server, before(server.url) as proxy:
        there = settings(proxy.url, timeout=1.0, retries=2)
        with connect(there, "teacher", tmp_path / "replies.sqlite", pause=0.01) as client:
            yield client, proxy


CHAT = PASSING | {"reset": Fault(after=20, reset=True), "cut short": Fault(after=20)}


@pytest.mark.parametrize("fault", params(CHAT))
def test_a_teacher_behind_a_bad_line_is_asked_again_and_what_was_answered_is_kept(teacher, fault):
    client, proxy = teacher
    proxy.fails(fault, fault)
    assert client.ask(Request(messages("what ?"))).text == "restored" and len(proxy.seen) == 3
    proxy.fails(lasting=fault)
    assert client.ask(Request(messages("what ?"))).cached and not proxy.seen
    with pytest.raises(Outage, match=r"teacher: .* after 3 attempts at .*start it or wait, then run the same command"):
        client.ask(Request(messages("and now ?")))
