"""A stage on AWS Batch from the flow's side: boto3 against a Batch of ours that starts the real job as a process."""

import json

from flows import compute
from tests.cloud import compute_of, dvc
from tests.conftest import git

pytest_plugins = ["tests.cloud"]


def _content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _run(training, said=None, **changes):
    settings = compute_of(training)
    for name, value in changes.items():
        setattr(settings, name, value)
    return compute.reproduce("sft", training, settings, (said if said is not None else []).append)


def test_a_stage_in_the_cloud_leaves_the_bytes_of_a_local_one(training, cloud):
    (training / "code/source.py").write_text((training / "code/source.py").read_text() + "# changed\n")
    git(training, "commit", "-qam", "another source")
    dvc(training, "repro", "source")  # dvc.lock and metrics are not committed
    said = []
    done = _run(training, said)
    (job,) = cloud.batch.jobs
    assert job in done and "USD at most" in done
    assert "│ step 10" in said
    there = {name: (training / name).read_bytes() for name in ("dvc.lock", "data/metrics/sft.json")}
    model = _content(training / "data/models/sft")
    assert model["weights"].endswith(str(len((training / "code/source.py").read_text())).encode())
    record = json.loads((training / ".clear/runs/tiny/sft.json").read_text())
    assert record["seconds"] == 1.5 and record["aws_batch"]["job"] == job and record["aws_batch"]["hours"] > 0

    assert _run(training).startswith("taken from job"), "asking again submits nothing"
    assert len(cloud.batch.jobs) == 1
    assert not cloud.store.names("checkpoints/"), "success deletes the checkpoints"
    (note,) = (cloud.store.read(name) for name in cloud.store.names("ledger/"))
    assert 0 < note["cost"] < 0.1 < note["allowed"]

    dvc(training, "repro", "--single-item", "--force", "--no-run-cache", "sft")
    assert {name: (training / name).read_bytes() for name in there} == there
    assert _content(training / "data/models/sft") == model
