"""Results over seeds: what a run leaves, what is pooled, and what the page says of it."""

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from clear.bench.models import MODELS
from clear.errors import ClearError
from clear.project import scratch, seeds
from clear.report import seeds as page
from tests.helpers.finished_runs import RIGHT

pytest_plugins = ["tests.helpers.finished_runs"]


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


def test_not_behind_is_a_claim_that_needs_enough_images(home):
    """Half a point behind, give or take one: too few images are no proof of anything."""
    folder, _, _ = home
    models = _pooled(folder, [1])
    found = page.calling.figures(models, page.SETTINGS)
    for low, held in ((-0.0099, "holds"), (-0.0101, "**does not hold**")):
        found["levels"]["mid"] |= {"estimate": -0.005, "low": low, "high": 0.004}
        lines = {row[0]: row for row in page.must_show(models, found).rows}
        assert lines["not behind it at mid: the interval above −1 point"][2] == held


def test_a_gain_in_psnr_is_one_of_twenty_restorations_at_least(home):
    folder, _, _ = home
    _pooled(folder, [1])
    frame = pd.read_parquet(folder / seeds.FOLDER / "1.parquet")
    own = frame[frame["model"] == "grpo"].assign(psnr_degraded=20.0)
    hard = own.index[own["severity"] == "high"]
    for count, shown in ((19, "–"), (20, "+2.0")):
        own["psnr_restored"] = np.where(own.index.isin(hard[:count]), 22.0, np.nan)
        table = page.one_change({1: frame}, {"some": page.Ablation("something", {1: own})})
        assert table.rows[0][-1] == shown
        assert table.rows[0][3:6] == ["+0.0 [+0.0, +0.0]"] * 3
        hidden = (
            "up to 9.5 points, with all kinds of damage, can stay hidden on one seed"  # 1 - .05^(1/30) for 30 pairs
        )
        assert f"{hidden}. Of 3 i" in table.caption


def test_a_question_that_is_there_twice_is_named(home):
    folder, _, _ = home
    seeds.run(folder, [1, 2])
    file = folder / seeds.FOLDER / "2.parquet"
    table = pq.read_table(file)
    pq.write_table(pa.concat_tables([table, table.slice(7, 1)]), file)
    with pytest.raises(ClearError, match=r"2\.parquet: 'base/s1/jpeg/high/q' is there twice; restore it"):
        seeds.render(folder)


def _pooled(folder, wanted):
    shutil.rmtree(folder / seeds.FOLDER, ignore_errors=True)
    seeds.run(folder, wanted)
    return page.pooled({int(f.stem): pd.read_parquet(f) for f in (folder / seeds.FOLDER).iterdir()})


def _conditions(folder, wanted):
    models = _pooled(folder, wanted)
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
    with pytest.raises(ClearError, match=r"the runs of seeds 1, 2, 3 had other .* than seed 4 .* cannot be pooled"):
        seeds.run(folder, [4])
    (folder / seeds.FOLDER / "4.parquet").unlink()
    edited["outs"][0]["md5"] = "base of 1"
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock))
    (folder / "params.yaml").write_text(yaml.safe_dump(params | {"model": {"hidden": 9}}))
    with pytest.raises(ClearError, match="cannot be pooled"):
        seeds.run(folder, [5])


def test_which_seeds_are_out_of_date_is_told_by_the_workspace_and_never_by_their_numbers(home):
    folder, _, _ = home
    seeds.run(folder, [1, 2, 3])
    file = folder / seeds.FOLDER / "9.parquet"
    pq.write_table(pq.read_table(file.with_name("3.parquet")).replace_schema_metadata({"clear.setting": "older"}), file)
    said = r'runs of seed 9 had other .* than seeds 1, 2, 3 and this .*; delete their files and run `.* SEEDS="9"`\.$'
    with pytest.raises(ClearError, match=said):
        seeds.render(folder)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    (folder / "params.yaml").write_text(yaml.safe_dump(params | {"model": {"hidden": 9}}))
    groups = r"seeds of 2 settings.* cannot be pooled: seeds 1, 2, 3 / seed 9; "
    with pytest.raises(ClearError, match=f"{groups}none of them is that of this workspace, so restore the params.yaml"):
        seeds.render(folder)
    (folder / "dvc.lock").unlink()
    with pytest.raises(ClearError, match=rf"{groups}that of this workspace is not known \(.*dvc\.lock is not here; "):
        seeds.render(folder)
    assert len(list(file.parent.iterdir())) == 4


def test_no_seed_is_run_under_a_setting_that_is_not_what_dvc_lock_has(home):
    folder, runs, stale = home
    stale.append("params.yaml: seed is 7, dvc.lock has 1: run `dvc repro`.")
    with pytest.raises(ClearError, match=r"out of date: params.yaml: seed is 7"):
        seeds.run(folder, [2])
    assert not runs


@pytest.mark.parametrize("kind", ["parameters", "code"])
def test_an_edit_while_a_seed_runs_names_the_next_and_changes_no_label(home, monkeypatch, kind):
    folder, runs, stale = home
    began, run = seeds.setting(folder), scratch.run

    def edited(workspace, *arguments):
        copy = run(workspace, *arguments)
        if kind == "code":
            stale.append("clear/model/vit.py is not the version in dvc.lock.")
        else:
            params = yaml.safe_load((folder / "params.yaml").read_text())
            (folder / "params.yaml").write_text(yaml.safe_dump(params | {"model": {"hidden": 9}}))
        return copy

    monkeypatch.setattr(scratch, "run", edited)
    found = {"parameters": "params.yaml or dvc.lock has another setting.", "code": "clear/model/vit.py is not .*"}[kind]
    with pytest.raises(ClearError, match=f"seed 3 is not run, since .* was edited .*: {found} What is done stays"):
        seeds.run(folder, [2, 3])
    assert [name for _, name in runs] == ["tiny-seed-2"]
    assert [file.name for file in (folder / seeds.FOLDER).iterdir()] == ["2.parquet"]
    assert seeds.about(folder / seeds.FOLDER / "2.parquet")["setting"] == began, "what its copy was made of"


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
