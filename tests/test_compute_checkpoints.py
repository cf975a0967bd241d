"""Checkpoints in S3: whole, of the same inputs, undamaged, of one writer each, and no burden to the training."""

import time

import pytest

from flows.batch.checkpoints import Keeper, forget, restore
from tests.helpers.processes import next_second, wait_until

pytest_plugins = ["tests.cloud"]


def _content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder with a finished phase, a complete checkpoint and one that is being written."""
    place = tmp_path / "checkpoints" / "tiny" / "sft" / "key"
    for name in (
        "vit.safetensors",
        "joint/checkpoint-20/model",
        "joint/checkpoint-20/complete",
        "joint/checkpoint-30/model",
    ):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(name)
    (place / "joint.partial").write_text("half")
    return tmp_path / "checkpoints"


def _keeper(cloud, folder, job="job-1", key="key"):
    return Keeper(cloud.store, key, job, folder, 1, lambda line: None)


def _restored(cloud, tmp_path, key="key"):
    said = []
    target = tmp_path / f"restored-{time.monotonic_ns()}"
    found = restore(cloud.store, key, target, said.append)
    return found, _content(target) if target.exists() else {}, said


def test_only_complete_checkpoints_travel_and_only_to_the_same_inputs(cloud, folder, tmp_path):
    keeper = _keeper(cloud, folder)
    assert keeper.keep() and not keeper.keep(), "the same again is not sent"
    found, content, _ = _restored(cloud, tmp_path)
    assert found
    assert sorted(content) == [
        "tiny/sft/key/joint/checkpoint-20/complete",
        "tiny/sft/key/joint/checkpoint-20/model",
        "tiny/sft/key/vit.safetensors",
    ]
    assert _restored(cloud, tmp_path, "other")[:2] == (False, {})
    assert not _keeper(cloud, tmp_path / "empty").keep(), "nothing is no checkpoint"
    forget(cloud.store, "key")
    assert _restored(cloud, tmp_path)[0] is False


def test_shards_of_one_machine_among_several_do_not_travel(cloud, folder, tmp_path):
    shard = folder / "tiny/sft/key/joint_sharded/checkpoint-20"
    shard.mkdir(parents=True)
    (shard / "complete").touch()
    assert Keeper(cloud.store, "key", "job", folder, 1, lambda line: None, whole=False).keep()
    assert not any("_sharded" in name for name in _restored(cloud, tmp_path)[1])
    assert _keeper(cloud, folder, "alone").keep()
    next_second()  # S3 knows no more of when
    (shard / "more").touch()
    assert _keeper(cloud, folder, "alone").keep()
    assert any("_sharded" in name for name in _restored(cloud, tmp_path)[1])


def test_a_damaged_snapshot_gives_way_to_the_one_before(cloud, folder, tmp_path):
    keeper = _keeper(cloud, folder)
    keeper.keep()
    phase = folder / "tiny/sft/key/vit.safetensors"
    phase.write_text("newer")
    keeper.keep()
    assert _restored(cloud, tmp_path)[1]["tiny/sft/key/vit.safetensors"] == b"newer"
    other = tmp_path / "other"
    other.write_text("damaged")
    (newest,) = [
        one["sha256"]
        for one in cloud.store.read("checkpoints/key/job-1/manifests/00000002.json").values()
        if one["bytes"] == 5
    ]
    cloud.store.put(other, f"checkpoints/key/job-1/objects/{newest}")
    found, content, said = _restored(cloud, tmp_path)
    assert found and content["tiny/sft/key/vit.safetensors"] == b"vit.safetensors"
    assert "is not used" in said[0]
    cloud.store.write(
        "checkpoints/key/job-1/manifests/00000003.json", {"../../outside": {"sha256": newest, "bytes": 1}}
    )
    assert _restored(cloud, tmp_path)[0] and not list(tmp_path.glob("**/outside"))


def test_each_job_writes_its_own_snapshots_and_two_are_kept(cloud, folder, tmp_path):
    keepers = [_keeper(cloud, folder, job) for job in ("job-1", "job-2")]
    phase = folder / "tiny/sft/key/vit.safetensors"
    for number in range(4):
        phase.write_text(str(number))
        keepers[0].keep()
    names = cloud.store.names("checkpoints/key/")
    assert [name[-13:] for name in names if "manifests" in name] == ["00000003.json", "00000004.json"]
    assert len([name for name in names if "/job-1/objects/" in name]) == 2 + 2, "what no snapshot needs is deleted"
    assert _restored(cloud, tmp_path)[1]["tiny/sft/key/vit.safetensors"] == b"3"
    next_second()  # S3 knows no more of when
    phase.write_text("of the second job")
    keepers[1].keep()
    assert _restored(cloud, tmp_path)[1]["tiny/sft/key/vit.safetensors"] == b"of the second job"
    phase.write_text("5")
    again = _keeper(cloud, folder)
    again.keep()
    assert "checkpoints/key/job-1/manifests/00000005.json" in cloud.store.names("checkpoints/key/job-1/"), "goes on"


def test_checkpoints_are_kept_beside_the_training_whatever_s3_does(cloud, folder, monkeypatch):
    said = []
    keeper = Keeper(cloud.store, "key", "job", folder, 0.05, said.append)
    bucket = cloud.store.bucket
    object.__setattr__(cloud.store, "bucket", "no-such-bucket")
    keeper.start()
    wait_until(lambda: any("not kept" in line for line in said), 20, "a failed upload")
    object.__setattr__(cloud.store, "bucket", bucket)
    wait_until(lambda: any("checkpoint kept in S3: 3 files" in line for line in said), 20, "an upload")
    keeper.stop()
