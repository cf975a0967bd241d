"""Which benchmark and level a table is of, what its figures are averaged over, and where `clear score` writes."""

from pathlib import Path

import pytest

from clear.bench.vlmeval import scores
from clear.data.io import replacing
from clear.errors import ClearError
from tests.helpers.boards import made, mcq, put


def scored(folder: Path, **tables: list[dict]):
    return scores.score(scores.read_predictions(put(folder, "M", **tables)))


def summary(folder: Path, **tables: list[dict]) -> dict:
    return scores.summary(scored(folder, **tables))


@pytest.mark.parametrize("column", scores.WHERE)
def test_a_column_of_the_benchmarks_own_says_nothing_of_the_file(tmp_path, column):
    """MMStar's `bench` is the set that a question was taken from."""
    rows = [mcq(n, n != 1, **{column: value}) for n, value in enumerate(("MMMU", "AI2D", ""))]
    frame = scored(tmp_path, MMStar_dark_HIGH=rows)
    assert set(map(tuple, frame[[*scores.WHERE]].to_numpy())) == {("M_MMStar", "dark", "high")}
    assert scores.summary(frame)["benchmarks"]["M_MMStar"]["levels"]["high"]["score"] == pytest.approx(2 / 3)
    (board,) = made(put(tmp_path, "M", MMStar_dark_HIGH=rows))["benchmarks"]
    assert board == "MMStar"


@pytest.mark.parametrize("bench", ["MMVP", "MMBench_DEV_EN_V11"])
@pytest.mark.parametrize("index", ["x1", "9" * 5000])
def test_an_index_by_which_no_group_is_found_is_named_with_its_file(tmp_path, bench, index):
    with pytest.raises(ClearError, match=rf"{bench}\.tsv: index '{index[:2]}.* is not a number") as caught:
        scored(tmp_path, **{bench: [mcq(index, True)]})
    assert len(str(caught.value)) < 400


def test_r_bench_is_hard_and_in_no_robustness(tmp_path):
    """As in the leaderboard: the clean average is of one benchmark, the hard average of two."""
    tables = {
        "MMStar": [mcq(0, True)],
        "MMStar_LOW_LEVEL_HIGH": [mcq(0, True), mcq(1, False)],
        "R-Bench-Dis": [mcq(0, False)],
    }
    found = summary(tmp_path, **tables)
    assert [*found["benchmarks"]["M_R-Bench-Dis"]["levels"]] == ["high"]
    robust = {"absolute": 0.5, "relative": 0.5}
    assert found["average"] == {"levels": {"clean": 1.0, "high": 0.25}, "robustness": robust}
    assert "M_R-Bench-Dis: damaged as published; it counts as hard and in no robustness" in scores.table(found)
    undamaged = summary(tmp_path, **{"R-Bench-Ref": [mcq(0, True)]})
    assert undamaged["average"]["levels"] == {"clean": 1.0} and "damaged" not in scores.table(undamaged)


def test_robustness_is_of_the_benchmarks_that_have_both_levels(tmp_path):
    tables = {"MMStar": [mcq(0, True)], "MMStar_dark_HIGH": [mcq(0, False)], "RealWorldQA": [mcq(0, True)]}
    found = summary(tmp_path, **tables)["average"]
    assert found == {"levels": {"clean": 1.0}, "robustness": {"absolute": 0.0, "relative": 0.0}}


def test_a_source_that_one_corruption_lacks_has_no_figure(tmp_path):
    ade = [mcq(n, True, source="ADE", category="Count") for n in range(10)]
    coco = [mcq(10 + n, False, source="COCO", category="Relation") for n in range(10)]
    found = summary(tmp_path, **{"CV-Bench-2D_dark_HIGH": ade, "CV-Bench-2D_graffiti_HIGH": ade + coco})
    level = found["benchmarks"]["M_CV-Bench-2D"]["levels"]["high"]
    assert level["by_source"] == {"ADE": 1.0, "COCO": None} and level["sources"] is None
    assert level["by_category"] == {"Count": 1.0, "Relation": None}


def test_no_pair_that_is_right_at_hard_is_a_robustness_of_nought(tmp_path):
    right, wrong = ([mcq(n, value, question="Pair?") for n in (1, 2)] for value in (True, False))
    shown = scores.table(summary(tmp_path, MMVP=right, MMVP_LOW_LEVEL_HIGH=wrong))
    (pair,) = (line.split() for line in shown.splitlines() if line.startswith("  pair"))
    assert pair == ["pair", "100.00", "0.00", "0.00"]


@pytest.mark.parametrize("model", ["MMBench-x", "MMVP-tuned", "CV-Bench-7B", "MM-Vet-x", "R-Bench-Dis-x", "x-mmbench"])
@pytest.mark.parametrize("bench", ["MMStar", "RealWorldQA_dark_HIGH", "My-Bench"])
def test_a_model_that_is_called_after_a_benchmark_has_no_rule_of_it(tmp_path, model, bench):
    """Its row was scored by rotations or pairs, refused without a judge or a number, or taken for damaged."""
    rows = [mcq(f"x{n}", n != 1, source="s", category="c") for n in range(3)]
    plain, odd = (scores.score(scores.read_predictions(put(tmp_path, name, **{bench: rows}))) for name in ("M", model))
    same, found = (scores.summary(frame)["benchmarks"] for frame in (plain, odd))
    name = f"{model}_{bench.removesuffix('_dark_HIGH')}"
    assert found == {name: same[f"M_{name.removeprefix(f'{model}_')}"]}
    assert set(odd["benchmark"]) == {name.removeprefix(f"{model}_")}


def test_the_rules_of_a_benchmark_are_found_behind_any_model_and_without_one(tmp_path):
    rows = [mcq(1, True), mcq(1000001, False), mcq(2, True)]
    (tmp_path / "MMVP-x").mkdir()
    for name in ("MMBench_DEV_EN_V11", "MMVP-x_MMBench_DEV_EN_V11", "MMVP-x/MMVP-x_MMBench_DEV_EN_V11"):
        (tmp_path / f"{name}.tsv").write_bytes(put(tmp_path, "M", MMStar=rows)[0].read_bytes())
        frame = scores.score(scores.read_predictions([tmp_path / f"{name}.tsv"]))
        (found,) = scores.summary(frame)["benchmarks"].values()
        assert found["circular"] is True and found["levels"]["clean"]["score"] == 0.5, name
        assert set(frame["bench"]) == {name.split("/")[-1]} and set(frame["benchmark"]) == {"MMBench_DEV_EN_V11"}
    # A column names the benchmark alone: no model's name with another benchmark behind it.
    where = {"bench": "MMVP_MMStar", "corruption": "clean", "severity": "clean", "model": "M"}
    frame = scores.read_predictions(put(tmp_path, "M", Tables=[row | where for row in rows]))
    assert set(frame["benchmark"]) == {"MMVP_MMStar"}


@pytest.mark.parametrize("option", ["--json", "--rows", "--markdown", "--html"])
def test_a_folder_in_place_of_an_output_is_refused_before_the_work(tmp_path, clear, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scores, "score", lambda *_: pytest.fail("the answers were scored first"))
    (file,) = put(tmp_path, "M", MMStar=[mcq(0, True)])
    for name in (".", "..", "/", str(tmp_path)):
        assert clear("score", file, option, name) == (1, "", f"error: {name}: Is a directory; correct the path.\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--json", "M_MMStar.tsv"], "--json M_MMStar.tsv: is one of the files to be read"),
        (["--rows", "link.tsv"], "--rows link.tsv: is one of the files to be read"),
        (["--manifest", "m.parquet", "--html", "m.parquet"], "--html m.parquet: is one of the files to be read"),
        (["--json", "x", "--rows", "./x"], "--rows x: is what --json writes"),
    ],
)
def test_no_output_takes_the_place_of_a_table_or_of_another(tmp_path, clear, monkeypatch, arguments, said):
    """`--json` takes a file here and is a flag elsewhere: it has eaten a table of answers."""
    (file,) = put(tmp_path, "M", MMStar=[mcq(0, True)])
    monkeypatch.chdir(Path(file).parent)
    before = Path(file).read_bytes()
    Path("link.tsv").symlink_to(file)
    status, _, errors = clear("score", Path(file).name, *arguments)
    assert (status, errors) == (1, f"error: {said}; name another file.\n") and Path(file).read_bytes() == before


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_path_without_a_name_is_never_replaced(name):
    with pytest.raises(ClearError, match="not the name of a file"), replacing(name):
        pytest.fail("something was written")
