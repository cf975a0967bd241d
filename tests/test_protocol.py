"""A degradation depends on the sample id, the corruption, the severity and the protocol version, and nothing else."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clear.data.images import decode_image, encode_image
from clear.data.pool import parallel
from clear.data.records import Question, Sample, sha256, write_samples
from clear.degradation.build import degraded_samples
from clear.degradation.corruptions import CORRUPTIONS
from clear.degradation.protocol import (
    BENCHMARK_WEIGHTS,
    CELLS,
    GROUPS,
    PROTOCOL_VERSION,
    SEVERITIES,
    TRAINING_WEIGHTS,
    degrade,
    draw,
    seed_of,
    training_weights,
)
from clear.errors import ClearError
from clear.stages.degrade import SAMPLES, SPLITS
from clear.stages.mmd_bench import _keep, corruption_plan
from clear.validation.frames import BANDS, PRESET_BANDS
from tests.conftest import ROOT

HALVES = (0.2, 0.3, 0.5)


def sample(number: int, pair: str = "", side: int = 64) -> Sample:
    rng = np.random.default_rng(number)
    image = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)
    data = encode_image(image)
    questions = (Question(f"{number}-a", "color", "?", "red"), Question(f"{number}-b", "pair", "?", "yes", pair=pair))
    return Sample(f"s{number:03d}", "test", "bench", data, sha256(data), questions)


def test_weights_are_the_published_ones():
    for weights in (TRAINING_WEIGHTS, BENCHMARK_WEIGHTS):
        assert weights.keys() == CORRUPTIONS.keys()
        assert [sum(weights[name] for name in names) for names in GROUPS.values()] == [100] * 4
    assert sorted(CELLS) == sorted((c, s) for c in CORRUPTIONS for s in SEVERITIES)
    assert len({c for c, _ in CELLS[:16]}) == 16 and len({s for _, s in CELLS[:3]}) == 3


def test_seeds_are_fixed_for_this_protocol_version():
    # A new value means other images: raise PROTOCOL_VERSION with it.
    assert seed_of("a", "jpeg", "low") == 10020583971112167149
    assert len({seed_of(i, c, s) for i in "abc" for c, s in CELLS}) == 3 * 48


def test_the_bands_were_measured_with_this_protocol_version():
    for file in (BANDS, PRESET_BANDS):  # else: python -m clear.validation.bands
        assert json.loads(file.read_text())["measured"]["protocol_version"] == PROTOCOL_VERSION


def test_draws_follow_the_weights_and_the_id_only():
    drawn = {f"id{i}": draw(f"id{i}", TRAINING_WEIGHTS, HALVES) for i in range(4000)}
    corruptions, severities = (Counter(pair[k] for pair in drawn.values()) for k in (0, 1))
    for name, weight in TRAINING_WEIGHTS.items():
        assert abs(corruptions[name] - 10 * weight) < 5 * (10 * weight) ** 0.5
    assert all(abs(severities[s] / 4000 - p) < 0.04 for s, p in zip(SEVERITIES, HALVES, strict=True))
    assert draw("id7", TRAINING_WEIGHTS, HALVES) == drawn["id7"]
    assert draw("x", {"jpeg": 1, "dark": 0}, (0, 0, 1)) == ("jpeg", "high")


def test_what_is_held_out_is_never_drawn_and_the_rest_as_often_beside_each_other():
    held = ("dark", "graffiti")
    weights = training_weights(held)
    drawn = Counter(draw(f"id{i}", weights, HALVES)[0] for i in range(4000))
    rest = {name: weight for name, weight in TRAINING_WEIGHTS.items() if name not in held}
    assert drawn.keys() == rest.keys()
    for name, weight in rest.items():
        expected = 4000 * weight / sum(rest.values())
        assert abs(drawn[name] - expected) < 5 * expected**0.5
    assert all(
        draw(f"id{i}", training_weights(), HALVES) == draw(f"id{i}", TRAINING_WEIGHTS, HALVES) for i in range(99)
    )
    with pytest.raises(ClearError, match=r"degrade\.held_out: 'fog' is not one of lens_blur"):
        training_weights(["fog"])


@pytest.mark.parametrize(
    ("weights", "severities", "message"),
    [
        ({"fog": 1}, HALVES, "'fog' is not a corruption"),
        ({"jpeg": 1}, (0.5, 0.5), "low, mid and high"),
        ({"jpeg": 1}, (0, 0, 0), "severity_weights"),
        ({"jpeg": -1}, HALVES, "corruption weights"),
    ],
)
def test_unusable_weights_are_refused(weights, severities, message):
    with pytest.raises(ClearError, match=message):
        draw("a", weights, severities)


def test_degrade_names_the_sample_it_refuses():
    image = decode_image(sample(1).image)
    with pytest.raises(ClearError, match="sample s1: 'fog' is not a corruption"):
        degrade(image, "fog", "low", "s1", 1.0)
    with pytest.raises(ClearError, match="sample s1: 'worst' is not a severity"):
        degrade(image, "jpeg", "worst", "s1", 1.0)
    with pytest.raises(ClearError, match="sample s1: watermark_damage needs at least 50x50"):
        degrade(image[:40], "watermark_damage", "low", "s1", 1.0)


def test_build_is_independent_of_workers_and_order():
    jobs = [(sample(i), *CELLS[(7 * i) % 48]) for i in range(70)]
    alone = list(degraded_samples(jobs, 0.4, workers=1))
    assert list(degraded_samples(jobs, 0.4, workers=2)) == alone
    backwards = list(degraded_samples(reversed(jobs), 0.4, workers=1))
    assert backwards[::-1] == alone


def test_what_is_stored_is_the_jpeg_of_the_protocol():
    one = sample(5)
    (made,) = degraded_samples([(one, "dark", "mid")], 0.4, workers=1)
    expected = degrade(decode_image(one.image), "dark", "mid", one.id, 0.4)
    assert made == replace(
        one,
        degraded=encode_image(expected, "jpeg"),
        corruption="dark",
        severity="mid",
        intensity=0.45,
        seed=seed_of(one.id, "dark", "mid"),
    )


def test_a_broken_image_stops_the_build_by_name():
    broken = replace(sample(3), image=sample(3).image[:-40])
    jobs = [(sample(1), "dark", "low"), (broken, "dark", "low")]
    with pytest.raises(ClearError, match=r"sample s003: \d+ bytes are not a complete image"):
        list(degraded_samples(jobs, 0.4, workers=1))


PROGRAM = """
from clear.config import compose, from_dict
from clear.stages import degrade
degrade.run(from_dict(compose(["degrade.workers=1", "degrade.severity_weights=[1,0,0]"])))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def grain(split: str, number: int) -> Sample:
    data = encode_image(np.random.default_rng(number).integers(0, 256, (512, 512, 3), np.uint8))
    return Sample(f"{split}{number}", "test", split, data, sha256(data))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_whatever_the_number_of_images(tmp_path):
    """From a few shards of pictures on: what is held is a shard at a time."""
    peaks = []
    for count in (500, 1000):
        folder = tmp_path / str(count)
        for split, images in zip(SPLITS, (count, 1, 1), strict=True):
            write_samples(folder / SAMPLES / split, (grain(split, number) for number in range(images)))
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) / 2**10)
    size = sum(file.stat().st_size for file in (folder / "data").rglob("*.parquet")) / 2**20
    print(f"at most {peaks[0]:.0f} and {peaks[1]:.0f} MiB in memory for {size / 2:.0f} and {size:.0f} MiB of data")
    assert size > 1024 and peaks[1] - peaks[0] < 0.15 * size


def test_progress_off_a_terminal_is_a_line_per_tenth(capsys):
    assert list(parallel(abs, range(-40, 0), workers=1, total=40, label="work")) == list(range(40, 0, -1))
    assert capsys.readouterr().err.splitlines() == [f"work: {n}/40" for n in range(4, 41, 4)]
    list(parallel(abs, range(5), workers=1))
    assert capsys.readouterr().err == ""


@settings(max_examples=30, deadline=None)
@given(singles=st.integers(16, 80), pairs=st.integers(0, 40), seed=st.integers(0, 99))
def test_benchmark_rows_are_balanced_and_keep_pairs_together(singles, pairs, seed):
    outline = [Sample(f"a{i}", "t", "bench", b"", "") for i in range(singles)]
    for i in range(pairs):
        question = Question(f"q{i}", "pair", "?", "yes", pair=f"p{i}")
        outline += [Sample(f"b{i}{half}", "t", "bench", b"", "", (question,)) for half in "xy"]
    plan = corruption_plan(outline)
    counts = Counter(name for (name,) in plan.values())
    assert max(counts.values()) - min(counts.get(c, 0) for c in CORRUPTIONS) <= 1
    assert all(plan[f"b{i}x"] == plan[f"b{i}y"] for i in range(pairs))
    np.random.default_rng(seed).shuffle(outline)
    assert corruption_plan(outline) == plan


def test_minimal_pairs_survive_the_cut_of_questions():
    assert [q.id for q in _keep(sample(1, pair="p"), 1).questions] == ["1-b"]
    assert [q.id for q in _keep(sample(1, pair="p"), 2).questions] == ["1-b", "1-a"]
    assert [q.id for q in _keep(sample(1), 1).questions] == ["1-a"]
