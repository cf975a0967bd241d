"""Ablations: what runs, what it is compared with, and what the page says of it."""

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from clear.data import lock
from clear.errors import ClearError
from clear.project import ablations, scratch, seeds
from clear.report import seeds as page
from tests.helpers.finished_runs import RIGHT

pytest_plugins = ["tests.helpers.finished_runs"]


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
    listed = ablations.listed()
    about_another = {"grpo_text": replace(listed["grpo_text"], model="bridge")}
    with monkeypatch.context() as edited:
        edited.setattr(ablations, "listed", lambda: listed | about_another)
        ablations.run(folder, ["grpo_text"])
    assert runs.pop()[-1] == "evaluate@bridge", "another model's predictions are not those of the one it is now about"
    ablations.run(folder, ["grpo_text"])
    assert runs.pop()[-1] == "evaluate@grpo"
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


def test_an_edit_while_an_ablation_runs_names_the_next(home, monkeypatch):
    folder, runs, stale = home
    seeds.run(folder, [1])
    run = scratch.run

    def edited(*arguments):
        stale.append("params.yaml: seed is 7, dvc.lock has 1.")
        return run(*arguments)

    monkeypatch.setattr(scratch, "run", edited)
    with pytest.raises(ClearError, match=r"ablation labels_20 is not run, .*: params.yaml: seed is 7, .* done stays"):
        ablations.run(folder, ["grpo_text", "labels_20"])
    assert len(runs) == 1 and (folder / seeds.ABLATIONS / "grpo_text.parquet").exists()


def test_of_two_runs_of_one_name_the_second_waits_for_the_result_and_makes_nothing(home, monkeypatch, tmp_path):
    """The copy that the first removes was the one in which the second had begun to work."""
    folder, runs, _ = home
    seeds.run(folder, [1])
    inside, waits, run = threading.Event(), threading.Event(), scratch.run

    def locked(*arguments):
        with lock.writer(tmp_path / "scratch" / arguments[3], "wait", "scratch run", lock.remark):
            inside.set()
            assert waits.wait(60)
            return run(*arguments)

    def begin() -> None:
        try:
            ablations.run(folder, ["grpo_text"])
        except Exception as error:  # such as that of a copy that has gone
            failed.append(error)

    failed: list[Exception] = []
    monkeypatch.setattr(scratch, "run", locked)
    monkeypatch.setattr(lock, "say", lambda *_: waits.set())
    monkeypatch.setenv(lock.WHEN_BUSY, "wait")
    first, second = threading.Thread(target=begin), threading.Thread(target=begin)
    first.start()
    assert inside.wait(60)
    second.start()
    for thread in (first, second):
        thread.join()
    assert not failed and len(runs) == 1
    assert seeds.models(folder / seeds.ABLATIONS / "grpo_text.parquet") == {"grpo"}
    assert not (tmp_path / "scratch/tiny-grpo_text").exists()


def test_nobody_begins_an_ablation_whose_result_is_being_kept(home, monkeypatch):
    folder, runs, _ = home
    seeds.run(folder, [1])
    kept, removed, asked = seeds.collect, shutil.rmtree, []

    def busy() -> None:
        (folder / seeds.ABLATIONS / "grpo_text.parquet").unlink(missing_ok=True)  # else there is nothing to make
        asked.append(1)
        with pytest.raises(lock.Busy, match=r"tiny-grpo_text is being written to by .*\(make ablations\); run again"):
            ablations.run(folder, ["grpo_text"])

    def collect(*arguments):
        if len(asked) < 1:
            busy()
        kept(*arguments)

    def rmtree(path, *arguments, **options):
        if Path(path).name == "tiny-grpo_text" and len(asked) < 2:
            busy()
        removed(path, *arguments, **options)

    monkeypatch.setattr(seeds, "collect", collect)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    ablations.run(folder, ["grpo_text"])
    assert len(asked) == 2 and len(runs) == 1


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
