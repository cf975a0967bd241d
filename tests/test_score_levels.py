"""Which benchmark and level a table is of, what its figures are averaged over, and where `clear score` writes."""

import unicodedata
from pathlib import Path

import pytest

from clear.bench.vlmeval import collect, scores
from clear.data.io import replacing
from clear.errors import ClearError
from tests.helpers.boards import made, mcq, put, rows

KEPT = "is where `clear answer` keeps what it knows of M_MMStar.tsv"


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
        "MMStar": [mcq(0, True), mcq(1, True)],
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
        (["--rows", "M_MMStar.parquet"], f"--rows M_MMStar.parquet: {KEPT}"),
        (["--json", "../M/M_MMStar.jsonl"], f"--json ../M/M_MMStar.jsonl: {KEPT}"),
        (["--html", "M_MMStar_rejects.parquet"], f"--html M_MMStar_rejects.parquet: {KEPT}"),
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


# --- levels that have different questions ---------------------------------------------------------------------------


def test_a_hard_table_that_ends_early_is_compared_with_the_same_questions_at_clean(tmp_path):
    """20 of 40 right at clean, the 20 that are left at hard right: that was a robustness of 200 %."""
    clean, hard = rows(40, lambda n: n < 20), rows(20, lambda _: True)
    found = summary(tmp_path, MMStar=clean, MMStar_LOW_LEVEL_HIGH=hard)
    bench = found["benchmarks"]["M_MMStar"]
    assert bench["robustness"] == {"absolute": 1.0, "relative": 1.0} and bench["lacking"] == {"high": 20}
    assert [bench["levels"][level]["score"] for level in ("clean", "high")] == [0.5, 1.0], "each over its own questions"
    note = "M_MMStar: of 40 questions high lacks 20; hard / clean is over the 20 that clean and high share"
    assert scores.table(found).splitlines()[-1] == note
    same = summary(tmp_path, MMStar=clean, MMStar_LOW_LEVEL_HIGH=rows(40, lambda n: n < 10))["benchmarks"]["M_MMStar"]
    assert same["robustness"]["relative"] == 0.5 and same.keys() == {"levels", "robustness", "damaged"}


def test_every_level_says_what_it_lacks_and_only_clean_and_hard_make_the_ratio(tmp_path):
    tables = {"MMStar": rows(6, lambda n: n < 3)[1:], "MMStar_LOW_LEVEL_HIGH": rows(6, lambda n: n < 3)[1:]}
    shown = scores.table(summary(tmp_path, **tables, MMStar_LOW_LEVEL_LOW=rows(4, bool)))
    assert shown.splitlines()[-1] == "M_MMStar: of 6 questions clean lacks 1, low lacks 2, high lacks 1"
    assert "100.00" in shown
    apart = summary(tmp_path, MMStar=rows(6, bool)[3:], MMStar_LOW_LEVEL_HIGH=rows(3, bool))
    assert apart["benchmarks"]["M_MMStar"]["robustness"] == {"absolute": pytest.approx(2 / 3), "relative": None}
    assert "lacks 3; clean and high share none, so there is no hard / clean" in scores.table(apart)


def test_the_average_ratio_and_that_of_pairs_are_of_shared_questions_too(tmp_path):
    """Pairs 1–2 and 3–4 are asked at both levels, and right at both; 5–6 is asked at hard alone, 7–8 at clean alone."""
    pairs = {n: mcq(n, True, question=f"Pair {(n - 1) // 2}?") for n in range(1, 9)}
    wrong = {n: row | {"prediction": "B"} for n, row in pairs.items()}
    tables = {
        "MMVP": [*(pairs[n] for n in (1, 2, 3, 4)), *(wrong[n] for n in (7, 8))],
        "MMVP_LOW_LEVEL_HIGH": [pairs[n] for n in (1, 2, 3, 4, 5, 6)],
        "MMStar": rows(8, lambda n: n < 4),
        "MMStar_dark_HIGH": rows(4, lambda n: n < 2),
        "MMStar_jpeg_HIGH": rows(4, lambda n: n < 4),
    }
    found = summary(tmp_path, **tables)
    shown = [line.split() for line in scores.table(found).splitlines()]
    assert ["pair", "66.67", "100.00", "100.00"] in shown
    assert found["average"]["robustness"] == {"absolute": 0.875, "relative": 0.875}


def test_a_lost_rotation_takes_its_question_from_the_ratio(tmp_path):
    whole = [mcq(n + turn, n != 1 or turn == 0) for n in range(4) for turn in (0, 1_000_000)]
    easier = [row for row in whole if row["index"] != 1_000_001]
    found = summary(tmp_path, MMBench_DEV_EN_V11=whole, MMBench_DEV_EN_V11_LOW_LEVEL_HIGH=easier)
    bench = found["benchmarks"]["M_MMBench_DEV_EN_V11"]
    assert [bench["levels"][level]["score"] for level in ("clean", "high")] == [0.75, 1.0]
    assert bench["robustness"]["relative"] == 1.0 and bench["lacking"] == {"high": 1}


def test_a_question_without_a_verdict_at_one_level_is_in_no_ratio(tmp_path):
    frame = scored(tmp_path, MMStar=rows(4, lambda n: n < 2), MMStar_LOW_LEVEL_HIGH=rows(4, lambda n: n < 2))
    frame.loc[(frame["severity"] == "high") & (frame["index"] == "3"), ["score", "reject"]] = [float("nan"), "outage"]
    bench = scores.summary(frame)["benchmarks"]["M_MMStar"]
    assert bench["robustness"] == {"absolute": pytest.approx(2 / 3), "relative": 1.0}


def test_an_index_is_the_same_question_whichever_way_pandas_wrote_it(tmp_path):
    hard = [row | {"index": f"{row['index']}.0"} for row in rows(4, lambda n: n < 1)]
    found = summary(tmp_path, MMStar=rows(4, lambda n: n < 2), MMStar_LOW_LEVEL_HIGH=hard)["benchmarks"]["M_MMStar"]
    assert found["robustness"]["relative"] == 0.5 and "lacking" not in found


# --- columns that say what a row is of -------------------------------------------------------------------------------


def placed(folder: Path, *where: tuple[str, str, str]) -> list[Path]:
    """A table with a row of each benchmark, corruption and severity."""
    named = [dict(zip(scores.WHERE, one, strict=True)) for one in where]
    return put(folder, "M", Table=[mcq(n, n != 1, **more) for n, more in enumerate(named)])


@pytest.mark.parametrize(("corruption", "severity"), [("jpeg", "clean"), ("clean", "high"), ("Clean", "clean")])
def test_a_corruption_that_contradicts_its_level_is_refused_by_row(tmp_path, corruption, severity):
    """The row was counted by its level alone."""
    said = (
        rf"M_Table\.tsv: row 2, index 1: corruption '{corruption}' and severity '{severity}' contradict each other; "
        "write clean in both columns, or a corruption and its level"
    )
    with pytest.raises(ClearError, match=said):
        scores.read_predictions(placed(tmp_path, ("MMStar", "dark", "high"), ("MMStar", corruption, severity)))


def test_the_authors_names_and_blanks_make_no_second_corruption_or_benchmark(tmp_path):
    where = [("MMStar", "jpeg_compression", "high"), (" MMStar ", "jpeg ", "high"), ("MMStar", "mixed", "low")]
    frame = scores.score(scores.read_predictions(placed(tmp_path, *where)))
    assert set(map(tuple, frame[[*scores.WHERE]].to_numpy())) == {
        ("MMStar", "jpeg", "high"),
        ("MMStar", "mixed", "low"),
    }
    found = scores.summary(frame)
    assert found["benchmarks"].keys() == {"MMStar"} and "sixteen" not in scores.table(found)
    with pytest.raises(ClearError, match="MMStar/jpeg/high/0 is in two of the files"):
        scores.read_predictions([*placed(tmp_path, where[0]), *placed(tmp_path / "more", ("MMStar", "jpeg", "high"))])


def test_corruptions_beyond_the_sixteen_are_counted_and_named(tmp_path):
    """A plugin's, another project's, or a slip of the pen."""
    where = [("MMStar", "dark", "high"), ("MMStar", "no_such", "high"), ("MMStar", "+fog", "high")]
    frame = scores.score(scores.read_predictions(placed(tmp_path, *where)))
    note = "none of MMD-Bench's sixteen corruptions, but counted at their level: '+fog', 'no_such'"
    assert scores.table(scores.summary(frame)).splitlines()[-1] == note
    assert f"{note}." in made(placed(tmp_path, *where))["notes"]
    many = [("MMStar", f"c{n:02d}", "high") for n in range(12)]
    shown = scores.table(scores.summary(scores.score(scores.read_predictions(placed(tmp_path, *many)))))
    assert shown.endswith("'c09' and 2 more")


# --- whose table it is -----------------------------------------------------------------------------------------------


def test_tables_of_nobody_knows_which_models_have_no_average(tmp_path, clear, monkeypatch):
    """Of an unknown benchmark, `modelA_MyBench` may be one of modelA or a benchmark of this name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loose").mkdir()
    content = put(tmp_path, "M", MMStar=rows(4, lambda n: n < 2))[0].read_bytes()
    loose = [tmp_path / "loose" / f"model{model}_MyBench{end}.tsv" for model in "AB" for end in ("", "_dark_HIGH")]
    for file in loose:
        file.write_bytes(content)
    status, shown, errors = clear("score", *loose, "--json", "x.json")
    assert status == 0 and "\naverage" not in shown, errors
    assert shown.splitlines()[-1] == (
        "no average: modelA_MyBench.tsv, modelB_MyBench.tsv do not say whose predictions they are, and may be of "
        "several models; put each model's tables into a folder of its name, or give them a column `model`"
    )
    assert '"levels": {}' in (tmp_path / "x.json").read_text()
    for files in (loose[:2], [tmp_path / "loose" / name for name in ("MMStar.tsv", "RealWorldQA.tsv", loose[0].name)]):
        for file in files:  # one of nobody knows which model, and known benchmarks without one
            file.write_bytes(content)
        shown = clear("score", *files)[1]
        assert "no average" not in shown and ("\naverage" in shown) == (len(files) > 2)
    for file in loose:
        folder = tmp_path / file.name.split("_")[0]
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)
    assert clear("score", *(tmp_path / file.name.split("_")[0] / file.name for file in loose))[1].startswith("Averages")


def test_tables_with_columns_of_their_own_benchmarks_have_no_average_without_a_model(tmp_path, clear, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [tmp_path / f"{name}.tsv" for name in "ab"]
    for file, bench in zip(files, ("Mine", "Yours"), strict=True):
        file.write_bytes(placed(tmp_path, (bench, "clean", "clean"))[0].read_bytes())
    assert "no average: a.tsv, b.tsv do not say" in clear("score", *files)[1]


@pytest.mark.parametrize(("folder", "file"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_folder_is_that_of_its_tables_in_any_normal_form(tmp_path, folder, file):
    """As disks and archives of different systems keep names; the two look alike."""
    inside = tmp_path / unicodedata.normalize(folder, "modèle")
    inside.mkdir()
    for end in ("Café", "Café_dark_HIGH"):
        target = inside / unicodedata.normalize(file, f"modèle_{end}.tsv")
        target.write_bytes(put(tmp_path, "M", MMStar=rows(2, bool))[0].read_bytes())
    found = sorted(inside.iterdir())
    assert collect.models_of(found) == ["modèle"] and made(found)["benchmarks"].keys() == {"Café"}
    assert scores.summary(scores.score(scores.read_predictions(found)))["benchmarks"].keys() == {"modèle_Café"}
