"""Clients of AWS and the one line that each of its errors becomes; the services are stood in for by a local server."""

import ast
import http.server
import threading
from contextlib import contextmanager

import pytest
from moto.server import ThreadedMotoServer

from clear.data import aws
from clear.errors import ClearError
from tests.conftest import ROOT
from tests.helpers.processes import free_port
from tests.helpers.store import aws_environment


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    aws_environment(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def server():
    port = free_port()
    found = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    found.start()
    yield f"http://127.0.0.1:{port}"
    found.stop()


@contextmanager
def answering(status: int, code: str, body: str = ""):
    """A store that answers everything with this error, or (status 200) with a body that breaks off."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            said = body or f"<Error><Code>{code}</Code><Message>Not\nnow.</Message></Error>"
            self.send_response(status)
            self.send_header("Content-Length", str(len(said) + 100 * (status == 200)))
            self.end_headers()
            self.wfile.write(said.encode())

        def do_HEAD(self):  # has no body
            self.send_response(status)
            self.end_headers()

        def do_PUT(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def said(url: str, call, **words) -> ClearError:
    """What `call(client)` raises about the place s3://b/k."""
    with pytest.raises(ClearError) as caught, aws.explained("s3://b/k", **words):
        call(aws.client(endpoint=url))
    text = str(caught.value)
    assert text.startswith("s3://b/k: ") and text.endswith(".") and "\n" not in text and ".." not in text, text
    return caught.value


def _read(client) -> bytes:
    return client.get_object(Bucket="b", Key="k")["Body"].read()


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (404, "NoSuchBucket", "check the bucket's name and AWS_ENDPOINT_URL."),
        (403, "AccessDenied", "these credentials lack that right; ask for it, or set AWS_PROFILE to others."),
        (403, "InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL."),
        (403, "SignatureDoesNotMatch", "the secret is not the access key's; check AWS_SECRET_ACCESS_KEY."),
        (400, "ExpiredToken", "log in again."),
        (412, "PreconditionFailed", "the object changed while it was read; repeat the command."),
        (400, "Strange", "look."),
    ],
)
def test_a_refusal_is_one_line_with_code_message_and_remedy(status, code, remedy):
    with answering(status, code) as url:
        error = said(url, _read, remedy="look")
    assert str(error) == f"s3://b/k: {code}: Not now; {remedy}"
    assert not isinstance(error, aws.Unreachable) and error.__cause__.response["Error"]["Code"] == code


@pytest.mark.parametrize("status", [400, 403])
def test_a_download_is_refused_before_it_begins_without_a_reason(status, tmp_path):
    with answering(status, "ExpiredToken") as url:
        error = said(url, lambda client: client.download_file("b", "k", str(tmp_path / "file")))
    assert f"s3://b/k: {status}: " in str(error) and "S3 does not say why; log in again, or check" in str(error)


def test_a_failed_upload_says_what_the_store_said(tmp_path):
    (tmp_path / "file").write_text("content")
    with answering(403, "AccessDenied") as url:
        error = said(url, lambda client: client.upload_file(str(tmp_path / "file"), "b", "k"))
    assert "AccessDenied: Not now; these credentials lack that right" in str(error)
    assert error.__cause__.response["Error"]["Code"] == "AccessDenied"


def test_what_may_pass_is_unreachable_and_names_the_caller_s_words(tmp_path):
    words = {"endpoint": "ENDPOINT", "again": "the download resumes"}
    nobody = f"http://127.0.0.1:{free_port()}"
    error = said(nobody, _read, **words)
    assert isinstance(error, aws.Unreachable) and nobody in str(error)
    assert str(error).endswith("; check the network and ENDPOINT, then the download resumes.")
    with answering(503, "SlowDown") as url:
        error = said(url, _read, **words)
    assert isinstance(error, aws.Unreachable) and "SlowDown: Not now; the download resumes." in str(error)
    for status, code in ((400, "ThrottlingException"), (429, "TooManyRequestsException"), (400, "RequestTimeout")):
        with answering(status, code) as url:  # a job that is followed must not end because too many are
            error = said(url, _read, **words)
        assert isinstance(error, aws.Unreachable) and f"{code}: Not now; the download resumes." in str(error)
    with answering(200, "", "a body that") as url:  # an answer that breaks off
        error = said(url, _read, **words)
    assert isinstance(error, aws.Unreachable) and "no answer (" in str(error)
    with pytest.raises(aws.Unreachable, match=r"no answer \(reset\)"), aws.explained("s3://b/k"):
        raise ConnectionResetError("reset")


def test_without_credentials(monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    error = said("http://127.0.0.1:9", _read)
    assert "no complete AWS credentials" in str(error) and "set AWS_ACCESS_KEY_ID" in str(error)


def test_other_errors_are_not_touched():
    for mine in (ClearError("a"), OSError(28, "No space left on device"), KeyError("k")):
        with pytest.raises(type(mine)) as caught, aws.explained("s3://b/k"):
            raise mine
        assert caught.value is mine


def test_a_client_that_cannot_be_made_names_the_settings(monkeypatch):
    with pytest.raises(ClearError, match=r"AWS s3 cannot be used: .*nonsense.*; correct ENDPOINT\."):
        aws.client(endpoint="nonsense", settings="ENDPOINT")
    with pytest.raises(ClearError, match=r"AWS batch cannot be used: .*region.*; correct AWS_PROFILE, AWS_DEF"):
        aws.client("batch")
    with pytest.raises(ClearError, match=r"profile \(no-such\)"):
        aws.client(profile="no-such")


def test_patience_is_the_caller_s_and_the_user_s(monkeypatch):
    def of(**words) -> tuple[int, int, int]:
        found = aws.client(region="eu-west-1", **words).meta.config
        return found.connect_timeout, found.read_timeout, found.retries["total_max_attempts"]

    assert of() == (10, 60, 1), "as AWS_MAX_ATTEMPTS says"
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    assert (of(), of(patient=False)) == ((10, 60, 6), (5, 10, 2))


def test_all_objects_are_listed(server, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")  # of a page; S3 itself has 1000
    client = aws.client(endpoint=server, region="us-east-1")
    client.create_bucket(Bucket="many")
    for number in range(21):
        client.put_object(Bucket="many", Key=f"a/{number:04}", Body=b"")
    client.put_object(Bucket="many", Key="b", Body=b"")
    assert client.list_objects_v2(Bucket="many")["IsTruncated"]
    assert [item["Key"] for item in aws.listed(client, "many", "a/")] == [f"a/{number:04}" for number in range(21)]


def test_no_other_module_makes_clients_of_its_own():
    """It alone imports boto3; of botocore the others read exceptions only."""
    files = [file for folder in ("clear", "flows", "infra") for file in (ROOT / folder).rglob("*.py")]
    own = {
        file.relative_to(ROOT).as_posix(): {
            name.module if isinstance(name, ast.ImportFrom) else alias.name
            for name in ast.walk(ast.parse(file.read_text()))
            if isinstance(name, ast.Import | ast.ImportFrom)
            for alias in name.names
        }
        for file in files
    }
    makers = ("boto3", "botocore.config", "botocore.session")
    assert [file for file, names in own.items() if any(str(name).startswith(makers) for name in names)] == [
        "clear/data/aws.py"
    ]
