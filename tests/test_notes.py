"""Notes between flow and job: one that has not its form is said to be damaged, and stops nothing that can go on."""

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clear.errors import ClearError
from flows import sweep
from flows.batch import execute, leases
from flows.batch.cost import spent
from flows.batch.notes import FORMS, Damaged, parse
from flows.batch.request import describe
from tests.cloud import compute_of
from tests.fuzz.targets import NOTES

pytest_plugins = ["tests.cloud"]

HASH = "a" * 64
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(HASH),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*"ab", "files", "lock"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", FORMS)
def test_what_is_written_is_read_as_it_is(kind):
    note = NOTES[kind] | ({"later": "a field of a newer version"} if kind != "checkpoints" else {})
    assert parse(f"{kind}/k.json", json.dumps(note).encode()) == note


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("results", [], r"not a note of results \(the whole: Input should be an object\); delete it"),
        ("results", {"lock": []}, r"\(lock: Input should be an object\)"),
        ("results", {"lock": {"outs": [{"md5": "x"}]}}, r"\(lock\.outs\.0\.path: Field required\)"),
        ("results", {"files": {"a": "../x"}}, r"\(files\.a: String should match"),
        ("results", {"runs": {"sft": "[]"}}, r"\(runs\.sft: Input should be an object\)"),
        ("requests", {"commit": "--upload-pack=x"}, r"\(commit: String should match"),
        ("requests", {"inputs": NOTES["requests"]["inputs"] | {"x": 1}}, r"\(inputs\.x: Unexpected"),
        ("ledger", {"allowed": float("nan")}, r"\(allowed: Input should be a finite number\)"),
        ("ledger", {"cost": -1.0}, r"\(cost: Input should be greater than or equal to 0\)"),
        ("leases", {"flow_run": 3}, r"\(flow_run: Input should be a valid string\)"),
        ("checkpoints", {"model": {"sha256": "x"}}, r"\(model\.sha256: String should match"),
    ],
)
def test_a_note_without_its_form_is_damaged_and_says_where(kind, change, said):
    content = change if isinstance(change, list) else NOTES[kind] | change
    with pytest.raises(Damaged, match=said):
        parse(f"{kind}/k.json", json.dumps(content).encode())


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 60_000, b"1" * 10_000, b'{"flow_run": "x'])
def test_what_is_no_json_is_damaged(data):
    with pytest.raises(Damaged, match="not valid JSON") as error:
        parse("leases/k.json", data)
    assert "\n" not in str(error.value)


@given(st.sampled_from([*FORMS]), VALUES)
def test_whatever_a_note_holds_it_is_read_or_damaged(kind, value):
    try:
        parse(f"{kind}/k.json", json.dumps(value).encode())
    except Damaged as error:
        assert "\n" not in str(error)


def test_a_damaged_result_of_an_earlier_job_is_thrown_away_and_the_stage_asked_for_anew(training, cloud, monkeypatch):
    key = describe("sft", training).key()
    cloud.store.write(f"results/{key}.json", NOTES["results"] | {"files": ["data"]})

    def asked(work):
        raise ClearError("asked AWS")

    monkeypatch.setattr(execute._Work, "run", asked)
    said = []
    with pytest.raises(ClearError, match="asked AWS"):
        execute.reproduce("sft", training, compute_of(training), said.append)
    assert "the result of an earlier job is not used: s3://cloud/compute/results/" in said[0] and "(files: " in said[0]
    assert not cloud.store.names("results/")


def test_a_damaged_lease_does_not_keep_the_sweeper_and_a_damaged_ledger_keeps_the_budget(cloud, monkeypatch):
    cloud.store.write("leases/j/waiter.json", [])
    monkeypatch.setattr(leases, "age", lambda renewed: 60)
    assert sweep._orphaned({"jobId": "j"}, cloud.store, 10) == "nobody has asked for it for 60 min"
    cloud.store.write(f"ledger/{datetime.now(UTC):%Y-%m}/j.json", {"allowed": float("nan"), "cost": None})
    with pytest.raises(Damaged, match=r"s3://cloud/compute/ledger/.*j\.json: not a note of ledger \(allowed: "):
        spent(cloud.store)
