"""A set that is bad as a whole is refused by name, value and threshold, at 10 rows and at 10,000; good sets pass."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from clear import config as configuration
from clear.data.images import decode_image, encode_image
from clear.data.records import write_samples
from clear.degradation.corruptions import CORRUPTIONS, corrupt
from clear.degradation.protocol import SEVERITIES
from clear.errors import ClearError
from clear.project.retrain.intake import problem_of
from clear.sources.scenes.render import scenes
from clear.stages import degrade, mmd_bench, validate
from clear.validation import accept
from clear.validation.incoming import check, lines
from tests.helpers.incoming_sets import SCENES, put

LIMITS = configuration.from_dict(configuration.compose()).incoming.limits


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """The configuration of a working directory that has parameters and no data."""
    plain = configuration.compose(["profile=smoke", "degrade.workers=1"])
    OmegaConf.save(OmegaConf.create(plain), tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    return configuration.from_dict(plain)


def write(name: str, rows: list[dict]) -> Path:
    folder = Path("data/incoming", name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def failures(verdict) -> dict[str, str]:
    """Text by name of what failed."""
    return {failed["expectation"]: failed["means"] for failed in verdict.failed}


def limited(config, **limits):
    """The configuration with other limits."""
    return replace(config, incoming=replace(config.incoming, limits=replace(config.incoming.limits, **limits)))


def black(seed: int) -> bytes:
    """A picture of a camera that saw nothing: black with sensor noise."""
    noise = np.random.default_rng(seed).normal(2, 2, (96, 128, 3))
    return encode_image(np.clip(noise, 0, 255).astype(np.uint8))


@pytest.mark.slow
def test_a_set_of_which_most_rows_are_unusable_is_refused(inside):
    put(Path("data/incoming/road"), range(6))
    usable = Path("data/incoming/road/rows.jsonl").read_text().splitlines()[:24:4]  # one question a picture
    absent = [json.dumps({"image": f"{n}_absent.jpg", "question": "q", "answer": "a"}) for n in range(8)]
    Path("data/incoming/road/rows.jsonl").write_text("\n".join([*usable, *absent]) + "\n")
    verdict = check("road", limited(inside, bench=0))
    assert (verdict.success, verdict.accepted, verdict.rejected) == (False, 6, 8)
    assert list(failures(verdict)) == ["few_rejected"]
    said = "\n".join(lines(verdict))
    assert "road: NOT good" in said
    assert "at most 20% of the rows are rejected (incoming.limits.rejected): 8 of 14 are; correct the rows" in said
    assert check("road", limited(inside, bench=0, rejected=0.6)).success


def test_a_dozen_black_pictures_that_are_all_answered_red_are_refused_for_both(inside):
    folder = write("ward", [{"image": f"{n}.png", "question": "which colour", "answer": "red"} for n in range(12)])
    for n in range(12):
        (folder / f"{n}.png").write_bytes(black(n))
    verdict = check("ward", limited(inside, bench=0))
    found = failures(verdict)
    assert set(found) == {"few_blank", "answers_vary"} and verdict.accepted == 12
    assert "below 1 grey levels (incoming.limits.contrast): 12 of 12 do" in found["few_blank"]
    assert "more than 70% of the questions" in found["answers_vary"]
    assert "'red' answers 12 of 12" in found["answers_vary"] and "alpha = 0.05" in found["answers_vary"]
    names = [failed["ids"] for failed in verdict.failed]
    assert all(one.startswith("ward-") for ids in names for one in ids)

    (folder / "0.png").write_bytes(SCENES[0].image)  # one good picture among eleven black ones
    assert "11 of 12 do" in failures(check("ward", inside))["few_blank"]


def test_a_set_without_pictures_to_measure_on_is_refused(inside):
    put(Path("data/incoming/road"), range(12))
    verdict = check("road", limited(inside, bench=9))
    (found,) = failures(verdict).items()
    assert found[0] == "enough_bench" and found[1].startswith("at least 9 pictures are in the benchmark slice")
    assert f"{verdict.slices['bench']} of 12 are; add pictures, or raise incoming.bench_share" in found[1]
    none = replace(inside, incoming=replace(inside.incoming, bench_share=0.0))
    assert list(failures(check("road", none))) == ["enough_bench"]
    assert "error" not in failures(check("road", inside))


def test_a_good_set_of_a_dozen_pictures_passes(inside):
    put(Path("data/incoming/road"), range(12))
    verdict = check("road", inside)
    assert verdict.success and verdict.slices["bench"] >= LIMITS.bench, verdict.failed


@pytest.mark.slow
def test_the_stage_refuses_what_the_check_refuses(inside):
    for split in ("pretrain", "sft", "rl", "validation", "bench", "development"):
        write_samples(f"data/samples/{split}", scenes(split, 16, 5, 256, 4))
    put(Path("data/incoming/road"), range(12))
    with Path("data/incoming/road/rows.jsonl").open("a") as file:
        file.write("no json\n" * 60)
    degrade.run(inside)
    mmd_bench.run(inside)
    with pytest.raises(ClearError, match=r"incoming_road fails 'few_rejected' .*60 of 108 are; correct") as refused:
        validate.run(inside)
    assert "\n" not in str(refused.value)
    write("road", [{"image": "absent.jpg", "question": "q", "answer": "a"}])
    degrade.run(inside)
    mmd_bench.run(inside)
    with pytest.raises(ClearError, match=r"data/incoming/road: none of its \d+ rows can be used"):
        validate.run(inside)


def test_a_retraining_is_told_the_reason_in_one_line(inside):
    folder = write("ward", [{"image": f"{n}.png", "question": "which colour", "answer": "red"} for n in range(12)])
    for n in range(12):
        (folder / f"{n}.png").write_bytes(black(n))

    def run(command: list[str], copy: Path) -> tuple[int, list[str]]:
        verdict = check(command[-1], inside)
        return 1, lines(verdict)

    problem = problem_of("ward", Path(), run)
    assert "'few_blank' fails: not true that at most 10% of the pictures" in problem and "12 of 12 do" in problem
    assert "'answers_vary' fails" in problem and "\n" not in problem


def test_no_corruption_at_its_worst_makes_a_blank_picture():
    """The limit is far below what a degraded picture has, and above a black frame with noise."""
    blank = [accept.contrast(decode_image(black(n))) for n in range(8)]
    assert max(blank) < 0.7 * LIMITS.contrast
    worst = min(
        accept.contrast(corrupt(name, decode_image(sample.image), SEVERITIES["high"], np.random.default_rng(n), 0.4))
        for name in CORRUPTIONS
        for n, sample in enumerate(SCENES[:4])
    )
    assert worst > 3 * LIMITS.contrast
    one_colour = np.zeros((64, 64, 3), np.uint8)
    one_colour[:, 32:, 2] = 200  # blue has the smallest share of grey
    assert accept.contrast(one_colour) > 50


def answered(*tasks: tuple[str, list[str]]) -> pd.DataFrame:
    """A frame with one question per row: (task, answers)."""
    return pd.DataFrame({"answers": [((task, answer),) for task, answers in tasks for answer in answers]})


def refused(frame: pd.DataFrame) -> bool:
    accept.add_answer_p(frame, LIMITS.answer)
    return bool((frame["answer_p"] < LIMITS.alpha).any())


def test_one_answer_is_noticed_in_small_and_in_large_sets():
    assert not refused(answered(("colour", ["red"] * 8))), "eight of eight may be chance"
    assert refused(answered(("colour", ["red"] * 9)))
    assert refused(answered(("colour", ["Red", "red ", "red."] * 3))), "as answers are compared"
    assert not refused(answered(("colour", ["red"] * 7075 + ["blue"] * 2925)))
    assert refused(answered(("colour", ["red"] * 7080 + ["blue"] * 2920)))
    assert refused(answered(*((f"task {n}", ["red"] * 3) for n in range(4)))), "over all tasks"
    mixed = answered(("colour", ["red"] * 20), ("count", ["1", "2", "3", "4"] * 10))
    assert refused(mixed), "within a task"
    assert list(mixed["answer_p"] < LIMITS.alpha) == [True] * 20 + [False] * 40, "the rows that are to blame"
    assert not refused(answered(("colour", [])))


DRAWS = 150


@pytest.mark.parametrize("rows", [10, 48])
def test_the_rate_of_false_alarms_is_as_stated(rows):
    """Good sets drawn at random: yes-no questions, four answers, four tasks of both kinds, and shares at the limit."""
    generator = np.random.default_rng(rows)

    def alarms(shares: list[float], tasks: int) -> float:
        found = 0
        for _ in range(DRAWS):
            drawn = generator.choice(len(shares), size=(tasks, rows // tasks), p=shares).astype(str).tolist()
            found += refused(answered(*((f"task {n}", answers) for n, answers in enumerate(drawn))))
        return found / DRAWS

    assert alarms([0.5, 0.5], 1) <= 0.01
    assert alarms([0.25] * 4, 1) == 0
    assert alarms([0.5, 0.5], 4) <= 0.01
    assert alarms([0.6, 0.4], 1) <= 0.02
    assert alarms([0.7, 0.3], 1) <= 0.075, "at the limit itself: the level, and three standard errors"
