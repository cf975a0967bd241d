"""Healthy data pass; every injected fault is caught by name, with the sample that has it."""

import json
import re
import shutil
from dataclasses import replace
from html import escape

import cv2
import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from clear import config as configuration
from clear.data.images import decode_image, encode_image
from clear.data.records import Sample, read_samples, write_samples
from clear.data.rejects import read_rejects
from clear.data.workspace import report_dir
from clear.degradation.build import degraded_samples
from clear.degradation.corruptions import CORRUPTIONS
from clear.degradation.protocol import SEVERITIES, seed_of
from clear.errors import ClearError
from clear.sources.scenes.render import scenes
from clear.stages import degrade, mmd_bench, validate
from clear.validation import metrics
from clear.validation.expectations import Check, run_checks
from clear.validation.frames import build_frame, chi_square_p

COUNTS = {"sft": 96, "rl": 48, "validation": 16, "bench": 48, "development": 32}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A workspace after the stages degrade and mmd_bench, and its configuration."""
    folder = tmp_path_factory.mktemp("workspace")
    plain = configuration.compose(["profile=smoke", "degrade.workers=1"])
    config = configuration.from_dict(plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        OmegaConf.save(OmegaConf.create(plain), "params.yaml")
        for split, count in COUNTS.items():
            write_samples(f"data/samples/{split}", scenes(split, count, 5, 256, 4))
        degrade.run(config)
        mmd_bench.run(config)
    return folder, config


def test_a_frame_keeps_equal_answers_once_and_numbers_as_numbers():
    base = metrics.Measured("", "", "dark", "low", 0.4, 1, 2, (), decodable=True)
    rows = (
        replace(base, key=f"s{n}/dark/low", id=f"s{n}", answers=(("colour", "red"),), psnr=None if n % 2 else 20.0)
        for n in range(40)
    )
    frame = build_frame(rows)
    assert len(frame) == 40 and len(set(map(id, frame["answers"]))) == 1
    assert frame["psnr"].isna().sum() == 20 and frame["psnr"].dtype == frame["contrast"].dtype == float
    assert build_frame([]).empty


@pytest.fixture
def inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace[0])
    return workspace[1]


@pytest.fixture(scope="module")
def healthy(workspace):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace[0])
        return validate.measured_frames(1)


@pytest.fixture
def verdict(inside, healthy, tmp_path):
    """Function: check some datasets in place of the healthy ones; returns {dataset: {failed check: first keys}}."""

    def judge(*also, **changed):
        frames = {name: frame.copy() for name, frame in healthy.items()}
        frames |= {name: build_frame(map(metrics.measure, samples)) for name, samples in changed.items()}
        checks = validate.prepare(frames, inside)
        judged = {name: frames[name] for name in (*changed, *also)}
        failures = run_checks(judged, checks, tmp_path / "docs")
        return {name: {f.check.name: f.keys for f in found} for name, found in failures.items()}

    return judge


def load(name: str) -> list:
    return list(read_samples(validate.DATASETS[name]))


def test_healthy_data_pass_with_metrics_and_docs(inside):
    validate.run(inside)
    found = json.loads(validate.METRICS.read_text())
    assert found["success"] and found["rejected"] == 0
    assert found["datasets"]["bench_degraded"]["images"] == 3 * COUNTS["bench"]
    assert found["datasets"]["bench_clean"]["images_shared_with_training"] == 0
    psnr = found["datasets"]["bench_degraded"]["psnr"]
    assert len(psnr) == 16 and psnr["dark"]["low"] > psnr["dark"]["mid"] > psnr["dark"]["high"]
    assert read_rejects(validate.REJECTS) == []
    docs = report_dir() / "data_docs"
    page = (docs / "index.html").read_text()
    links = {name: link for link, name in re.findall(r'<a href="([^"]+)">(\w+)</a>', page)}
    assert links.keys() == found["datasets"].keys() and all((docs / link).is_file() for link in links.values())
    assert page.count("✓") == len(links) and "http" not in page, "it needs no network"


def test_text_from_the_data_is_no_markup_in_the_data_docs(tmp_path):
    """Great Expectations writes values that break a rule into its pages as it finds them."""
    attack = "<img src=x onerror='window.hit=1'>"
    keys = [f"{attack}{n}" for n in range(3)]
    frame = pd.DataFrame({"key": keys, "split": ["sft", attack, "a&b"], "id": [attack] * 3})
    checks = [Check("split", "split", "is known", allowed=("sft", "a&b")), Check("unique", "id", "occurs once")]
    found = run_checks({"samples": frame}, {"samples": checks}, tmp_path)["samples"]
    assert [(failure.check.name, failure.keys) for failure in found] == [
        ("split", (f"{attack}1",)),
        ("unique", tuple(frame.key)),
    ]
    pages = [file.read_text() for file in tmp_path.rglob("*.html")]
    assert not any(attack in page for page in pages) and any(escape(attack) in page for page in pages)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_clean_image_passed_as_degraded(verdict, inside, kind):
    samples = load("degraded_sft")
    samples[7] = replace(samples[7], degraded=encode_image(decode_image(samples[7].image), kind))
    assert samples[7].key in verdict(degraded_sft=samples)["degraded_sft"]["changed"]


def test_benchmark_image_in_training(verdict, inside):
    training, bench = load("degraded_rl"), load("bench_clean")
    _, other = cv2.imencode(".bmp", cv2.imdecode(np.frombuffer(bench[4].image, np.uint8), cv2.IMREAD_COLOR))
    training[3] = replace(training[3], image=other.tobytes())  # the same pixels in other bytes
    found = verdict("bench_clean", "bench_degraded", degraded_rl=training)
    assert found["bench_clean"]["shared_images"] == (bench[4].key,)
    assert [key.split("/")[0] for key in found["bench_degraded"]["shared_images"]] == [bench[4].id] * 3


def test_a_development_image_in_training_or_in_the_benchmark(verdict, inside):
    training, bench, development = load("degraded_rl"), load("bench_clean"), load("development_clean")
    training[3] = replace(training[3], image=development[4].image)
    found = verdict("development_clean", "development_degraded", degraded_rl=training)
    assert found["development_clean"]["shared_images"] == (development[4].key,)
    assert [key.split("/")[0] for key in found["development_degraded"]["shared_images"]] == [development[4].id] * 3
    bench[2] = replace(bench[2], image=development[7].image)
    found = verdict("development_clean", bench_clean=bench)
    assert found["development_clean"]["shared_images"] == (development[7].key,)


def test_the_development_split_has_the_form_of_the_benchmark_and_images_of_its_own(inside):
    counts = json.loads(mmd_bench.METRICS.read_text())
    sides = {}
    for name, found in (("bench", counts), ("development", counts["development"])):
        clean, degraded = ([*read_samples(f"data/{name}/{part}")] for part in ("clean", "degraded"))
        assert found["clean"]["images"] == len(clean) == COUNTS[name]
        assert found["degraded"]["images"] == len(degraded) == 3 * len(clean)
        assert {s.corruption for s in degraded} == set(CORRUPTIONS) and {s.severity for s in degraded} == set(
            SEVERITIES
        )
        assert all(len(s.questions) == 3 for s in clean + degraded)
        sides[name] = {s.image_sha256 for s in clean}
        assert sides[name] == {s.image_sha256 for s in degraded}
    assert not sides["bench"] & sides["development"]


def test_truncated_bytes(verdict, inside):
    samples = load("bench_degraded")
    samples[2] = replace(samples[2], degraded=samples[2].degraded[:-200])
    samples[5] = replace(samples[5], image=samples[5].image[:-200])
    found = verdict(bench_degraded=samples)["bench_degraded"]
    assert found["decodable"] == (samples[2].key, samples[5].key)
    assert found["hash"] == (samples[5].key,)


def test_wrong_severity_label_on_many_samples(verdict, inside):
    samples = load("degraded_sft")
    wrong = [
        replace(s, severity="low", intensity=SEVERITIES["low"], seed=seed_of(s.id, s.corruption, "low"))
        if s.severity == "high"
        else s
        for s in samples
    ]
    found = verdict(degraded_sft=wrong)["degraded_sft"]
    assert {"severity_histogram", "psnr_band", "mean_psnr_band"} <= found.keys()
    careless = [replace(s, severity="low") if s.severity == "high" else s for s in samples]
    assert "as_labelled" in verdict(degraded_sft=careless)["degraded_sft"]


def test_swapped_severities_leave_the_histogram_but_not_the_bands(verdict, inside):
    swap = {"low": "high", "mid": "mid", "high": "low"}
    samples = [
        replace(
            s,
            severity=swap[s.severity],
            intensity=SEVERITIES[swap[s.severity]],
            seed=seed_of(s.id, s.corruption, swap[s.severity]),
        )
        for s in load("bench_degraded")
    ]
    found = verdict(bench_degraded=samples)["bench_degraded"]
    assert found.keys() == {"psnr_band", "mean_psnr_band", "monotone"}


def test_unknown_corruption_duplicated_row_and_wrong_size(verdict, inside):
    samples = load("degraded_sft")
    samples[0] = replace(samples[0], corruption="fog")
    samples[9] = replace(samples[9], degraded=encode_image(decode_image(samples[9].degraded)[:-8], "jpeg"))
    samples.append(samples[4])
    found = verdict(degraded_sft=samples)["degraded_sft"]
    assert found["corruption_known"] == (samples[0].key,)
    assert found["same_size"] == (samples[9].key,)
    assert set(found["unique"]) == set(found["copies"]) == {samples[4].key}
    assert "corruption_histogram" in found


def test_one_answer_to_everything(verdict, inside):
    samples = [
        replace(s, questions=tuple(replace(q, task="count", answer="2") for q in s.questions))
        for s in load("degraded_rl")
    ]
    assert "answers_balanced" in verdict(degraded_rl=samples)["degraded_rl"]


def test_failing_stage_writes_everything_and_then_stops(inside, tmp_path, monkeypatch):
    shutil.copytree("data", tmp_path / "data", dirs_exist_ok=True)
    samples = load("degraded_validation")
    samples[1] = replace(samples[1], degraded=samples[1].degraded[:500])
    write_samples(tmp_path / validate.DATASETS["degraded_validation"], samples)
    shutil.copy("params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClearError, match=f"degraded_validation fails 'decodable' .*: {samples_key(1)}"):
        validate.run(inside)
    found = json.loads(validate.METRICS.read_text())
    failed = found["datasets"]["degraded_validation"]["failed"]
    assert not found["success"] and failed == [{"expectation": "decodable", "count": 1, "ids": [samples_key(1)]}]
    (reject,) = read_rejects(validate.REJECTS)
    assert (reject.id, reject.subset, reject.reason) == (samples_key(1), "degraded_validation", "decodable")
    assert "500 bytes are not a complete image" in reject.detail
    assert "✗ decodable (1)" in (report_dir() / "data_docs" / "index.html").read_text()


def samples_key(index: int) -> str:
    return load("degraded_validation")[index].key


def test_full_protocol_gives_all_variants(inside, tmp_path, monkeypatch):
    for split in ("bench", "development"):
        write_samples(tmp_path / "data/samples" / split, scenes(split, 2, 5, 256, 4))
    monkeypatch.chdir(tmp_path)
    full = replace(inside, mmd_bench=replace(inside.mmd_bench, protocol="full"))
    mmd_bench.run(full)
    variants = {s.key for s in read_samples("data/bench/degraded")}
    assert len(variants) == 2 * 48
    counts = json.loads(mmd_bench.METRICS.read_text())["degraded"]
    assert counts["images"] == 96 and counts["cells"]["jpeg"]["low"]["images"] == 2


def test_a_picture_without_colour_has_none_to_lose():
    """Its copy is not compared; every other corruption of it is, and so is that of a coloured picture."""
    shades = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8) * 2
    for name, array in (
        ("scan", np.repeat(shades[:, :, None], 3, 2)),
        ("photo", np.stack([shades, shades.T // 2, 255 - shades], 2)),
    ):
        sample = Sample(name, "folder", "sft", encode_image(array), "", ())
        cells = [(sample, kind, "high") for kind in (metrics.COLOUR, "dark")]
        faded, dark = map(metrics.measure, degraded_samples(cells, 0.4, workers=1))
        assert dark.difference > 0 and dark.psnr
        assert (faded.difference is None and faded.psnr is None) == (name == "scan") and faded.same_size


def test_image_metrics_against_known_values():
    from skimage.metrics import peak_signal_noise_ratio

    rng = np.random.default_rng(0)
    one = rng.integers(0, 256, (64, 64, 3), np.uint8)
    two = np.clip(one + rng.normal(0, 20, one.shape), 0, 255).astype(np.uint8)
    assert metrics.psnr(one, two) == pytest.approx(peak_signal_noise_ratio(one, two))
    assert metrics.psnr(one, one) == metrics.IDENTICAL_PSNR and metrics.ssim(one, one) == pytest.approx(1)
    assert 0 < metrics.ssim(one, two) < 1
    grey = np.repeat(np.arange(4, dtype=np.uint8), 16).reshape(8, 8)
    assert metrics.entropy(grey) == pytest.approx(2)
    assert metrics.sharpness(np.full((8, 8), 9, np.uint8)) == 0
    assert metrics.dhash(one) == metrics.dhash(np.clip(one.astype(int) + 1, 0, 255).astype(np.uint8))


def test_damage_that_is_held_out_and_trained_all_the_same_is_found(healthy, inside, tmp_path):
    """As it came: the other kinds and the benchmark, which has them all, are as they should be."""
    frames = {name: frame.copy() for name, frame in healthy.items()}
    config = replace(inside, degrade=replace(inside.degrade, held_out=["dark"]))
    failures = run_checks(frames, validate.prepare(frames, config), tmp_path / "docs")
    found = [(name, failure.check.name) for name, failed in failures.items() for failure in failed]
    assert found == [("degraded_sft", "corruption_histogram"), ("degraded_rl", "corruption_histogram")]


def test_what_is_held_out_is_in_no_training_split_and_in_every_other(inside, tmp_path, monkeypatch):
    left = ("dark", "jpeg")
    config = replace(
        inside, degrade=replace(inside.degrade, held_out=[kind for kind in CORRUPTIONS if kind not in left])
    )
    monkeypatch.chdir(tmp_path)
    for split in ("sft", "rl", "validation"):
        write_samples(f"data/samples/{split}", scenes(split, 16, 5, 256, 4))
    degrade.run(config)
    counts = json.loads(degrade.METRICS.read_text())["images"]
    assert counts["sft"].keys() == counts["rl"].keys() == set(left)
    assert counts["validation"].keys() == set(CORRUPTIONS)


def test_chi_square():
    assert chi_square_p({"a": 50, "b": 50}, {"a": 1, "b": 1}) == pytest.approx(1)
    assert chi_square_p({"a": 90, "b": 10}, {"a": 1, "b": 1}) < 1e-6
    assert chi_square_p({"a": 1, "c": 1}, {"a": 1, "b": 1, "c": 0}) == 0
    assert chi_square_p({"a": 5}, {"a": 1, "b": 0}) == 1
