"""Weights in S3, against a real server of its protocol: fetched once, verified, resumed, refused with a remedy."""

import hashlib
import os
import socket

import boto3
import pytest
from boto3.s3.transfer import TransferConfig
from moto.server import ThreadedMotoServer

from clear.config import compose, from_dict
from clear.data import aws
from clear.errors import ClearError
from clear.model import weights
from clear.model.weights import etag_matches, fetch, with_local_weights
from clear.project.scratch import write_params
from tests.helpers.store import aws_environment

MIB = 2**20
FILES = {"llm_config.json": b"{}", "ema.safetensors": os.urandom(300_000), "empty.txt": b""}


@pytest.fixture(scope="module")
def server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    found.start()
    yield f"http://127.0.0.1:{port}"
    found.stop()


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    """A bucket with a model folder, beside which lie files of another one; requests are counted."""
    places = {"AWS_ENDPOINT_URL": server, "AWS_DEFAULT_REGION": "us-east-1", "CLEAR_HOME": str(tmp_path / "home")}
    aws_environment(monkeypatch, tmp_path, **places)
    client = boto3.client("s3")
    name = f"models-{tmp_path.name.replace('_', '-')}"[:60].strip("-")
    client.create_bucket(Bucket=name)
    for file, content in FILES.items():
        client.put_object(Bucket=name, Key=f"bagel/7b/{file}", Body=content)
    client.put_object(Bucket=name, Key="bagel/7b-other/ema.safetensors", Body=b"other")
    client.put_object(Bucket=name, Key="bagel/7b/nested/file", Body=b"nested")
    return client, name


@pytest.fixture
def gets(monkeypatch):
    """Keys and ranges of the objects asked for."""
    found, original = [], aws.client

    def client():
        made = original()
        made.meta.events.register(
            "before-parameter-build.s3.GetObject",
            lambda params, **_: found.append((params["Key"], params.get("Range"))),
        )
        return made

    monkeypatch.setattr(aws, "client", client)
    return found


def test_a_folder_is_fetched_once(bucket, gets):
    _, name = bucket
    folder = fetch(f"s3://{name}/bagel/7b/")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == FILES
    assert len(gets) == len(FILES)
    assert fetch(f"s3://{name}/bagel/7b") == folder and len(gets) == len(FILES)


def test_a_changed_file_is_fetched_again_and_a_deleted_one_goes(bucket, gets):
    client, name = bucket
    folder = fetch(f"s3://{name}/bagel/7b")
    gets.clear()
    client.put_object(Bucket=name, Key="bagel/7b/llm_config.json", Body=b"[]")
    client.delete_object(Bucket=name, Key="bagel/7b/empty.txt")
    (folder / "ema.safetensors").write_bytes(b"cut")
    fetch(f"s3://{name}/bagel/7b")
    assert sorted(key.rpartition("/")[2] for key, _ in gets) == ["ema.safetensors", "llm_config.json"]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        "llm_config.json": b"[]",
        "ema.safetensors": FILES["ema.safetensors"],
    }


@pytest.mark.parametrize("damaged", ["", "{", "[]", "[1]", '{"ema.safetensors": 1}'])
def test_with_a_damaged_record_everything_is_fetched_again(bucket, gets, damaged):
    _, name = bucket
    folder = fetch(f"s3://{name}/bagel/7b")
    gets.clear()
    folder.with_name(f"{folder.name}.s3.json").write_text(damaged)
    assert {p.name: p.read_bytes() for p in fetch(f"s3://{name}/bagel/7b").iterdir()} == FILES
    assert len(gets) == len(FILES)


def test_a_broken_download_goes_on_where_it_stopped(bucket, gets, monkeypatch):
    _, name = bucket
    monkeypatch.setattr(weights, "_CHUNK", 100_000)

    class Cable:
        """Fails when a second chunk of the large file arrives."""

        def __init__(self, **_):
            self.seen = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def update(self, amount):
            self.seen += amount
            if self.seen >= 200_000:
                raise ConnectionError("the line is dead")

    with monkeypatch.context() as broken:
        broken.setattr(weights, "tqdm", Cable)
        with pytest.raises(ClearError, match=r"no answer \(the line is dead\).*the download resumes"):
            fetch(f"s3://{name}/bagel/7b")
    folder = weights.home() / "weights" / name / "bagel" / "7b"
    assert not (folder / "ema.safetensors").exists()
    gets.clear()
    fetch(f"s3://{name}/bagel/7b")
    assert ("bagel/7b/ema.safetensors", "bytes=200000-") in gets
    assert (folder / "ema.safetensors").read_bytes() == FILES["ema.safetensors"]


def test_a_part_of_other_content_is_not_accepted(bucket):
    _, name = bucket
    folder = weights.home() / "weights" / name / "bagel" / "7b"
    folder.mkdir(parents=True)
    etag = hashlib.md5(FILES["ema.safetensors"]).hexdigest()
    part = folder / f"ema.safetensors.{etag}.part"
    part.write_bytes(b"x" * 1000)
    (folder / "ema.safetensors.0123.part").write_bytes(b"of an older version")
    with pytest.raises(ClearError, match="does not match the ETag"):
        fetch(f"s3://{name}/bagel/7b")
    assert not part.exists() and not (folder / "ema.safetensors.0123.part").exists()
    assert (fetch(f"s3://{name}/bagel/7b") / "ema.safetensors").read_bytes() == FILES["ema.safetensors"]


@pytest.mark.parametrize("size", [0, 1, 300_000])
def test_a_whole_part_of_an_object_whose_etag_is_no_md5_is_kept(bucket, gets, monkeypatch, size):
    """Of an object that KMS encrypts; after a kill before the rename, all of it was thrown away as damaged."""
    from moto.s3.models import s3_backends

    client, name = bucket
    content = os.urandom(size)
    client.put_object(Bucket=name, Key="kms/ema.safetensors", Body=content, ServerSideEncryption="aws:kms")
    found = [models.buckets[name] for account in s3_backends.values() for models in account.values()]
    found[0].keys["kms/ema.safetensors"]._etag = "0123456789abcdef" * 2

    def killed(part):
        raise KeyboardInterrupt

    with monkeypatch.context() as end, pytest.raises(KeyboardInterrupt):
        end.setattr(weights, "sync", killed)
        fetch(f"s3://{name}/kms")
    gets.clear()
    assert (fetch(f"s3://{name}/kms") / "ema.safetensors").read_bytes() == content
    assert gets == [("kms/ema.safetensors", f"bytes={size - 1}-" if size > 1 else None)]


@pytest.mark.parametrize("size", [5 * MIB, 8 * MIB])
def test_uploads_in_parts_are_verified(bucket, size):
    client, name = bucket
    content = os.urandom(2 * size + 1000)
    client.put_object(Bucket=name, Key="parts/llm_config.json", Body=b"{}")
    from io import BytesIO

    client.upload_fileobj(
        BytesIO(content), name, "parts/big", Config=TransferConfig(multipart_threshold=MIB, multipart_chunksize=size)
    )
    etag = client.head_object(Bucket=name, Key="parts/big")["ETag"].strip('"')
    file = fetch(f"s3://{name}/parts") / "big"
    assert etag.endswith("-3") and etag_matches(file, etag)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not etag_matches(file, etag)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://no-such-bucket-here/bagel", "NoSuchBucket: .*; check the bucket's name and AWS_ENDPOINT_URL"),
        ("s3://{name}/nothing", "holds no files; check the prefix"),
        ("s3://{name}", "is not an S3 folder; write s3://bucket/prefix"),
        ("s3://{name}/a/../../b", "leaves its folder"),
    ],
)
def test_what_is_not_there_is_named(bucket, url, message):
    with pytest.raises(ClearError, match=message):
        fetch(url.format(name=bucket[1]))


def test_without_credentials_and_without_a_server(bucket, monkeypatch):
    _, name = bucket
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ClearError, match=r"no answer .*check the network and AWS_ENDPOINT_URL"):
        fetch(f"s3://{name}/bagel/7b")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ClearError, match=r"no complete AWS credentials.*set AWS_ACCESS_KEY_ID"):
        fetch(f"s3://{name}/bagel/7b")


def test_only_readers_of_weights_fetch_them(bucket, gets):
    _, name = bucket
    config = from_dict(compose(["profile=bagel_7b_lora", f"model.checkpoint=s3://{name}/bagel/7b"]))
    assert with_local_weights(config, "degrade") is config and not gets
    found = with_local_weights(config, "sft").model.checkpoint
    assert found == str(weights.home() / "weights" / name / "bagel" / "7b") and len(gets) == len(FILES)
    url = f"s3://{name}/bagel/7b/model.safetensors"
    named = from_dict(compose(["profile=bagel_7b_lora", f"model.checkpoint={url}"]))
    assert with_local_weights(named, "sft").model.checkpoint == f"{found}/model.safetensors", "one file of the folder"
    base = f"model.base=s3://{name}/bagel/7b"
    alone = with_local_weights(
        from_dict(compose(["profile=bagel_7b_lora", "model.checkpoint=CLEAR", base])), "sft"
    ).model
    assert (alone.checkpoint, alone.base) == ("CLEAR", found), "what completes weights alone, too"
    local = from_dict(compose(["profile=bagel_7b_lora", "model.checkpoint=weights"]))
    assert with_local_weights(local, "sft") is local


def test_evaluations_fetch_them_too_whatever_the_model(bucket, gets, clear, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path / "params.yaml", ["profile=bagel_7b_lora", f"model.checkpoint=s3://{bucket[1]}/bagel/7b"])
    status, _, stderr = clear("evaluate", "base")
    assert status == 1 and "no Parquet shards here" in stderr and len(gets) == len(FILES)
