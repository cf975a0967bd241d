"""Results over seeds: what a run leaves, what is pooled, and what the page says of it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from clear.bench import predictions
from clear.bench.models import MODELS
from clear.bench.scoring import SEVERITIES
from clear.errors import ClearError
from clear.project import ablations, check, scratch, seeds
from clear.report import seeds as page

RIGHT = {"base": 0.5, "sft_direct": 0.6, "sft": 0.65, "reencode": 0.65, "bridge": 0.65, "grpo": 0.75}
"""Accuracy at hard of the invented predictions; on the other levels all are at .95."""


def workspace(folder, seed: int, **params):
    """A finished run of `seed` with invented predictions: 60 images in pairs, one question a level."""
    rng = np.random.default_rng(seed)
    for model in MODELS:
        rows = []
        for n in range(60):
            for severity in SEVERITIES:
                right = rng.random() < (RIGHT[model] if severity == "high" else 0.95)
                rows.append(
                    {
                        "sample": f"s{n}",
                        "corruption": "clean" if severity == "clean" else ("dark", "jpeg", "graffiti")[n % 3],
                        "severity": severity,
                        "question": "q",
                        "task": "colour",
                        "pair": f"p{n // 2}",
                        "text": "which ?",
                        "answer": f"a{n}",
                        "prediction": f"a{n}" if right else "b",
                        "output": "x" * 400,
                        "restored": model not in ("base", "sft_direct") and severity == "high" and n % 4 == 0,
                        "correct": bool(right),
                        "tokens": 5,
                    }
                    | dict.fromkeys(predictions.NULLABLE)
                )
        predictions.write(folder / f"data/predictions/{model}.parquet", rows)
    written = {"profile": "tiny", "seed": seed, "runtime": {"threads": seed}, "model": {"hidden": 8}, **params}
    (folder / "params.yaml").write_text(yaml.safe_dump(written))
    stages = {}
    for model in MODELS:
        out = {"path": seeds.PREDICTIONS.format(model), "md5": f"{model} of {seed}"}
        stages[f"evaluate@{model}"] = {"deps": [{"path": "clear/stages/evaluate.py", "md5": "1"}], "outs": [out]}
    (folder / "dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
    (folder / "docs").mkdir(exist_ok=True)
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A workspace whose own seed is 1; other seeds run in invented copies."""

    def run(folder, profile, overrides, name, targets=(), begin=None):
        seed = int(overrides[0].removeprefix("seed="))
        runs.append((profile, name, *overrides[1:], *targets, *([begin.name] if begin else [])))
        return workspace(tmp_path / "scratch" / name, seed)

    runs, stale = [], []
    monkeypatch.setenv("CLEAR_HOME", str(tmp_path))
    monkeypatch.setattr(scratch, "run", run)
    monkeypatch.setattr(check, "drifts", lambda folder: stale)
    found = workspace(tmp_path / "home", 1)
    return found, runs, stale


def test_seeds_run_aside_and_are_pooled_as_worlds_of_their_own(home):
    folder, runs, _ = home
    text = seeds.run(folder, [1, 2, 3]).read_text()
    assert runs == [("tiny", "tiny-seed-2"), ("tiny", "tiny-seed-3")]
    files = sorted((folder / seeds.FOLDER).iterdir())
    assert [file.name for file in files] == ["1.parquet", "2.parquet", "3.parquet"]
    assert max(file.stat().st_size for file in files) < 40_000, "small enough to be tracked"
    frames = {int(file.stem): pd.read_parquet(file) for file in files}
    pooled = page.pooled(frames)
    assert list(pooled) == list(MODELS) and len(pooled["grpo"]) == 3 * 60 * 4
    assert pooled["grpo"]["sample"].nunique() == 180 and pooled["grpo"]["pair"].nunique() == 90
    hard = [f[(f.model == "grpo") & (f.severity == "high")].correct.mean() for f in frames.values()]
    assert f"{100 * np.mean(hard):.1f} ({100 * min(hard):.1f}–{100 * max(hard):.1f})" in text
    assert "3 seeds (1, 2, 3)" in text and "Fewer than three" not in text
    assert page.by_task(pooled).rows[0][:2] == ["colour", "180"]
    assert page.by_task(pooled).rows[0][-1] == f"{100 * np.mean(hard):.1f}", "CLEAR is the last column"
    clean = pooled["grpo"][pooled["grpo"].severity == "clean"].correct.mean()
    row = next(row for row in page.accuracy(pooled).rows if row[0] == "CLEAR")
    assert row[5:] == [f"{100 * (1 - np.mean(hard) / clean):.1f}", "0.0 → 25.0", "5.0"]
    # A later sitting adds to what is there, and rendering alone runs nothing.
    assert "4 seeds" in seeds.run(folder, [4]).read_text()
    before = len(runs)
    assert "4 seeds" in seeds.run(folder, []).read_text() and len(runs) == before


def test_what_it_must_show_follows_the_figures(home):
    folder, _, stale = home
    lines = {row[0]: row for row in _conditions(folder, [1, 2, 3])}
    gain = lines["CLEAR over direct fine-tuning at hard: at least 3 points"]
    assert gain[2] == "holds" and gain[1].startswith("+")
    assert next(v for k, v in lines.items() if k.startswith("the drop"))[2] == "holds"
    odds = "within a kind and level, the odds of a restoration at least twice as high where the base fails"
    assert lines[odds][2] == "**does not hold**"
    for name in ("grpo", "sft_direct"):  # the models change places: nothing may be called a gain
        RIGHT[name] = 1.35 - RIGHT[name]
    try:
        lines = {row[0]: row for row in _conditions(folder, [5, 6, 7])}
    finally:
        for name in ("grpo", "sft_direct"):
            RIGHT[name] = 1.35 - RIGHT[name]
    assert lines["CLEAR over direct fine-tuning at hard: at least 3 points"][2] == "**does not hold**"


def _conditions(folder, wanted):
    shutil.rmtree(folder / seeds.FOLDER, ignore_errors=True)
    seeds.run(folder, wanted)
    frames = {int(f.stem): pd.read_parquet(f) for f in (folder / seeds.FOLDER).iterdir()}
    models = page.pooled(frames)
    return page.must_show(models, page.calling.figures(models, page.SETTINGS)).rows


def test_runs_of_other_parameters_or_results_are_not_pooled_and_those_of_rewritten_code_are(home):
    folder, _, stale = home
    seeds.run(folder, [1, 2])
    lock, params = (yaml.safe_load((folder / name).read_text()) for name in ("dvc.lock", "params.yaml"))
    edited = lock["stages"]["evaluate@base"]
    edited["deps"][0]["md5"] = "2"  # other code, the same predictions of the seed that is committed
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock))
    (folder / "params.yaml").write_text(yaml.safe_dump(params | {"runtime": {"threads": 64}}))
    assert "3 seeds" in seeds.run(folder, [3]).read_text()
    before = seeds.setting(folder)
    later = params | {"model": params.get("model", {}) | {"base": ""}}
    (folder / "params.yaml").write_text(yaml.safe_dump(later))  # a parameter that seeds of before do not have
    assert "3 seeds" in seeds.run(folder, []).read_text()
    assert seeds.setting(folder) == before, "and that changes nothing while it is empty"
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    edited["outs"][0]["md5"] = "other predictions"
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock))
    with pytest.raises(ClearError, match=r"the seeds 1, 2, 3 were run with other .* than seed 4.* cannot be pooled"):
        seeds.run(folder, [4])
    (folder / seeds.FOLDER / "4.parquet").unlink()
    edited["outs"][0]["md5"] = "base of 1"
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock))
    (folder / "params.yaml").write_text(yaml.safe_dump(params | {"model": {"hidden": 9}}))
    with pytest.raises(ClearError, match="cannot be pooled"):
        seeds.run(folder, [5])


def test_no_seed_is_run_under_a_setting_that_is_not_what_dvc_lock_has(home):
    folder, runs, stale = home
    stale.append("params.yaml: seed is 7, dvc.lock has 1: run `dvc repro`.")
    with pytest.raises(ClearError, match=r"out of date: params.yaml: seed is 7"):
        seeds.run(folder, [2])
    assert not runs


def test_an_empty_folder_says_what_to_run(home):
    folder, _, stale = home
    with pytest.raises(ClearError, match=r'make results SEEDS="1 2 3"'):
        seeds.run(folder, [])
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    del lock["stages"]["evaluate@grpo"]
    (folder / "dvc.lock").write_text(json.dumps(lock))
    with pytest.raises(ClearError, match=r"dvc.lock has no data/predictions/grpo.parquet; run `make repro`"):
        seeds.run(folder, [1])
    (folder / "dvc.lock").unlink()
    with pytest.raises(ClearError, match="run `make repro`"):
        seeds.run(folder, [1])


@pytest.mark.parametrize("folder_of", [seeds.FOLDER, seeds.ABLATIONS])
def test_a_file_that_is_none_of_a_run_is_named(home, folder_of):
    folder, _, _ = home
    seeds.run(folder, [1, 2])
    file = folder / folder_of / "2.parquet"
    file.parent.mkdir(exist_ok=True)
    whole = pd.read_parquet(folder / seeds.FOLDER / "1.parquet")
    copy = file.with_name("2 (copy).parquet")
    whole.to_parquet(copy)
    with pytest.raises(ClearError, match=r"2 \(copy\)\.parquet: the name is not that of .*; remove the file"):
        seeds.render(folder)
    copy.unlink()
    again = r"; restore it with `git checkout`, or delete it and make it again"
    for content in (b"", b"PAR1 and no more"):
        file.write_bytes(content)
        with pytest.raises(ClearError, match=rf"2\.parquet: not a readable Parquet file .*{again}"):
            seeds.render(folder)
    setting = {"clear.setting": seeds.about(folder / seeds.FOLDER / "1.parquet")["setting"]}
    two = whole[whole["model"].isin(["base", "grpo"])]
    for frame, said in (
        (whole.drop(columns="psnr_degraded"), "no column 'psnr_degraded' in this file"),
        (whole.iloc[:0], "predictions of none, expected"),
        (two, "predictions of base, grpo, expected"),
        (two.assign(model="gpt"), "predictions of gpt, expected"),
    ):
        table = pa.Table.from_pandas(frame, preserve_index=False)
        pq.write_table(table.replace_schema_metadata(setting), file)
        with pytest.raises(ClearError, match=rf"2\.parquet: {said}.*{again}"):
            seeds.render(folder)


def test_an_ablation_of_other_questions_is_named(home, monkeypatch):
    folder, _, _ = home
    seeds.run(folder, [1])
    monkeypatch.setitem(RIGHT, "grpo", 0.35)
    ablations.run(folder, ["grpo_text"])
    frames = {1: pd.read_parquet(folder / seeds.FOLDER / "1.parquet")}
    own = pd.read_parquet(folder / seeds.ABLATIONS / "grpo_text.parquet")
    remedy = r"delete its file in data/results and make it again \(`make ablations`"
    for rows, said in (
        (own.iloc[1:], r"the ablation grpo_text lacks 1 rows .* the first is 1/s0/clean/clean/q: .*"),
        (own.assign(text="what ?"), "the ablation grpo_text and the run without its change hold another question .*"),
    ):
        with pytest.raises(ClearError, match=said + remedy):
            page.page(frames, {"grpo_text": page.Ablation("", {1: rows})})


def test_an_ablation_runs_once_and_is_compared_with_its_model_question_by_question(home, monkeypatch, tmp_path):
    folder, runs, _ = home
    seeds.run(folder, [1, 2])
    runs.clear()
    monkeypatch.setitem(RIGHT, "grpo", 0.35)
    text = ablations.run(folder, ["grpo_text"]).read_text()
    assert runs == [("tiny", "tiny-grpo_text", "grpo.image_weight=0", "grpo.velocity_weight=0", "evaluate@grpo")]
    assert not (tmp_path / "scratch/tiny-grpo_text").exists(), "the copy goes once its predictions are kept"
    own, default = (
        pd.read_parquet(folder / name) for name in (seeds.ABLATIONS / "grpo_text.parquet", seeds.FOLDER / "1.parquet")
    )
    assert set(own["model"]) == {"grpo"}
    hard = [f[(f.model == "grpo") & (f.severity == "high")].correct.mean() for f in (own, default)]
    row = next(line for line in text.splitlines() if line.startswith("| `grpo_text`"))
    assert f"{100 * (hard[0] - hard[1]):+.1f} [" in row and "text term alone" in row
    ablations.run(folder, ["grpo_text"])
    assert len(runs) == 1, "what is there does not run again"
    params = yaml.safe_load((folder / "params.yaml").read_text())
    (folder / "params.yaml").write_text(yaml.safe_dump(params | {"model": {"hidden": 9}}))
    shutil.rmtree(folder / seeds.FOLDER)
    text = seeds.run(folder, [1]).read_text()
    assert "| `grpo_text`" not in text and "left out: grpo_text." in text, "another setting is not compared"
    ablations.run(folder, ["grpo_text"])
    assert len(runs) == 2


def test_an_ablation_is_compared_with_those_it_names_where_they_were_run(home, monkeypatch):
    folder, runs, _ = home
    seeds.run(folder, [1])
    assert "under the same change" not in ablations.run(folder, ["labels_20"]).read_text()
    monkeypatch.setitem(RIGHT, "sft_direct", 0.2)
    text = ablations.run(folder, ["labels_20_direct"]).read_text()
    assert [run[-1] for run in runs] == ["evaluate@bridge", "evaluate@sft_direct"]
    table = text.split("### Both models under the same change")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")][
        2:
    ]
    frames = [pd.read_parquet(folder / seeds.ABLATIONS / f"labels_20{end}.parquet") for end in ("", "_direct")]
    right = [100 * frame[frame["severity"] == "high"]["correct"].mean() for frame in frames]
    assert [row[0].split(",")[0] for row in rows] == ["CLEAR", "SFT + bridge"] and "as it is" in rows[0][1]
    assert rows[1][:2] == [
        "SFT + bridge, `labels_20`: answers of a fifth of the pictures, all restored, a fifth of the steps for replies",
        "direct fine-tuning, `labels_20_direct`: answers of a fifth of the pictures alone",
    ]
    assert rows[1][4:6] == [f"{value:.1f}" for value in right]
    assert rows[1][-1].startswith(f"{right[0] - right[1]:+.1f} ["), "paired, without the run that is not there"
    # Of another setting, they are compared with each other alone, as long as both are of the same one.
    params = yaml.safe_load((folder / "params.yaml").read_text())
    (folder / "params.yaml").write_text(yaml.safe_dump(params | {"model": {"hidden": 9}}))
    shutil.rmtree(folder / seeds.FOLDER)
    text = seeds.run(folder, [1]).read_text()
    apart = text.split("### Under another setting")[1]
    assert "### Both models" not in text and "## Ablations" not in text and "left out" not in text
    assert [line for line in table.splitlines() if "`labels_20`" in line] == [
        line for line in apart.splitlines() if "`labels_20`" in line
    ]
    assert "as it is" not in apart
    text = ablations.run(folder, ["labels_20"]).read_text()
    assert "Under another setting" not in text and "left out: labels_20_direct." in text
    assert [run[-1] for run in runs] == ["evaluate@bridge", "evaluate@sft_direct", "evaluate@bridge"]


def test_an_ablation_of_another_seed_begins_where_that_seed_ended_and_is_pooled(home, monkeypatch):
    folder, runs, _ = home
    with pytest.raises(ClearError, match="seed 2 was not run on this machine; `make results SEEDS=2` does it"):
        ablations.run(folder, ["grpo_text"], seed=2)
    seeds.run(folder, [1, 2])
    ablations.run(folder, ["grpo_text"], seed=1)
    monkeypatch.setitem(RIGHT, "grpo", 0.35)
    text = ablations.run(folder, ["grpo_text"], seed=2).read_text()
    assert runs[-1] == (
        *("tiny", "tiny-grpo_text.2", "grpo.image_weight=0", "grpo.velocity_weight=0", "evaluate@grpo"),
        "tiny-seed-2",
    )
    both = [pd.read_parquet(folder / seeds.ABLATIONS / f"grpo_text{end}.parquet") for end in ("", ".2")]
    default = [pd.read_parquet(folder / seeds.FOLDER / f"{seed}.parquet") for seed in (1, 2)]
    hard = [
        np.mean([f[(f.model == "grpo") & (f.severity == "high")].correct.mean() for f in frames])
        for frames in (both, default)
    ]
    (row,) = (line for line in text.splitlines() if line.startswith("| `grpo_text`"))
    assert "| CLEAR | 1, 2 |" in row and f"{100 * (hard[0] - hard[1]):+.1f} [" in row
    ablations.run(folder, ["grpo_text"], seed=2)
    assert len(runs) == 3, "what is there does not run again"


def test_runs_of_one_name_and_different_changes_are_not_pooled(home, monkeypatch):
    """An entry of ablations.yaml was edited between two seeds, and the page averaged over both without a word."""
    folder, _, _ = home
    seeds.run(folder, [1, 2])
    ablations.run(folder, ["grpo_kl10"], seed=2)
    listed = ablations.listed()
    for edited, said in (
        ({"changes": ("grpo.beta=0.2",)}, "grpo with grpo.beta=0.2"),
        ({"changes": ()}, "grpo with nothing changed"),
        ({"model": "bridge"}, "bridge with grpo.beta=0.1"),
    ):
        one = replace(listed["grpo_kl10"], **edited)
        monkeypatch.setattr(ablations, "listed", lambda one=one: {"grpo_kl10": one})
        page_before = (folder / seeds.PAGE).read_text()
        pair = rf"grpo_kl10\.parquet: {said}, but grpo_kl10\.2\.parquet: grpo with grpo.beta=0.1; runs of different .*"
        with pytest.raises(ClearError, match=pair + r"cannot be pooled as grpo_kl10\. Delete the file"):
            ablations.run(folder, ["grpo_kl10"], seed=1)
        assert (folder / seeds.PAGE).read_text() == page_before
    (folder / seeds.ABLATIONS / "grpo_kl10.2.parquet").unlink()
    assert "| `grpo_kl10`" in seeds.render(folder).read_text(), "the remedy"
    # Nothing is said of an old file that does not note its changes, nor of one that is compared with no other.
    file = folder / seeds.ABLATIONS / "grpo_kl10.parquet"
    file.unlink()
    monkeypatch.setattr(ablations, "listed", lambda: listed)
    ablations.run(folder, ["grpo_kl10"], seed=1)
    noted = {f"clear.{key}": text for key, text in seeds.about(file).items()}
    for name, different in (
        ("grpo_kl10.2", {"clear.seed": "2", "clear.changes": None}),
        ("grpo_kl10.3", {"clear.seed": "3", "clear.setting": "another", "clear.changes": "grpo.beta=0.3"}),
    ):
        kept = {key: text for key, text in (noted | different).items() if text is not None}
        seed = 2 if name.endswith("2") else 1
        rows = pd.read_parquet(folder / seeds.FOLDER / f"{seed}.parquet")
        table = pa.Table.from_pandas(rows[rows["model"] == "grpo"], preserve_index=False)
        pq.write_table(table.replace_schema_metadata(kept), file.with_name(f"{name}.parquet"))
    text = seeds.render(folder).read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| `grpo_kl10`"))
    assert "| CLEAR | 1, 2 |" in row and "left out: grpo_kl10." in text


def test_kinds_of_damage_that_no_training_met_are_asked_about_alone(home, monkeypatch):
    folder, _, _ = home
    seeds.run(folder, [1])
    for name, model, right in (("held_out_direct", "sft_direct", 0.3), ("held_out", "grpo", 0.8)):
        monkeypatch.setitem(RIGHT, model, right)
        text = ablations.run(folder, [name]).read_text()
    frames = [pd.read_parquet(folder / seeds.ABLATIONS / f"held_out{end}.parquet") for end in ("", "_direct")]
    hard = [f[(f.severity == "high") & f.corruption.isin(["dark", "graffiti"])].correct.mean() for f in frames]
    rows = [line for line in text.split("### Both models")[1].splitlines() if line.startswith("| CLEAR")]
    assert "everything as it is" in rows[0] and all(
        "| lens flare, scan lines, dark, graffiti | 1 |" in row for row in rows
    )
    assert f"| {100 * hard[0]:.1f} | {100 * hard[1]:.1f} |" in rows[1]
    default = pd.read_parquet(folder / seeds.FOLDER / "1.parquet")
    as_it_was = default[(default.model == "grpo") & (default.severity == "high") & (default.corruption != "jpeg")]
    assert f"| {100 * as_it_was.correct.mean():.1f} |" in rows[0]


def test_where_nothing_is_changed_all_is_trained_again(home):
    folder, runs, _ = home
    seeds.run(folder, [1])
    assert "`again`: nothing changed" in ablations.run(folder, ["again"]).read_text()
    assert runs == [("tiny", "tiny-again")]


def test_ablations_are_of_the_form_and_of_parameters_that_there_are(home, tmp_path):
    from clear.config import compose

    folder, runs, stale = home
    for ablation in ablations.listed().values():
        changed = compose(list(ablation.changes)) != compose([])
        assert changed is bool(ablation.changes) is not ablation.name.startswith("again"), ablation.name
    with pytest.raises(ClearError, match="ablation 'grpo_txt' is not one of again, again_direct"):
        ablations.run(folder, ["grpo_txt"])
    stale.append("params.yaml: seed is 7, dvc.lock has 1.")
    with pytest.raises(ClearError, match=r"out of date: params.yaml: seed is 7"):
        ablations.run(folder, ["grpo_text"])
    assert not runs
    file = tmp_path / "ablations.yaml"
    for entry, said in (
        ("{model: grpo}", "needs `model`, `set`"),
        ("{model: x, set: [], what: w}", "'x' is not one"),
        ("{model: grpo, set: [], what: w, against: [old]}", "'old', which it is compared with, is no ablation"),
        ("{model: grpo, set: [], what: w, kinds: [fog]}", "odd: kind 'fog', which is not one of"),
    ):
        file.write_text(f"odd: {entry}")
        with pytest.raises(ClearError, match=said):
            ablations.listed(file)
