"""Two sides of a comparison: what is read of them, what they share, and what differs."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from clear.bench import predictions
from clear.bench.models import MODELS
from clear.data.images import encode_image
from clear.data.io import write_json
from clear.data.records import Question, Sample, sha256, write_samples
from clear.errors import ClearError
from clear.project.compare import changes, render
from clear.project.compare import verdict as verdicts
from clear.project.compare.differences import compare, join
from clear.project.compare.load import lock_at, read_sides
from clear.report.claims import Bootstrap
from tests.conftest import git
from tests.revisions import CORRUPTIONS, GATE, IMAGES, LEVELS, RIGHT, commit, fill, lock_of, rows_of


def test_predictions_under_dvc_are_fetched_or_said_to_be_missing(project):
    from dvc.repo import Repo

    source = fill(project / "made", models=("grpo",), images=8) / "data/predictions/grpo.parquet"
    source.rename(project / "grpo.bin")
    stages = yaml.safe_load((project / "dvc.yaml").read_text())
    copy = "mkdir -p data/predictions && cp grpo.bin data/predictions/grpo.parquet"
    stages["stages"]["copy"] = {"cmd": copy, "deps": ["grpo.bin"], "outs": ["data/predictions/grpo.parquet"]}
    (project / "dvc.yaml").write_text(yaml.safe_dump(stages))
    write_json(project / "data/metrics/evaluate_base.json", {})
    with Repo() as repo:
        repo.reproduce(targets=["copy"])
    with (project / ".gitignore").open("a") as file:
        file.write("/data/predictions/\n/made/\n")
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "under DVC")
    assert "grpo.parquet" not in git(project, "ls-files")
    (project / "data/predictions/grpo.parquet").unlink()
    base, _ = read_sides(Path(), "HEAD", "HEAD")
    assert len(base.frames["grpo"]) == 8 * 8
    assert base.missing["bridge"] == "neither in git nor in dvc.lock"
    for file in (project / ".dvc/cache").rglob("*"):
        if file.is_file():
            file.chmod(0o600)
            file.unlink()
    base, _ = read_sides(Path(), "HEAD", "HEAD")
    assert "grpo" not in base.frames and "dvc pull" in base.missing["grpo"]


def test_a_damaged_file_is_named_by_its_revision(tmp_path):
    git(tmp_path, "init", "-q", "-b", "main")
    fill(tmp_path, models=("grpo",), images=4)
    (tmp_path / "data/predictions/grpo.parquet").write_text("nonsense")
    commit(tmp_path, "damaged")
    name = git(tmp_path, "rev-parse", "HEAD")[:10]
    with pytest.raises(ClearError, match=f"{name}/data/predictions/grpo.parquet: not a readable Parquet file"):
        read_sides(tmp_path, "HEAD", "HEAD")


def test_a_revision_before_there_was_a_dvc_lock_is_said_to_have_none(tmp_path):
    git(tmp_path, "init", "-q", "-b", "main")
    (tmp_path / "below").mkdir()
    (tmp_path / "below/README.md").write_text("a beginning")
    commit(tmp_path, "first")
    (tmp_path / "below/dvc.lock").write_bytes(LOCKED)
    commit(tmp_path, "later")
    for folder in (tmp_path, tmp_path / "below"):
        with pytest.raises(ClearError, match=r"^HEAD~1 has no dvc\.lock; name a later revision\.$"):
            lock_at(folder, "HEAD~1")
    assert list(lock_at(tmp_path / "below", "HEAD")) == ["grpo"]


LOCKED = b"stages: {grpo: {outs: [{path: a, md5: b}], deps: []}}"
DAMAGED = [
    ("data/metrics/validate.json", b"[]", "all of it is not"),
    ("data/metrics/validate.json", b'{"success": false, "datasets": []}', "datasets is not"),
    ("data/metrics/validate.json", b'{"datasets": {"a": {"failed": [1]}}}', r"datasets\.a\.failed\[0\] is not"),
    ("data/metrics/validate.json", b'{"success": "\xff"}', "not valid JSON"),
    ("data/metrics/validate.json", b"[" * 100_000, "not valid JSON"),
    ("data/metrics/degrade.json", b'{"images": {"sft": {"dark": 3}}}', r"images\.sft\.dark is not"),
    ("data/metrics/source.json", b'{"images": 3}', "images is not"),
    ("data/metrics/grpo.json", b'{"last_kl": "small"}', "last_kl is not"),
    ("data/metrics/evaluate_grpo.json", b'{"accuracy": {"clean": "?"}}', r"accuracy\.clean is not"),
    (".clear/runs/tiny/grpo.json", b'{"seconds": "9"}', "seconds is not"),
    ("dvc.lock", LOCKED.replace(b"path: a, ", b""), r"not a lock file of DVC \(stages\.grpo\)"),
    ("dvc.lock", LOCKED.replace(b"[{path: a, md5: b}]", b"null"), r"not a lock file of DVC \(stages\.grpo\.outs\)"),
    ("dvc.lock", LOCKED.replace(b"deps: []", b"deps: [3]"), r"not a lock file of DVC \(stages\.grpo\.deps\[0\]\)"),
    ("dvc.lock", LOCKED.replace(b"grpo", b"1"), r"not a lock file of DVC \(stages\.1\)"),
    ("params.yaml", b"profile: tiny\nseed: \xff", "byte 20 is not UTF-8"),
    ("params.yaml", b"profile: tiny\nseed: 2026-02-31", "not valid YAML"),
    ("params.yaml", b"profile: tiny\nseed: !!bool q", "not valid YAML"),
    ("infra/constraints.txt", b"torch==\xff", "byte 7 is not UTF-8"),
]


@pytest.mark.parametrize("command", ["gate", "compare"])
@pytest.mark.parametrize(("file", "content", "said"), DAMAGED)
def test_a_damaged_file_is_no_verdict(tmp_path, clear, monkeypatch, command, file, content, said):
    """Status 1 is "the change is worse"; a traceback has it, too."""
    monkeypatch.chdir(tmp_path)
    for side in ("base", "head"):
        fill(tmp_path / side, models=("grpo",), images=4)
    (tmp_path / "head" / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "head" / file).write_bytes(content)
    status, stdout, stderr = clear(command, "base", "head")
    assert (status, stdout) == (2, "") and re.match(rf"error: head/{re.escape(file)}: {said}", stderr), stderr
    assert stderr.count("\n") == 1


def test_a_picture_that_cannot_be_shown_is_no_verdict_either(tmp_path, clear, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "base", models=("grpo",), images=8)
    fill(tmp_path / "head", models=("grpo",), images=8, right=RIGHT | {"high": 0.2})
    bench_of(tmp_path / "head", 8)
    rows = predictions.read(file := tmp_path / "head/data/predictions/grpo.parquet").astype(object)
    rows = rows.where(rows.notna(), None).to_dict("records")
    predictions.write(file, [row | {"restored_png": row["restored_png"] and b"no picture"} for row in rows])
    status, stdout, stderr = clear("compare", "base", "head", "--format", "html", "--out", "out")
    assert (status, stdout) == (2, "") and "restored_png" in stderr and stderr.count("\n") == 1


def test_a_changed_benchmark_restricts_the_comparison_and_says_so(tmp_path):
    fill(tmp_path / "base")
    head = fill(tmp_path / "head")
    rows = [row for row in rows_of() if row["sample"] < "bench-0110"]
    for row in rows:
        if row["sample"] < "bench-0010" and row["psnr_degraded"] is not None:
            row["psnr_degraded"] += 0.5  # the id is the same, the picture is not
        if "bench-0010" <= row["sample"] < "bench-0015" and row["question"] == "q1":
            row["answer"] = "blue"
    for model in MODELS:
        predictions.write(head / f"data/predictions/{model}.parquet", rows)
    (head / "dvc.lock").write_text(yaml.safe_dump(lock_of(bench="b")))
    found, verdict = verdicts.decide(*read_sides(tmp_path, "base", "head"))
    kept = set(found.joined["grpo"].rows["sample"])
    assert kept == {f"bench-{image:04d}" for image in range(15, 110)}
    first = render.markdown(found, verdict).splitlines()
    assert first[0].startswith("**not distinguishable**")
    assert "The benchmark changed (dvc.lock: data/bench/clean, data/bench/degraded)" in first[2]
    assert "760 of 960 (base) and 880 (head), about 95 images" in first[2]
    assert all(d.estimate == 0 for d in found.levels)


def test_another_seed_reuses_ids_and_shares_nothing(tmp_path):
    fill(tmp_path / "base", images=20)
    fill(tmp_path / "head", images=20, damage=1.0)
    (tmp_path / "head/dvc.lock").write_text(yaml.safe_dump(lock_of(bench="b")))
    found, verdict = verdicts.decide(*read_sides(tmp_path, "base", "head"), detail=False)
    assert verdict.status == 2 and "share no benchmark images" in verdict.sentence
    assert found.joined == {}
    write_json(tmp_path / "head/data/metrics/evaluate_grpo.json", {"accuracy": {"clean": 0.9, "high": 0.655}})
    text = render.markdown(*verdicts.decide(*read_sides(tmp_path, "base", "head")))
    assert "| CLEAR | head | 90.0 | – | – | 65.5 |" in text and "says nothing about the models" in text
    # The same hash on both sides is proof enough, whatever another machine measured.
    (tmp_path / "head/dvc.lock").write_text(yaml.safe_dump(lock_of()))
    found, verdict = verdicts.decide(*read_sides(tmp_path, "base", "head"), detail=False)
    assert verdict.status == 0 and not found.joined["grpo"].restricted


def test_without_a_lock_pictures_are_matched_by_what_was_measured(tmp_path):
    for name in ("base", "head"):
        (fill(tmp_path / name, images=20) / "dvc.lock").unlink()
    found, verdict = verdicts.decide(*read_sides(tmp_path, "base", "head"), detail=False)
    assert verdict.status == 0
    assert "dvc.lock does not say on both sides" in found.notes[0]


def bench_of(folder: Path, images: int) -> None:
    def samples():
        for image in range(images):
            clean = encode_image(np.full((60, 60, 3), 40 + image, np.uint8))
            for severity in LEVELS[1:]:
                yield Sample(
                    id=f"bench-{image:04d}",
                    source="scenes",
                    split="bench",
                    image=clean,
                    image_sha256=sha256(clean),
                    questions=(Question("q0", "reading", "?", "red"),),
                    degraded=clean,
                    corruption=CORRUPTIONS[image // 2 % len(CORRUPTIONS)],
                    severity=severity,
                )

    write_samples(folder / "data/bench/degraded", samples())


def test_changed_answers_are_shown_with_pictures_and_both_traces(tmp_path):
    fill(tmp_path / "base", models=("grpo",), gate=GATE | {"pictures": 3})
    fill(tmp_path / "head", models=("grpo",), right=RIGHT | {"high": 0.4})
    bench_of(tmp_path / "head", IMAGES)
    records = {"milliseconds_per_question": 3.25, "seconds": 41.0}
    write_json(tmp_path / "head/.clear/runs/tiny/evaluate_grpo.json", records)
    found, verdict = verdicts.decide(*read_sides(tmp_path, "base", "head"))
    rows = found.joined["grpo"].rows
    lost = int((rows.correct_base & ~rows.correct_head).sum())
    page = render.html(found, verdict)
    assert f"0 became right, {lost} became wrong, 0 stayed wrong" in page
    assert page.count("data:image/png;base64,") == 2 + 3
    for text in ("CLEAR, base: “red”, right", "CLEAR, head: “blue”, wrong", "&lt;answer&gt;blue&lt;/answer&gt;"):
        assert text in page
    text = render.markdown(found, verdict)
    assert "| CLEAR | not recorded | 3.25 | 12.00 | 12.00 |" in text
    assert "| evaluate_grpo | not recorded | 41.0 |" in text
    assert "<think>look | at it</think><answer>blue</answer>" in text, "traces are quoted as they are"


def test_a_reward_that_rises_alone_is_pointed_out(tmp_path):
    base, head = fill(tmp_path / "base", images=8), fill(tmp_path / "head", images=8)
    write_json(head / "data/metrics/grpo.json", {"last_reward": 0.9, "holdout_after": 0.65})
    table, warning = changes.rewards(*read_sides(tmp_path, base.name, head.name))
    assert "rose by 0.100 while accuracy on held-out images fell by 5.0 points" in warning
    assert ["reward at the last step", "0.8", "0.9", "+0.1"] in table.rows


def test_data_changes_are_counted(tmp_path):
    base, head = fill(tmp_path / "base", images=8), fill(tmp_path / "head", images=8)
    more = {"sft": {name: {"low": 2, "mid": 3, "high": 5 + (name == "jpeg")} for name in CORRUPTIONS}}
    write_json(head / "data/metrics/degrade.json", {"images": more})
    sides = read_sides(tmp_path, base.name, head.name)
    rows = {row[0]: row[1:] for row in changes.samples(*sides).rows}
    assert rows["jpeg"] == ["2", "3", "6 (+1)", "11 (+1)"]
    assert rows["dark"] == ["2", "3", "5", "10"]
    assert rows["all"] == ["8", "12", "21 (+1)", "41 (+1)"]
    write_json(head / "data/metrics/degrade.json", {"images": more | {"rl": {"fog": {"incoming": 7}}}})
    table = changes.samples(*read_sides(tmp_path, base.name, head.name))
    assert table.header == ["corruption", "low", "mid", "hard", "as it came", "all"]
    assert ["fog", "0", "0", "0", "7 (+7)", "7 (+7)"] in table.rows
    assert table.rows[-1] == ["all", "8", "12", "21 (+1)", "7 (+7)", "48 (+8)"]
    write_json(head / "data/metrics/traces.json", {"traces": 90})
    assert changes.data_figures(*read_sides(tmp_path, base.name, head.name)).rows == [
        ["traces: traces", "absent", "90"]
    ]


nested = st.recursive(
    st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
    max_leaves=8,
)
trees = st.dictionaries(st.text("abc", min_size=1, max_size=2), nested, max_size=4)


@given(trees, trees)
@settings(max_examples=60, deadline=None)
def test_differing_leaves_are_symmetric_and_absent_between_equals(a, b):
    there, back = changes.differing(a, b), changes.differing(b, a)
    assert {(key, new, old) for key, old, new in map(_texts, there)} == set(map(_texts, back))
    assert changes.differing(a, a) == []
    assert bool(there) == (dict(changes.leaves(a)) != dict(changes.leaves(b)))


def _texts(item):
    return tuple(map(repr, item))


def test_a_difference_is_the_mean_of_the_shared_rows_and_changes_sign_with_the_sides(tmp_path):
    fill(tmp_path / "base", models=("grpo",), images=30)
    fill(tmp_path / "head", models=("grpo",), images=30, seed=3)
    base, head = read_sides(tmp_path, "base", "head")
    there = compare(base, head, "grpo", Bootstrap(resamples=100))
    back = compare(head, base, "grpo", Bootstrap(resamples=100))
    for one, other in zip(there.levels + there.tasks + there.calls, back.levels + back.tasks + back.calls, strict=True):
        assert one.estimate == -other.estimate and one.p == other.p
        assert (one.low, one.high) == pytest.approx((-other.high, -other.low))
    rows = join(base, head, "grpo").rows
    hard = rows[rows.severity == "high"]
    found = there.level("grpo", "high")
    assert found.estimate == pytest.approx(hard.correct_head.mean() - hard.correct_base.mean())
    assert (found.n, found.clusters) == (60, 15), "the two images of a minimal pair are one cluster"
    sides = there.robustness("grpo")
    assert sides["head"]["relative"] == pytest.approx(found.head / there.level("grpo", "clean").head)
    one, other = there.relative["grpo"], back.relative["grpo"]
    assert one.estimate == pytest.approx(sides["head"]["relative"] - sides["base"]["relative"])
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low)) and one.low < one.estimate < one.high


def test_a_model_that_is_hardly_ever_right_on_clean_images_has_no_relative_robustness_to_compare(tmp_path):
    for side, seed in (("base", 0), ("head", 3)):
        fill(tmp_path / side, models=("grpo",), images=30, right=RIGHT | {"clean": 0.05}, seed=seed)
    sides = read_sides(tmp_path, "base", "head")
    found = compare(*sides, "grpo", Bootstrap(resamples=500))
    assert found.level("grpo", "clean").base > 0 and found.level("grpo", "clean").head > 0
    assert found.relative == {} and found.level("grpo", "high").low is not None
    assert "robustness" in render.markdown(found, verdicts.judge(found, verdicts.policy_of(*sides)[0], []))
