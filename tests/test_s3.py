"""Data in S3: what a team shares, what each obstacle says, and that nothing half done is ever taken for data."""

import os
import shutil
import subprocess
import sys
import urllib.request

import pytest

from clear.errors import ClearError
from clear.project.retrain import intake
from clear.project.retrain.intake import Source
from clear.sources.incoming import sets
from flows import dvc_commands
from tests.conftest import ROOT, git
from tests.helpers.processes import free_port, next_second, run_dvc, wait_until
from tests.helpers.retraining import die, killed
from tests.helpers.store import flow_dvc, objects_are_whole, refused_with, remote

KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "eu-west-1"}


class Store:
    """An S3 server of its own process on this machine, with one bucket, `data`; it forgets everything when it ends."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        import boto3

        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(self._answers, 60, "an S3 server")
        placed = {"LocationConstraint": KEYS["AWS_DEFAULT_REGION"]}
        self.client = boto3.client("s3", endpoint_url=self.url)
        self.client.create_bucket(Bucket="data", CreateBucketConfiguration=placed)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def check_keys(self, yes: bool) -> None:
        """From now on ask whether keys are known (none is), or take any."""
        count = b"0" if yes else b"1000000000"
        asked = urllib.request.Request(f"{self.url}/moto-api/reset-auth", data=count, method="POST")
        asked.add_header("Content-Type", "text/plain")
        urllib.request.urlopen(asked).close()

    def objects(self) -> list[str]:
        found = self.client.get_paginator("list_objects_v2").paginate(Bucket="data")
        return sorted(item["Key"] for page in found for item in page.get("Contents", []))

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/moto-api/data.json", timeout=2).close()
        except OSError:
            return False
        return True


@pytest.fixture(autouse=True)
def _keys(monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def _store():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        server = Store()
        server.start()
        yield server
        server.kill()


@pytest.fixture
def store(_store):
    """A running S3 server with the bucket `data`, empty."""
    for key in _store.objects():
        _store.client.delete_object(Bucket="data", Key=key)
    return _store


def test_what_one_clone_pushes_another_pulls_and_need_not_reproduce(store, project, tmp_path):
    done = remote(project, "data/team", store.url)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "default DVC remote: s3://data/team" in done.stdout
    assert dvc_commands.remote_of(project) == "storage"
    assert "secret" not in (project / ".dvc/config.local").read_text()
    assert git(project, "status", "--porcelain") == ""
    run_dvc(project, "push")

    git(tmp_path, "clone", "-q", str(project), "second")
    second = tmp_path / "second"
    assert remote(second, "s3://data/team/", store.url).returncode == 0
    run_dvc(second, "pull")
    assert (second / "data/samples").read_bytes() == (project / "data/samples").read_bytes()
    assert "Running stage" not in run_dvc(second, "repro")
    assert git(second, "status", "--porcelain") == ""


@pytest.mark.slow
def test_a_flow_pulls_what_is_missing_and_pushes_what_it_made(store, project, tmp_path):
    remote(project, "data/team", store.url)
    (project / "code/source.txt").write_text("made by the flow")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "flows.pipeline"]
    done = subprocess.run([*command, str(project)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    git(project, "commit", "-q", "-a", "-m", "made")
    assert len(store.objects()) == 1, "the other output is git's"

    git(tmp_path, "clone", "-q", str(project), "second")
    second = tmp_path / "second"
    remote(second, "data/team", store.url)
    done = subprocess.run([*command, str(second)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 missing outputs fetched from storage" in done.stdout + done.stderr
    assert (second / "data/samples").read_text() == "made by the flow"
    assert "Running stage" not in done.stdout + done.stderr
    assert git(second, "status", "--porcelain") == ""


@pytest.mark.slow
def test_what_the_cache_has_needs_no_remote_and_only_the_rest_is_asked_for(project):
    server = Store()
    server.start()
    try:
        remote(project, "data/team", server.url)
        run_dvc(project, "push")
    finally:
        server.kill()
    (project / "data/samples").unlink()
    said: list[str] = []
    missing = dvc_commands.missing_outputs(project)
    assert missing == ["data/samples"]
    found = dvc_commands.bring(missing, "storage", project, said.append)
    assert found == ("Cached", "1 missing outputs came from the cache.") and (project / "data/samples").exists()
    (project / "data/samples").unlink()
    shutil.rmtree(project / ".dvc/cache")
    with pytest.raises(dvc_commands.Temporary, match=r"dvc pull .* ended with status"):
        dvc_commands.bring(missing, "storage", project, said.append)


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_of_a_push_leaves_nothing_half(project):
    server = Store()
    server.start()
    try:
        remote(project, "data/team", server.url)
        (project / "data/many").mkdir()
        for number in range(12):
            (project / f"data/many/{number}").write_bytes(os.urandom(2_000_000))
        run_dvc(project, "add", "-q", "data/many")
        push = subprocess.Popen(
            [sys.executable, "-m", "dvc", "push", "--jobs", "1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        wait_until(lambda: len(server.objects()) > 1, 120, "a push that is under way")
        objects_are_whole(server.client)
        server.kill()
        push.communicate()
        assert push.returncode
        with pytest.raises(dvc_commands.Temporary, match="connect"):
            flow_dvc(project, "push")
        server.start()
        flow_dvc(project, "push")
        assert len(server.objects()) == 12 + 2
        objects_are_whole(server.client)
    finally:
        server.kill()


@pytest.mark.slow
def test_a_push_that_is_killed_is_completed_by_the_next_one_and_no_object_is_ever_half(store, project):
    remote(project, "data/team", store.url)
    (project / "data/many").mkdir()
    for number in range(60):
        (project / f"data/many/{number}").write_bytes(os.urandom(400_000))
    run_dvc(project, "add", "-q", "data/many")
    push = subprocess.Popen([sys.executable, "-m", "dvc", "push", "--jobs", "2"], stdout=subprocess.DEVNULL)
    wait_until(lambda: len(store.objects()) > 3, 60, "a push that is under way")
    push.kill()
    push.wait()
    objects_are_whole(store.client)
    assert len(store.objects()) < 60
    flow_dvc(project, "push")
    assert len(store.objects()) == 60 + 2
    shutil.rmtree(project / ".dvc/cache")
    shutil.rmtree(project / "data/many")
    flow_dvc(project, "pull")
    assert len(list((project / "data/many").iterdir())) == 60


def test_sets_come_from_a_prefix_only_when_they_changed_and_refused_ones_move_beside_it(store, project, tmp_path):
    remote(project, "data/team", store.url)
    prefix = "team/incoming"

    def put(**objects: str) -> None:
        for name, content in objects.items():
            path = name.replace("__", "/").replace("_", ".")
            store.client.put_object(Bucket="data", Key=f"{prefix}/{path}", Body=content.encode())

    put(fog__rows_jsonl="fog", mist__rows_jsonl="mist", mist__deep__a_png="a", README_md="no set")
    source = Source.of(project, f"s3://data/{prefix}/", tmp_path / "incoming")
    said: list[str] = []
    folder = source.fetch(lambda arguments, where: None, said.append)
    first = {one.name: one.fingerprint for one in sets(folder)}
    assert list(first) == ["fog", "mist"] and said == [f"3 of 3 files to fetch from s3://data/{prefix}"]
    source.fetch(lambda arguments, where: None, said.append)
    assert len(said) == 1, "nothing changed"
    put(fog__rows_jsonl="FOG")
    source.fetch(lambda arguments, where: None, said.append)
    second = {one.name: one for one in sets(folder)}
    assert said[1:] == [f"1 of 3 files to fetch from s3://data/{prefix}"]
    assert second["fog"].fingerprint != first["fog"] and second["mist"].fingerprint == first["mist"]

    for damaged in ("", "{", "[]", "[1]"):
        said.clear()
        (tmp_path / "incoming.json").write_text(damaged)
        source.fetch(lambda arguments, where: None, said.append)
        assert said == [f"3 of 3 files to fetch from s3://data/{prefix}"], damaged

    place = source.quarantine(second["mist"], project, "no row of it can be used")
    assert place == "s3://data/team/quarantine/mist"
    assert [name for name in store.objects() if name.startswith("team/")] == [
        f"{prefix}/README.md",
        f"{prefix}/fog/rows.jsonl",
        "team/quarantine/mist.report/refused.json",
        "team/quarantine/mist/deep/a.png",
        "team/quarantine/mist/rows.jsonl",
    ]
    source.fetch(lambda arguments, where: None, said.append)
    assert [one.name for one in sets(folder)] == ["fog"]

    put(mist__rows_jsonl="mended, and still bad")
    source.fetch(lambda arguments, where: None, said.append)
    again = {one.name: one for one in sets(folder)}["mist"]
    assert source.age("mist") < 60
    place = source.quarantine(again, project, "no row of it can be used")
    assert place == f"s3://data/team/quarantine/mist-{again.fingerprint[:8]}"
    bodies = {name: store.client.get_object(Bucket="data", Key=name)["Body"].read() for name in store.objects()}
    assert bodies["team/quarantine/mist/rows.jsonl"] == b"mist", "the first version is there still"
    assert bodies[f"team/quarantine/mist-{again.fingerprint[:8]}/rows.jsonl"] == b"mended, and still bad"

    outside = tmp_path / "outside"
    for key in (f"{prefix}/{outside}", f"{prefix}/fog//a.png", f"{prefix}/fog/./b.png", f"{prefix}/../c/d.png"):
        store.client.put_object(Bucket="data", Key=key, Body=b"x")
    said.clear()
    source.fetch(lambda arguments, where: None, said.append)
    assert not outside.exists() and {one.name: one for one in sets(folder)} == {"fog": second["fog"]}
    assert sum("no path of a file can have this key; not fetched" in one for one in said) >= 2, said
    with pytest.raises(
        ClearError, match=r"s3://nothing/x: NoSuchBucket: .*; check the bucket's name and the endpoint of"
    ):
        Source.of(project, "s3://nothing/x", tmp_path / "other").fetch(lambda arguments, where: None, said.append)


def test_the_rest_of_a_refused_set_is_no_new_set_after_a_kill(store, project, tmp_path):
    """The rest might pass the checks that the whole has failed."""
    remote(project, "data/club", store.url)

    def put(name: str, text: str) -> None:
        store.client.put_object(Bucket="data", Key=f"club/incoming/{name}", Body=text.encode())

    for name in ("fog/rows.jsonl", "mist/bad.jsonl", "mist/rows.jsonl", "mist/a.png", "mist.report/moving.json"):
        put(name, name)
    source, said = Source.of(project, "s3://data/club/incoming", tmp_path / "incoming"), []
    folder = source.fetch(lambda arguments, where: None, said.append)
    mist = {one.name: one for one in sets(folder)}["mist"]

    def after_one_deletion() -> None:
        connect = intake.store

        def dying(workspace):
            client = connect(workspace)
            delete = client.delete_object
            client.delete_object = lambda **named: (delete(**named), die())
            return client

        intake.store = dying
        source.quarantine(mist, project, "not good")

    killed(after_one_deletion)
    next_second()
    put("mist/rows.jsonl", "mist/rows.jsonl")  # somebody puts a mended set back, which has this one as it was
    source.fetch(lambda arguments, where: None, said.append)
    assert [(one.name, one.files) for one in sets(folder)] == [("fog", 1), ("mist", 1), ("mist.report", 1)]
    assert (
        "1 files of sets in quarantine were left in s3://data/club/incoming by a run that was killed; deleted." in said
    )
    told: list[tuple] = []
    for _ in range(2):
        source.remind(lambda *given: told.append(given))
    assert told == [("mist", "not good", "s3://data/club/quarantine/mist")]
    kept = [f"club/quarantine/{name}" for name in ("mist/a.png", "mist/bad.jsonl", "mist/rows.jsonl")]
    assert [name for name in store.objects() if name.startswith("club/quarantine")] == [
        "club/quarantine/mist.report/refused.json",
        *kept,
    ]

    report = {one.name: one for one in sets(folder)}["mist.report"]
    place = source.quarantine(report, project, "no name for a set")
    assert place == f"s3://data/club/quarantine/mist.report-{report.fingerprint[:8]}", "its file is no note of ours"
    store.client.put_object(Bucket="data", Key="club/quarantine/fog.report/moving.json", Body=b"[1]")
    with pytest.raises(ClearError, match=r"fog\.report/moving\.json is damaged \(.*\); delete it, and what is left in"):
        source.fetch(lambda arguments, where: None, said.append)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["push", "pull"])
def test_wrong_keys_and_a_missing_bucket_are_one_clear_line(store, project, command):
    remote(project, "data/team", store.url)
    run_dvc(project, "push")
    if command == "push":
        (project / "code/source.txt").write_text("new")
        run_dvc(project, "repro", "-q")
    else:
        (project / "data/samples").unlink()
        shutil.rmtree(project / ".dvc/cache")
    store.check_keys(True)
    try:
        with pytest.raises(ClearError, match=rf"`dvc {command}` .*refuses these keys; check AWS_PROFILE") as refused:
            flow_dvc(project, command)
        refused_with(
            remote(project, "data/team", store.url), "s3://data at", "InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID"
        )
    finally:
        store.check_keys(False)
    assert "\n" not in str(refused.value) and not isinstance(refused.value, dvc_commands.Temporary)
    if command == "pull":  # DVC takes a bucket that is not there for an empty one, and says what it could not check out
        return
    run_dvc(project, "remote", "modify", "--local", "-q", "storage", "url", "s3://nothing/team")
    shutil.rmtree(project / ".dvc/tmp")  # where DVC remembers what a remote has
    with pytest.raises(ClearError, match=rf"`dvc {command}` .*bucket does not exist; create it, or name another"):
        flow_dvc(project, command)


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line_and_nothing_half_is_taken_for_data(store, project, tmp_path):
    remote(project, "data/team", store.url)
    (project / "data/big").write_bytes(os.urandom(4_000_000))
    run_dvc(project, "add", "-q", "data/big")
    run_dvc(project, "push", "-q")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (it takes root)")
    try:
        (project / "data/big").unlink()
        shutil.rmtree(project / ".dvc/cache")
        run_dvc(project, "cache", "dir", "-q", "--local", str(small / "cache"))
        with pytest.raises(ClearError, match="the disk is full; free some space"):
            flow_dvc(project, "pull")
        assert not (project / "data/big").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)
    run_dvc(project, "cache", "dir", "-q", "--local", str(tmp_path / "cache"))
    flow_dvc(project, "pull")
    assert (project / "data/big").stat().st_size == 4_000_000


def test_a_wrong_bucket_endpoint_or_folder_is_one_line_and_nothing_is_written(store, project, tmp_path, monkeypatch):
    refused_with(remote(project, "nothing", store.url), "s3://nothing at", store.url, "NoSuchBucket", "ENDPOINT")
    refused_with(
        remote(project, "data", "http://127.0.0.1:1"), "s3://data at http://127.0.0.1:1: no answer", "ENDPOINT"
    )
    refused_with(remote(project, "data", "nonsense"), "nonsense", "ENDPOINT")
    refused_with(remote(project, "", store.url), "BUCKET=")
    refused_with(remote(tmp_path, "data", store.url), "no DVC project here")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    refused_with(remote(project, "data", store.url), "no complete AWS credentials", "AWS_PROFILE")
    assert not (project / ".dvc/config.local").exists() or dvc_commands.remote_of(project) is None
