"""The report of a workspace with planted effects: claims, tables, pictures, and what it says of missing inputs."""

import json
import re
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clear.bench import predictions
from clear.bench.models import MODELS
from clear.data.images import encode_image
from clear.data.io import write_json
from clear.data.records import Question, Sample, read_samples, sha256, write_samples
from clear.errors import ClearError
from clear.report import calling, render, tables
from clear.report import claims as claim_rules
from clear.report import verdict as verdicts
from clear.report.claims import Bootstrap
from clear.stages import report

CORRUPTIONS = (
    *("motion_blur", "lens_blur", "gaussian_noise", "block_exchange", "jpeg", "mean_shift", "color_diffusion"),
    *("sharpness", "dark", "hsv_saturation", "turbulence", "dirty_lens", "scan_lines", "graffiti"),
    *("watermark_damage", "lens_flare"),
)
FLOATS = ("psnr_degraded", "psnr_restored", "ssim_degraded", "ssim_restored")
TASKS = ("attribute", "existence", "pair", "reading", "reasoning", "spatial")
LEVELS = ("clean", "low", "mid", "high")
RIGHT = {
    "base": (0.93, 0.88, 0.80, 0.55),
    "sft_direct": (0.94, 0.91, 0.86, 0.66),
    "sft": (0.93, 0.87, 0.82, 0.68),
    "reencode": (0.93, 0.88, 0.83, 0.72),
    "bridge": (0.93, 0.88, 0.83, 0.72),
    "grpo": (0.93, 0.90, 0.87, 0.80),
}
CALLS = {
    "base": (0, 0, 0, 0),
    "sft_direct": (0, 0, 0, 0),
    "sft": (0.01, 0.05, 0.1, 0.45),
    "reencode": (0.02, 0.07, 0.14, 0.5),
    "bridge": (0.02, 0.07, 0.14, 0.5),
    "grpo": (0.05, 0.18, 0.33, 0.68),
}
SHARED = Bootstrap(resamples=400)


def picture(seed: int, size: int = 48) -> np.ndarray:
    """A grid of coloured squares."""
    colours = np.random.default_rng(seed).integers(30, 230, (3, 3, 3))
    return np.kron(colours, np.ones((size // 3, size // 3, 1))).astype(np.uint8)


def damaged(seed: int, size: int = 48) -> np.ndarray:
    noise = np.random.default_rng(seed + 1).normal(0, 60, (size, size, 3))
    return np.clip(picture(seed, size) + noise, 0, 255).astype(np.uint8)


def question_of(image: int, number: int) -> tuple[str, str, str, str, str]:
    """(question id, task, pair, text, answer) of question `number` of image `image`; partners are 2k and 2k + 1."""
    task = TASKS[(image // 2 + number) % len(TASKS)]
    pair = f"pair{image // 2}" if task == "pair" else ""
    answer = ("red", "blue", "green", "white")[(image // 2 + image + number) % 4]
    return f"q{image:04d}-{number}", task, pair, f"what is the {task} of object {number} ?", answer


@cache
def draw(*seed: int) -> tuple[float, float, float]:
    return tuple(np.random.default_rng(seed).random(3))


def rows_of(model: str, images: int, right=RIGHT, calls=CALLS, tied=0.3) -> list[dict]:
    """Predictions with planted accuracies and call rates; the difficulty of a question is shared by all models.

    A restoration is more likely by the share `tied` where the base fails.
    """
    rows = []
    for level, severity in enumerate(LEVELS):
        for image in range(images):
            corruption = "clean" if severity == "clean" else CORRUPTIONS[(image // 2) % len(CORRUPTIONS)]
            for number in range(3 if severity == "clean" else 1):
                difficulty, own, call = draw(level, image, number)
                noise = draw(level, image, number, list(MODELS).index(model))[0]
                score = difficulty if own < 0.7 else noise
                base = difficulty if own < 0.7 else draw(level, image, number, 0)[0]
                rate = calls[model][level] * (1 + tied if base >= right["base"][level] else 1 - tied / 2)
                restored, correct = bool(call < rate), bool(score < right[model][level])
                name, task, pair, text, answer = question_of(image, number)
                silent = not correct and noise > 0.97
                said = answer if correct else "" if silent else "black"
                base_psnr = {"clean": None, "low": 25.0, "mid": 20.5, "high": 16.0}[severity]
                gallery = restored and severity == "high" and image < 40
                rows.append(
                    {
                        "sample": f"s{image:04d}",
                        "corruption": corruption,
                        "severity": severity,
                        "question": name,
                        "task": task,
                        "pair": pair,
                        "text": text,
                        "answer": answer,
                        "prediction": said,
                        "output": f"<think>{'blurred, restore' if restored else 'clear enough'}</think>"
                        + ("<image_restore><think>now it is red</think>" if restored else "")
                        + ("" if silent else f"<answer>{said}</answer>"),
                        "restored": restored,
                        "correct": correct,
                        "tokens": 12,
                        "psnr_degraded": base_psnr and base_psnr + 2 * difficulty,
                        "ssim_degraded": base_psnr and base_psnr / 30,
                        "psnr_restored": 21.0 + 2 * difficulty + 2 * own if restored else None,
                        "ssim_restored": 0.8 if restored else None,
                        "restored_png": encode_image(picture(image)) if gallery else None,
                    }
                )
    return rows


def frames_of(images: int = 300, right=RIGHT, calls=CALLS, models=MODELS, tied=0.3) -> dict:
    import pandas as pd

    made = {model: pd.DataFrame(rows_of(model, images, right, calls, tied)) for model in models}
    return {model: frame.astype(dict.fromkeys(FLOATS, float)) for model, frame in made.items()}


def decide(frames: dict) -> dict:
    return {claim.id: claim for claim in claim_rules.evaluate(frames, SHARED)}


def bench_samples(images: int):
    for image in range(images):
        clean = encode_image(picture(image, 96))
        for severity in LEVELS[1:]:
            yield Sample(
                id=f"s{image:04d}",
                source="scenes",
                split="bench",
                image=clean,
                image_sha256=sha256(clean),
                questions=(Question("q", "attribute", "?", "red"),),
                degraded=encode_image(damaged(image, 96)),
                corruption=CORRUPTIONS[(image // 2) % len(CORRUPTIONS)],
                severity=severity,
            )


def fill(data, images: int = 300) -> None:
    """A workspace's data folder as the pipeline leaves it before the report."""
    for model in MODELS:
        predictions.write(data / f"predictions/{model}.parquet", rows_of(model, images))
    write_samples(data / "bench/degraded", bench_samples(40))
    generator = np.random.default_rng(0)
    (data / "plots").mkdir()
    phases = {"base": ("vit", "vae", "joint"), "sft": ("restoration", "traces"), "sft_direct": ("traces",)}
    for stage, names in (phases | {"bridge": ("distill", "answer")}).items():
        lines = ["phase,step,loss"]
        for phase in names:
            lines += [
                f"{phase},{s},{2 * np.exp(-s / 300) + 0.2 + generator.normal(0, 0.05):.4f}" for s in range(0, 1000, 20)
            ]
        (data / f"plots/{stage}.csv").write_text("\n".join(lines) + "\n")
    names = (
        "loss reward reward_accuracy reward_format reward_decision call_rate kl ratio_error entropy accuracy_holdout"
    )
    lines = ["phase,step," + names.replace(" ", ",")]
    for step in range(60):
        rise, wobble = step / 60, generator.normal(0, 0.02, 9)
        values = [0.1 - 0.05 * rise, 0.6 + 0.2 * rise, 0.65 + 0.15 * rise, 0.97, 0.5 + 0.1 * rise, 0.3, 0.02 * rise]
        values = [f"{value + noise:.4f}" for value, noise in zip(values, wobble, strict=False)]
        values += [
            "1.2e-06",
            f"{0.9 - 0.4 * rise + wobble[8]:.4f}",
            f"{0.7 + 0.1 * rise:.3f}" if step % 10 == 0 else "",
        ]
        lines.append(f"policy,{step}," + ",".join(values))
    (data / "plots/grpo.csv").write_text("\n".join(lines) + "\n")
    blind = {task: {"accuracy": 0.31, "chance": 0.3, "count": 500} for task in (*TASKS, "total")}
    checked = {"images": 300, "questions": 900, "expectations": 14, "failed": [], "psnr": {"low": 24.1}}
    metrics = {
        "source": {"images": {"sft": 6000, "bench": 300}, "blind_baseline": {"bench": blind}},
        "degrade": {"copies": 9000, "per_corruption": dict.fromkeys(CORRUPTIONS, 560)},
        "validate": {"success": True, "rejected": 0, "datasets": {"bench_clean": checked, "bench_degraded": checked}},
        "sft": {"loss": 0.21, "accuracy_validation": {"clean": 0.93, "high": 0.7}},
    }
    for name, value in metrics.items():
        write_json(data / f"metrics/{name}.json", value)


RECORDS = {
    "base": {"seconds": 431.2, "peak_gib": 1.61},
    "grpo": {"seconds": 240.0, "peak_mb": 1536.0, "children_peak_mb": 2.0},
    "source": {"seconds": 14.7},
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    data = tmp_path_factory.mktemp("workspace") / "data"
    data.mkdir()
    fill(data)
    return data


def make(data, out, records=None, drawn=False) -> tuple[str, str, dict]:
    """Run the stage on `data`; returns report.md, index.html and the tracked claims.

    Unless `drawn`, plots are put together and then saved as one pixel: laying out and drawing takes two thirds
    of the time.
    """
    from matplotlib.figure import Figure

    from clear.config import compose, from_dict
    from clear.data import workspace as paths

    with pytest.MonkeyPatch.context() as patch:
        if not drawn:
            pixel = encode_image(np.zeros((1, 1, 3), np.uint8))
            patch.setattr(Figure, "savefig", lambda self, file, **_: file.write_bytes(pixel))
        patch.setattr(paths, "report_dir", lambda: out)
        patch.setattr(paths, "run_records", lambda: dict(records or {}))
        report.run(from_dict(compose(["evaluate.bootstrap=400", "report.pictures=4"])), data)
    tracked = json.loads((data / "results/report.json").read_text())
    return (out / "report.md").read_text(), (out / "index.html").read_text(), tracked


def copy(data, target):
    import shutil

    return shutil.copytree(data, target / "data")


def test_a_full_workspace_gives_a_full_report(filled, tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots/example_77.png").write_bytes(b"left by an earlier report")
    text, page, tracked = make(filled, tmp_path, RECORDS, drawn=True)
    assert text.splitlines()[2].startswith("**CLEAR helps: on hard-degraded images it answers")
    assert "Incomplete" not in text
    titles = re.findall(r"^## (.*)$", text, re.M)
    assert titles[0] == "What was claimed, and what held" and titles[-1].startswith("How to reproduce")
    plots = sorted(file.name for file in (tmp_path / "plots").iterdir())
    names = ["accuracy", "call_rate", "corruptions", "losses", "quality", "restorations", "rewards"]
    assert plots == sorted(f"{name}.png" for name in [*names, *(f"example_0{number}" for number in range(1, 5))])
    assert page.count("data:image/png;base64,") == len(plots)
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page
    assert all(f"plots/{name}" in text for name in plots)
    assert "| bench_clean | 300 | 900 | 14 | none |" in text and "Every check passed; samples rejected: 0" in text
    assert "| all stages | 11:25 | 1.61 |" in text
    assert {key: claim["held"] for key, claim in tracked["claims"].items()} == dict.fromkeys(tracked["claims"], True)
    assert not tracked["missing_models"]
    make(filled, tmp_path / "again", RECORDS, drawn=True)
    files = [file.relative_to(tmp_path / "again") for file in (tmp_path / "again").rglob("*") if file.is_file()]
    assert len(files) == len(plots) + 2
    assert all((tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


def test_a_missing_model_is_said_first_and_is_in_no_table(filled, tmp_path):
    data = copy(filled, tmp_path)
    (data / "predictions/sft_direct.parquet").unlink()
    text, page, tracked = make(data, tmp_path / "out")
    head = "\n".join(text.splitlines()[:6])
    assert "Incomplete: 1 of 6 models" in head and "data/predictions/sft_direct.parquet" in head
    assert "Incomplete: 1 of 6 models" in page
    assert "| direct fine-tuning |" not in text
    claim = tracked["claims"]["beats_direct"]
    assert (claim["measured"], claim["held"], claim["estimate"], claim["verdict"]) == (
        False,
        False,
        None,
        "not measured",
    )
    assert tracked["missing_models"] == ["sft_direct"]
    assert tracked["claims"]["hard_gain"]["held"]


def test_nothing_but_configuration_still_gives_an_honest_report(tmp_path):
    text, _, tracked = make(tmp_path / "data", tmp_path / "out")
    assert "cannot be said from this run" in text.splitlines()[2]
    assert "Incomplete: 6 of 6 models" in text.splitlines()[4]
    assert tracked["not_measured"] == len(tracked["claims"]) and tracked["held"] == 0


def test_no_run_records_empty_curves_and_no_kept_pictures(filled, tmp_path):
    data = copy(filled, tmp_path)
    for file in (data / "plots").iterdir():
        file.write_text("phase,step,loss\n")
    (data / "plots/base.csv").write_text("")
    rows = [row | {"restored_png": None} for row in rows_of("grpo", 300)]
    predictions.write(data / "predictions/grpo.parquet", rows)
    text, _, _ = make(data, tmp_path / "out")
    assert "No run records are here" in text
    assert "No training curve was recorded." in text
    assert "there are no examples" in text


def test_text_from_a_model_cannot_become_markup(tmp_path):
    quote = render.Quote("base: “<b>”, wrong", "<script>alert(1)</script>")
    page = render.html("tiny", ["<i>"], [render.Section("Examples", [quote])], tmp_path)
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>" not in page and "<i>" not in page


def test_planted_effects_are_found():
    found = decide(frames_of())
    assert all(claim.held and claim.measured for claim in found.values())
    assert found["hard_gain"].low > 0
    assert found["hard_gain"].estimate == pytest.approx(0.25, abs=0.06)
    assert found["bridge_kept"].estimate == pytest.approx(0, abs=0.05)
    assert "→" in found["calls_needed"].note and found["calls_needed"].unit == "odds"


@pytest.mark.parametrize(
    ("claim", "right", "calls"),
    [
        ("base_clean", {"base": (0.7, 0.7, 0.6, 0.5)}, {}),
        ("base_drops", {"base": (0.93, 0.93, 0.93, 0.93)}, {}),
        ("hard_gain", {"grpo": RIGHT["base"]}, {}),
        ("clean_kept", {"grpo": (0.88, 0.9, 0.87, 0.8)}, {}),
        ("beats_direct", {"grpo": RIGHT["sft_direct"]}, {}),
        ("bridge_kept", {"bridge": (0.93, 0.88, 0.8, 0.55)}, {}),
    ],
)
def test_a_claim_falls_with_its_effect(claim, right, calls):
    found = decide(frames_of(right=RIGHT | right, calls=CALLS | calls))
    assert found[claim].measured and not found[claim].held
    assert found[claim].verdict == "does not hold"


def test_a_gain_within_the_noise_does_not_hold():
    frames = frames_of(images=16, right=RIGHT | {"grpo": (0.93, 0.9, 0.87, 0.62)})
    claim = decide(frames)["hard_gain"]
    assert not claim.held or claim.low > 0
    assert claim.detectable > 0.1


def test_models_asked_other_questions_are_not_compared():
    frames = frames_of(images=20)
    with pytest.raises(ClearError, match=r"grpo\.parquet lacks 1 rows .* s0000/clean/clean/q0000-0"):
        decide(frames | {"grpo": frames["grpo"].iloc[1:]})
    with pytest.raises(ClearError, match="another question or gold answer"):
        decide(frames | {"grpo": frames["grpo"].assign(answer="green")})


def test_levels_are_compared_on_the_questions_that_all_of_them_share():
    frames = frames_of()
    extra = (frames["base"].severity == "clean") & ~frames["base"].question.str.endswith("-0")
    wrong = frames["base"].assign(correct=frames["base"].correct & ~extra)
    found, other = decide(frames)["base_drops"], decide({"base": wrong})["base_drops"]
    assert found.n == 600 and (other.estimate, other.low) == (found.estimate, found.low)
    only_extra = frames["base"][(frames["base"].severity != "clean") | extra]
    with pytest.raises(ClearError, match=r"No question was asked at every severity.*mmd_bench\.clean_questions"):
        decide({"base": only_extra})


def test_calls_that_follow_the_damage_and_not_the_need_show_no_need():
    """The rise alone, which the report used to take for restoring when needed."""
    found = decide(frames_of(tied=0.0))["calls_needed"]
    assert found.measured and not found.held and found.verdict == "does not hold" and found.low < 1 < found.high
    rates = [float(rate) for rate in re.findall(r"(\d+\.\d) %", found.note)]
    assert len(rates) == 4 and rates == sorted(rates), "although they rise"


def test_what_the_average_hides_is_in_the_report(tmp_path, filled):
    """CLEAR restores one kind of damage and leads there alone."""
    dark = {"correct": True, "prediction": "x", "restored": True}
    frames = frames_of(right=RIGHT | {"grpo": RIGHT["sft_direct"]}, calls=CALLS | {"grpo": (0, 0, 0, 0)})
    at = (frames["grpo"].corruption == "dark") & (frames["grpo"].severity == "high")
    frames["grpo"].loc[at, list(dark)] = list(dark.values())
    found = calling.figures(frames, SHARED)
    most = found["most_called"]
    assert (most["corruption"], most["share_of_calls"]) == ("dark", 1.0)
    assert most["minus_direct"]["low"] > 0 and most["elsewhere"]["low"] < 0.02 and most["elsewhere"]["high"] > -0.02
    assert list(found["corruptions"]) == ["high", "mid", "low"] and next(iter(found["corruptions"]["high"])) == "dark"
    cell = found["corruptions"]["high"]["dark"]
    hard = {model: frame[at.to_numpy()] for model, frame in frames.items()}
    assert cell["call_rate"] == 1 and cell["restored"]["clear"] == 1 and cell["not_restored"]["clear"] is None
    assert cell["minus_direct"]["estimate"] == pytest.approx(1 - hard["sft_direct"].correct.mean())
    assert found["restored_hard"]["questions"] == len(hard["grpo"])
    assert found["restored_hard"]["base"] == pytest.approx(hard["base"].correct.mean())
    claims = claim_rules.evaluate(frames, SHARED)
    said = " ".join(verdicts.remarks(claims, found))
    assert "100 % of the restorations at hard fall on one kind of damage, dark" in said
    text, page, tracked = make(filled, tmp_path)
    assert set(tracked["calling"]) == set(found) and tracked["verdict"][0] in text
    assert "When it restores, and whether that pays" in page and "| motion blur |" in text
    assert calling.figures({"base": frames["base"]}, SHARED) == {}
    alone = calling.figures({"grpo": frames["grpo"]}, SHARED)
    assert alone["odds"] is None and alone["corruptions"]["high"]["dark"]["minus_direct"] is None


def said_of(frames: dict) -> str:
    return verdicts.verdict(list(decide(frames).values()), frames, SHARED)


def nested(rates: dict[str, tuple[float, float]], images: int = 80) -> dict:
    """Models that answer the easiest share of the questions, at clean and at hard; a guesser is right in a quarter."""
    import pandas as pd

    frames = {}
    for model, levels in rates.items():
        rows = [
            row | {"correct": place < round(rate * images), "restored": False}
            for rate, severity in zip((levels[0], *levels[:2], levels[1]), LEVELS, strict=True)
            for place, row in enumerate(bare(images, severity))
        ]
        frames[model] = pd.DataFrame(rows)
    return frames


@cache
def bare(images: int, severity: str) -> list[dict]:
    rows = [row for row in rows_of("base", images) if row["severity"] == severity and row["question"].endswith("-0")]
    return [row | {"pair": ""} for row in rows]


share = st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.6, 0.9, 1.0])


@given(st.fixed_dictionaries({model: st.tuples(share, share) for model in ("base", "sft_direct", "grpo")}))
@example({"base": (0.9, 0.9), "sft_direct": (0.9, 0.9), "grpo": (0.9, 0.2)})  # worse
@example({"base": (0.9, 0.5), "sft_direct": (0.9, 0.9), "grpo": (0.5, 0.5)})  # behind, and loses on clean images
@example({"base": (0.9, 0.9), "sft_direct": (0.9, 0.9), "grpo": (0.9, 0.9)})  # uncertain
@example({"base": (0.9, 0.5), "sft_direct": (0.9, 0.5), "grpo": (0.9, 0.9)})  # helps
@example({"base": (0.9, 0.5), "sft_direct": (0.9, 0.9), "grpo": (0.9, 0.9)})  # no more than direct fine-tuning
@example({"base": (0.0, 0.0), "sft_direct": (0.2, 0.2), "grpo": (0.05, 0.2)})  # answers nothing
@settings(max_examples=20, deadline=None)
def test_the_first_sentence_has_the_direction_of_its_intervals(rates):
    frames = nested(rates)
    claims = claim_rules.evaluate(frames, Bootstrap(resamples=100))
    by_id = {claim.id: claim for claim in claims}
    gain, direct, kept = by_id["hard_gain"], by_id["beats_direct"], by_id["clean_kept"]
    said = verdicts.verdict(claims, frames, Bootstrap(resamples=100))
    plumbing, _, rest = said.rpartition(verdicts.PLUMBING)
    assert bool(_) == (rates["base"][0] <= 0.3 + 1e-9 and rates["base"][0] < 0.5), "said first, or not at all"
    assert plumbing == ""
    kind = next(k for k in KINDS if (said if not _ else rest.partition("%. ")[2]).startswith(f"{k}:"))
    assert (kind == verdicts.WORSE) == (gain.high < 0)
    assert (kind == verdicts.BEHIND) == (gain.high >= 0 and direct.high < 0)
    assert kind != verdicts.HELPS or (gain.low > 0 and direct.low > 0)
    assert kind != verdicts.MORE or (gain.low > 0 and direct.low <= 0 <= direct.high)
    assert (direct.high < 0) == ("direct fine-tuning" in said and ", more (difference" in said)
    assert ("loses accuracy" in said) == (kept.high < -claim_rules.MARGIN)
    level = {"hard_gain": 1, "beats_direct": 1, "clean_kept": 0}
    for name, other in {"hard_gain": "base", "beats_direct": "sft_direct", "clean_kept": "base"}.items():
        claim, at = by_id[name], level[name]
        if max(rates["grpo"][at], rates[other][at]) <= 0.2:
            assert not claim.held and "guesser" in claim.note, "two models that answer nothing show nothing"
    assert not kept.held or rates["base"][0] > 0.25


KINDS = (verdicts.WORSE, verdicts.BEHIND, verdicts.UNCERTAIN, verdicts.HELPS, verdicts.MORE)


def test_a_run_that_answers_nothing_is_a_check_of_the_plumbing_and_a_certain_loss_is_one():
    frames = nested({"base": (0.0, 0.0), "sft_direct": (0.25, 0.2), "grpo": (0.04, 0.05)})
    frames["grpo"]["restored"] = True
    claims = claim_rules.evaluate(frames, SHARED)
    said = verdicts.verdict(claims, frames, SHARED)
    assert said.startswith(
        "This run checks the plumbing and nothing else: on clean images the base model answers 0.0 %"
    )
    assert "CLEAR is worse than direct fine-tuning" in said and "helps" not in said
    remarks = " ".join(verdicts.remarks(claims, calling.figures(frames, SHARED)))
    assert "Clean pictures, which need nothing, are restored as often as the worst ones" in remarks
    assert not any(claim.held for claim in claims if claim.id in ("hard_gain", "clean_kept", "beats_direct"))


def test_verdict_is_plain_about_failure():
    frames = frames_of(right=RIGHT | {"grpo": RIGHT["base"], "sft_direct": RIGHT["base"]})
    assert said_of(frames).startswith("CLEAR does not demonstrably help")
    frames = frames_of(right=RIGHT | {"grpo": (0.9, 0.8, 0.6, 0.2)})
    assert said_of(frames).startswith("CLEAR makes the answers worse")


def test_damaged_inputs_are_named(filled, tmp_path):
    data = copy(filled, tmp_path)
    (data / "metrics/sft.json").write_text("{")
    with pytest.raises(ClearError, match=r"sft\.json: not valid JSON.*dvc repro sft"):
        report.read_metrics(data)
    (data / "plots/grpo.csv").write_text("phase,step,loss\npolicy,1,many\n")
    with pytest.raises(ClearError, match=r"grpo\.csv: column 'loss' is not numeric"):
        report.read_curves(data)
    (data / "plots/grpo.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(ClearError, match=r"grpo\.csv: column 'phase' is missing"):
        report.read_curves(data)


def test_a_picture_that_left_the_benchmark_is_an_error(filled, tmp_path):
    data = copy(filled, tmp_path)
    write_samples(data / "bench/degraded", list(read_samples(filled / "bench/degraded"))[-3:])
    with pytest.raises(ClearError, match=r"bench/degraded: image s\d+/.*dvc repro evaluate@grpo"):
        make(data, tmp_path / "out")


def test_terminal_shows_this_run_beside_the_committed_one():
    measured = {model: predictions.metrics(frame, resamples=100) for model, frame in frames_of(60).items()}
    alone = tables.terminal(measured)
    assert len(alone.splitlines()) == 2 + len(MODELS)
    beside = tables.terminal({"base": measured["base"]}, {"base": measured["sft"], "grpo": measured["grpo"]})
    lines = [line.split() for line in beside.splitlines()]
    shown = next(line for line in lines if line[:1] == ["difference"])
    gap = measured["base"]["accuracy"]["high"] - measured["sft"]["accuracy"]["high"]
    assert float(shown[4].rstrip("*")) == pytest.approx(100 * gap, abs=0.051)
    assert "CLEAR (not run)" in beside and "Not evaluated: direct fine-tuning" in beside


def test_readme_shows_the_committed_figures_and_speaks_of_models_in_its_table():
    """After `make repro`: paste `clear results --markdown` between the marks and read the sentences behind it again."""
    from clear.project import results
    from tests.conftest import ROOT

    text = (ROOT / "README.md").read_text()
    before, _, rest = text.partition("<!-- figures: `clear results --markdown` -->\n")
    block, _, after = rest.partition("\n<!-- end of figures -->\n")
    assert block.strip() == results.markdown(ROOT), "README is stale: paste `clear results --markdown`"
    measured = json.loads((ROOT / "data/metrics/evaluate_grpo.json").read_text())["questions"]
    images = json.loads((ROOT / "data/metrics/mmd_bench.json").read_text())["clean"]["images"]
    assert (
        f"{measured['high']:,} questions per level about {images} scenes" in before and len(set(measured.values())) == 1
    )
    sentences = after.partition("\n## ")[0]
    assert not re.search(r"\d\.\d|\.\d{2}|\d %", sentences), "figures stand in the block, where they are compared"
    rows = [line.split(" | ")[0].removeprefix("| ").partition(" (")[0] for line in block.strip().splitlines()[2:8]]
    assert rows == list(claim_rules.NAMES.values())
    left = " ".join(sentences.split())
    for name in sorted(rows, key=len, reverse=True):
        left = left.replace(name, "")
    assert not re.search(r"\bSFT\b|direct|GRPO|fine-tun", left), "a model that is no row of the table"
