"""The report of a workspace with planted effects: claims, tables, pictures, and what it says of missing inputs."""

import json
import re
import shutil

import numpy as np
import pytest

from clear.bench import predictions
from clear.bench.models import MODELS
from clear.data.images import encode_image
from clear.data.io import write_text
from clear.data.records import read_samples, write_samples
from clear.errors import ClearError
from clear.report import calling, render, tables
from clear.report import claims as claim_rules
from clear.report import verdict as verdicts
from clear.stages import report
from tests.helpers.planted import CALLS, RIGHT, SHARED, fill, frames_of, rows_of

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


def test_neither_the_base_nor_clear_still_gives_an_honest_report(filled, tmp_path):
    data = tmp_path / "data"
    (data / "predictions").mkdir(parents=True)
    (data / "predictions/sft.parquet").write_bytes((filled / "predictions/sft.parquet").read_bytes())
    text, _, tracked = make(data, tmp_path / "out")
    assert "cannot be said from this run" in text.splitlines()[2]
    assert "Incomplete: 5 of 6 models" in text.splitlines()[4]
    assert tracked["not_measured"] == len(tracked["claims"]) and tracked["held"] == 0


def test_without_any_predictions_nothing_is_overwritten(filled, tmp_path, project, clear):
    """In a folder of another use, or a fresh one, an empty report took the place of the committed results."""
    before = {"report.json": '{"claims": {}}\n', "summary.json": "{}\n", "accuracy.csv": "model,level\n"}
    for name, text in before.items():
        write_text(project / "data/results" / name, text)
    page = project / "data/report/tiny/plots/old.png"
    write_text(page, "of an earlier report")
    shutil.copytree(filled / "plots", project / "data/plots")  # trained, and not evaluated yet
    status, stdout, stderr = clear("report")
    assert (status, stdout) == (1, "") and len(stderr.splitlines()) == 1
    assert stderr.startswith(f"error: {project / 'data/predictions'}: no predictions here, expected <model>.parquet of")
    assert all(model in stderr for model in MODELS) and "`dvc repro evaluate`" in stderr
    assert {name: (project / "data/results" / name).read_text() for name in before} == before and page.exists()
    shutil.copytree(filled / "predictions", project / "data/predictions", ignore=lambda *_: ["grpo.parquet"])
    assert set(report.read_frames(project / "data")) == {*MODELS} - {"grpo"}, "some are enough"


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
    ticks = "````\n<img src=x> [a](http://x.test)\n````"
    table = tables.Table(["a"], [["<b> [x](http://x.test)"]])
    blocks = [
        render.Quote("base: “<b>”, wrong", ticks),
        table,
        render.Folded("<u>", table),
        "![x](http://x.test) `<b>`",
    ]
    text = render.markdown("tiny", ["<i>"], [render.Section("Examples", blocks)])
    assert f"`````text\n{ticks}\n`````" in text, "a block of code that what is quoted cannot end"
    assert re.findall(r"(?<!\\)<(?!!--|/?details|/?summary)\w*", text.replace(ticks, "").replace("`<b>`", "")) == []
    assert not re.search(r"(?<!\\)\[\w*\]\(|://", text.replace(ticks, ""))


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
