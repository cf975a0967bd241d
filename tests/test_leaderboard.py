"""The leaderboard: many models on the questions they share, paired intervals, published rows, and its three forms."""

import json
import re
import unicodedata

import numpy as np
import pandas as pd
import pytest

from clear.bench import statistics
from clear.bench.vlmeval import collect, scores
from clear.bench.vlmeval.leaderboard import leaderboard
from clear.errors import ClearError
from clear.report import leaderboard as shown
from tests.helpers.boards import cell, made, mcq, put, rows


def test_every_figure_is_that_of_one_models_summary(tmp_path):
    """Circular, with several corruptions of different sizes, single questions of pairs; then the averages."""
    rng = np.random.default_rng(1)

    def drawn(count, share, step=1):
        return rows(count, lambda _: rng.random() < share)[::step]

    def tables(share):
        first = drawn(40, share)
        turned = [row | {"index": row["index"] + 1_000_000} for row in drawn(40, share)]
        return {
            "MMBench_DEV_EN_V11": first + turned,
            "MMBench_DEV_EN_V11_LOW_LEVEL_HIGH": first[:30] + turned[:30],
            "MMStar": drawn(50, share),
            "MMStar_dark_HIGH": drawn(50, share),
            "MMStar_jpeg_HIGH": drawn(50, share, 3),
            "MMVP": drawn(20, share),
            "MMVP_LOW_LEVEL_HIGH": drawn(20, share),
        }

    files = {model: put(tmp_path, model, **tables(share)) for model, share in (("a", 0.5), ("b", 0.8))}
    board = made(files["a"] + files["b"])
    for model, own in files.items():
        one = scores.summary(scores.score(scores.read_predictions(own)))
        for bench in board["benchmarks"]:
            for level in ("clean", "high"):
                figure = one["benchmarks"][f"{model}_{bench}"]["levels"][level]["score"]
                assert cell(board, model, level, bench)["estimate"] == pytest.approx(figure), (model, bench, level)
        for level, average in one["average"]["levels"].items():
            assert cell(board, model, level)["estimate"] == pytest.approx(average)
        relative = board["models"][model]["robustness"]["relative"]
        assert relative["estimate"] == pytest.approx(one["average"]["robustness"]["relative"])
        assert relative["low"] < relative["estimate"] < relative["high"]
    assert board["benchmarks"]["MMBench_DEV_EN_V11"]["circular"] is True


def test_intervals_and_paired_differences_are_those_of_the_clustered_bootstrap(tmp_path):
    """Two halves of a pair are one cluster; the difference is of the same questions."""
    rng = np.random.default_rng(2)
    right = {model: rng.random(60) < share for model, share in (("base", 0.4), ("new", 0.6))}
    files = []
    for model, values in right.items():
        table = [mcq(n + 101, bool(value), question=f"Pair {n // 2}?") for n, value in enumerate(values)]
        files += put(tmp_path, model, MMVP=table)
    board = made(files, "base")
    pairs = np.arange(60) // 2
    for model, values in right.items():
        wanted = statistics.mean_interval(values.astype(float), pairs)
        found = cell(board, model, "clean", "MMVP")
        assert (found["low"], found["high"]) == pytest.approx((wanted.low, wanted.high))
        assert (found["n"], found["clusters"]) == (60, 30)
    wanted = statistics.paired_difference(right["new"], right["base"], pairs)
    found = cell(board, "new", "clean", "MMVP")["minus_reference"]
    assert [found[k] for k in ("estimate", "low", "high")] == pytest.approx([wanted.estimate, wanted.low, wanted.high])
    assert "minus_reference" not in cell(board, "base", "clean", "MMVP")


def test_a_single_question_has_a_figure_without_ends(tmp_path):
    files = [*put(tmp_path, "a", MMStar=rows(1, bool)), *put(tmp_path, "b", MMStar=rows(1, lambda _: True))]
    board = made(files, "a")
    for model, right in (("a", 0.0), ("b", 1.0)):
        found = cell(board, model, "clean")
        assert (found["estimate"], found["low"], found["high"], found["clusters"]) == (right, None, None, 1)
    assert found["minus_reference"]["estimate"] == 1.0 and found["minus_reference"]["low"] is None
    assert "MMStar" in shown.markdown(board)


def test_a_resample_is_a_sum_over_the_clusters_that_were_drawn():
    sums = np.random.default_rng(3).integers(0, 5, (3, 40)).astype(float)
    generator = np.random.default_rng(7)
    wanted = np.stack([sums[:, generator.integers(40, size=(1, 40))[0]].sum(axis=1) for _ in range(50)], axis=1)
    assert np.array_equal(statistics._resample(sums, 50, 7), wanted)


def test_a_better_model_that_is_right_on_other_questions_is_less_certain(tmp_path):
    """The same two accuracies, once on nested and once on crossed questions: only pairing tells them apart."""
    base = put(tmp_path, "base", MMStar=rows(200, lambda n: n < 100))
    nested = put(tmp_path, "nested", MMStar=rows(200, lambda n: n < 120))
    crossed = put(tmp_path, "crossed", MMStar=rows(200, lambda n: n >= 80))
    board = made(base + nested + crossed, "base")
    ends = {m: cell(board, m, "clean", "MMStar")["minus_reference"] for m in ("nested", "crossed")}
    assert ends["nested"]["estimate"] == ends["crossed"]["estimate"] == pytest.approx(0.1)
    assert ends["nested"]["low"] > 0 > ends["crossed"]["low"]


def test_r_bench_counts_as_hard_and_nowhere_else(tmp_path):
    tables = {"MMStar": rows(20, lambda n: n < 16), "MMStar_LOW_LEVEL_HIGH": rows(20, lambda n: n < 12)}
    board = made(put(tmp_path, "m", **tables, R__Bench__Dis=rows(20, lambda n: n < 4)))
    assert board["averaged"] == {"clean": ["MMStar"], "high": ["MMStar", "R-Bench-Dis"]}
    assert board["robust"] == ["MMStar"]
    assert cell(board, "m", "clean")["estimate"] == 0.8 and cell(board, "m", "high")["estimate"] == pytest.approx(0.4)
    robustness = board["models"]["m"]["robustness"]
    assert robustness["absolute"]["estimate"] == 0.6 and robustness["relative"]["estimate"] == pytest.approx(0.75)
    assert made(put(tmp_path, "n", R__Bench__Ref=rows(20, lambda n: n)))["levels"] == ["clean"], "undamaged"


def test_models_are_compared_on_what_they_share_and_the_rest_is_named(tmp_path):
    a = put(tmp_path, "a", MMStar=rows(30, lambda n: n < 15))
    b = put(tmp_path, "b", MMStar=rows(40, lambda n: n < 35)[5:])
    board = made(a + b, "a")
    assert cell(board, "a", "clean", "MMStar")["estimate"] == pytest.approx(10 / 25)
    assert cell(board, "b", "clean", "MMStar")["estimate"] == 1.0
    assert cell(board, "b", "clean", "MMStar")["minus_reference"]["n"] == 50, "25 answers of each"
    assert board["notes"] == ["MMStar, clean: compared on 25 shared rows; left out: 5 of a, 10 of b."]
    assert "left out: 5 of a, 10 of b" in shown.text(board)


def test_a_lost_rotation_takes_its_question_from_every_model(tmp_path):
    """Else the model without it would have an easier question."""
    whole = [mcq(n + turn, n < 5) for n in range(10) for turn in (0, 1_000_000, 2_000_000)]
    a = put(tmp_path, "a", MMBench_DEV_EN_V11=whole)
    b = put(tmp_path, "b", MMBench_DEV_EN_V11=[row for row in whole if row["index"] != 1_000_003])
    board = made(a + b)
    for model in "ab":
        found = cell(board, model, "clean", "MMBench_DEV_EN_V11")
        assert found["estimate"] == pytest.approx(4 / 9) and found["n"] == 9
    assert board["notes"] == ["MMBench_DEV_EN_V11, clean: compared on 27 shared rows; left out: 3 of a, 2 of b."]


def test_a_row_whose_judge_failed_is_no_answer_of_anybody(tmp_path):
    files = put(tmp_path, "a", MMStar=rows(10, lambda n: n < 5)) + put(tmp_path, "b", MMStar=rows(10, lambda n: True))
    frame = scores.score(collect.read(files))
    failed = (frame["model"] == "a") & (frame["index"] == "0")
    frame.loc[failed, ["score", "reject"]] = [np.nan, "outage: down"]
    board = leaderboard(frame)
    assert cell(board, "a", "clean", "MMStar")["estimate"] == pytest.approx(4 / 9)
    assert "left out: 1 of a (1 without a verdict), 1 of b." in board["notes"][0]


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (
            {"MMStar": rows(3, bool)},
            {"MMStar": rows(6, bool)[3:]},
            r"MMStar, clean: no question has a verdict for every model "
            r"\(a: 3 rows of clean, first index 0; b: 3 rows of clean, first index 3\)",
        ),
        (
            {"MMStar_LOW_LEVEL_HIGH": rows(3, bool)},
            {"MMStar_dark_HIGH": rows(3, bool)},
            r"a: 3 rows of mixed, first index 0; b: 3 rows of dark",
        ),
        (
            {"MMStar": rows(3, bool)},
            {"MMStar": [mcq(1, True, question="Another|one?")]},
            r"MMStar, index 1: .*a_MMStar\.tsv asks 'Q1\? → A', .*b_MMStar\.tsv asks 'Another\|one\? → A'",
        ),
        ({"MMStar": rows(3, bool)}, {"MMStar": [mcq(1, True) | {"answer": "B"}]}, r"asks 'Q1\? → B'"),
    ],
    ids=["disjoint", "other protocol", "other question", "other answer"],
)
def test_tables_of_different_questions_are_refused_by_name(tmp_path, a, b, said):
    with pytest.raises(ClearError, match=said):
        made(put(tmp_path, "a", **a) + put(tmp_path, "b", **b))


def test_a_model_without_one_benchmark_has_no_average(tmp_path):
    files = put(tmp_path, "a", MMStar=rows(9, bool), RealWorldQA=rows(9, bool)) + put(
        tmp_path, "b", MMStar=rows(9, bool)
    )
    board = made(files, "a")
    assert cell(board, "b", "clean") is None and cell(board, "b", "clean", "RealWorldQA") is None
    assert cell(board, "a", "clean")["estimate"] == pytest.approx(8 / 9)
    assert board["notes"] == ["b has no average at clean: no table of RealWorldQA."]


def test_a_table_without_answers_says_why_it_cannot_be_scored(tmp_path):
    files = put(tmp_path, "a", MMBench_TEST_EN=[{"index": 1, "question": "?", "A": "x", "B": "y", "prediction": "A"}])
    with pytest.raises(
        ClearError, match=r"no column 'answer' among .*; without the right answers nothing can be scored"
    ):
        collect.read(files)


def test_two_tables_of_one_name_are_refused(tmp_path):
    files = put(tmp_path / "one", "a", MMStar=rows(3, bool)) + put(tmp_path / "two", "a", MMStar=rows(3, bool))
    with pytest.raises(ClearError, match=r"a/MMStar/clean/clean/0 is in .*one/a/a_MMStar\.tsv and in .*two/a/a_MM"):
        collect.read(files)
    composed, apart = (unicodedata.normalize(form, "modèle") for form in ("NFC", "NFD"))
    files = put(tmp_path, composed, MMStar=rows(3, bool)) + put(tmp_path, apart, MMStar=rows(3, bool))
    with pytest.raises(ClearError, match="two tables of one name"):
        collect.read(files)


def test_whose_table_it_is(tmp_path):
    put(tmp_path, "my_model_v1", MMStar=rows(2, bool), Our__Own=rows(2, bool))
    folder = tmp_path / "my_model_v1"
    frame = collect.read(sorted(folder.iterdir()))
    assert set(zip(frame["model"], frame["bench"], strict=True)) == {
        ("my_model_v1", "MMStar"),
        ("my_model_v1", "Our-Own"),
    }
    moved = tmp_path / "my_model_v1_CV-Bench-2D_dark_HIGH.tsv"
    moved.write_bytes((folder / "my_model_v1_MMStar.tsv").read_bytes())
    assert collect.models_of([moved]) == ["my_model_v1"]
    assert set(collect.read([moved])["bench"]) == {"CV-Bench-2D"}
    nameless = tmp_path / "MMStar.tsv"
    nameless.write_bytes(moved.read_bytes())
    assert collect.models_of([nameless]) == [""]
    with pytest.raises(ClearError, match=r"MMStar\.tsv: its name does not say whose predictions"):
        collect.read([nameless])
    table = pd.DataFrame([mcq(0, True, model="a\nb |"), mcq(0, False, model="c")])
    with pytest.raises(ClearError, match="index 0 occurs twice"):  # one model, one file
        table.to_csv(nameless, sep="\t", index=False)
        collect.read([nameless])
    table.iloc[:1].to_csv(nameless, sep="\t", index=False)
    frame = collect.read([nameless])
    assert collect.models_of([nameless]) == ["a b |"] and frame["model"].tolist() == ["a b |"]
    assert frame["bench"].tolist() == ["MMStar"]


def test_the_reference_must_be_there(tmp_path):
    with pytest.raises(ClearError, match="--reference BAGEL: no table is of this model; name one of a, Z"):
        made(put(tmp_path, "Z", MMStar=rows(3, bool)) + put(tmp_path, "a", MMStar=rows(3, bool)), "BAGEL")


def test_the_share_restored_is_read_from_the_record_beside_a_table(tmp_path):
    files = put(tmp_path, "a", MMStar=rows(4, bool), RealWorldQA=rows(4, bool), R__Bench__Dis=rows(4, bool))
    for file, restored in zip(files, ([True, False, False, False], [True] * 4), strict=False):
        record = pd.DataFrame({"index": [*"0123"], "restored": restored, "trace": ["a\nb"] * 4})
        record.to_parquet(file.with_suffix(".parquet"))
    board = made(files)
    found = board["models"]["a"]["restored"]
    assert found["clean"] == {"benchmarks": {"MMStar": 0.25, "RealWorldQA": 1.0}, "average": 0.625}
    assert found["high"]["benchmarks"] == {"R-Bench-Dis": None}
    assert "62.5" in shown.text(board)
    pd.DataFrame({"index": [*"012"], "restored": [True] * 3}).to_parquet(files[0].with_suffix(".parquet"))
    with pytest.raises(ClearError, match=r"a_MMStar\.parquet: does not say whether index 3 was restored"):
        collect.read(files)
    pd.read_csv(files[0], sep="\t").to_parquet(files[0].with_suffix(".parquet"))  # the table once more, no record
    assert collect.read(files[:1])["restored"].tolist() == [None] * 4


def test_questions_about_one_picture_are_one_cluster_where_a_manifest_says_so(tmp_path):
    files = put(tmp_path, "a", MMStar=rows(12, lambda n: n % 2))
    manifest = tmp_path / "manifest.parquet"
    pictures = {
        "bench": ["MMStar"] * 12,
        "index": [*map(str, range(12))],
        "image_index": [str(n // 3) for n in range(12)],
    }
    pd.DataFrame(pictures).to_parquet(manifest)
    assert cell(made(files), "a", "clean", "MMStar")["clusters"] == 12
    assert cell(made(files, manifest=manifest), "a", "clean", "MMStar")["clusters"] == 4
    damaged = put(tmp_path, "a", **{"R-Bench-Dis": rows(4, lambda n: 1)})
    made([*files, *damaged], manifest=manifest)  # it came damaged, so that the command made nothing of it
    pd.DataFrame(pictures | {"bench": ["MMVet"] * 12}).to_parquet(manifest)
    with pytest.raises(ClearError, match=r"manifest\.parquet: no row of MMStar, so which of its questions share"):
        made(files, manifest=manifest)
    pd.DataFrame({"index": ["1"]}).to_parquet(manifest)
    with pytest.raises(ClearError, match=r"manifest\.parquet: no column 'bench'"):
        made(files, manifest=manifest)


def test_input_columns_may_have_the_names_that_are_used_within(tmp_path):
    more = {"value": "v", "unit": "u", "cluster": "c", "group": "g", "picture": "p", "score": "s", "bench": "MMMU"}
    plain = made(put(tmp_path / "plain", "a", MMStar=rows(9, lambda n: n < 5)), "a")
    assert made(put(tmp_path / "more", "a", MMStar=rows(9, lambda n: n < 5, **more)), "a") == plain
    turned = [mcq(n + turn, n < 5, **more) for n in range(10) for turn in (0, 1_000_000)]
    board = made(put(tmp_path, "a", MMBench_DEV_EN_V11=turned))
    assert cell(board, "a", "clean", "MMBench_DEV_EN_V11")["estimate"] == 0.5


EVIL = "<b>x</b> | a\\|b *c* `d` [e](f) &amp; 模型"


def test_names_are_text_in_every_form(tmp_path):
    """A model's name with markup, bars, backslashes and line ends, and so the reference's."""
    file = tmp_path / "M_MMStar.tsv"
    more = {"model": EVIL.replace(" ", "\n"), "hint": "a\nb\t|"}
    pd.DataFrame(rows(9, lambda n: n < 5, **more)).to_csv(file, sep="\t", index=False)
    board = made([file, *put(tmp_path, "plain", MMStar=rows(9, lambda n: n < 5))], EVIL)
    assert set(board["models"]) == {EVIL, "plain"}
    assert f"\n{EVIL} " in shown.text(board)
    from html.parser import HTMLParser

    class Cells(HTMLParser):
        def __init__(self):
            super().__init__()
            self.data, self.tags = [], []

        def handle_starttag(self, tag, attrs):
            self.tags.append(tag)

        def handle_data(self, data):
            self.data.append(data)

    page = Cells()
    page.feed(shown.html(board))
    assert EVIL in page.data and "b" not in page.tags and "x" not in page.data
    markdown = shown.markdown(board)
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        bars = [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table.splitlines()]
        assert len(set(bars)) == 1, table
    row = next(line for line in markdown.splitlines() if line.startswith("|") and "模型" in line and "measured" in line)
    assert r"\<b>x\</b> \| a\\\|b \*c\* \`d\` [e\](f) \&amp; 模型" in row
    json.dumps(board)


def test_the_command_makes_all_forms_and_leaves_one_model_as_it_was(tmp_path, clear, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = [*map(str, put(tmp_path / "out", "a", MMStar=rows(30, lambda n: n < 15)))]
    other = [*map(str, put(tmp_path / "out", "b", MMStar=rows(30, lambda n: n < 25)))]
    status, stdout, stderr = clear("score", *one)
    assert status == 0 and stdout.startswith("benchmark") and "a_MMStar" in stdout, stderr
    forms = ["--json", "f/x.json", "--markdown", "f/x.md", "--html", "f/x.html", "--rows", "f/x.parquet"]
    status, stdout, stderr = clear("score", *one, *other, "--reference", "a", "--published", *forms)
    assert status == 0 and stdout.startswith("Averages and robustness") and "+33.33" in stdout, stderr
    found = json.loads((tmp_path / "f/x.json").read_text())
    assert found["models"]["b"]["levels"]["clean"]["average"]["minus_reference"]["low"] > 0
    assert found["published"]["CLEAR-RL"]["levels"]["clean"]["benchmarks"]["MMStar"] == {"estimate": 0.6586}
    assert len(pd.read_parquet(tmp_path / "f/x.parquet")) == 60
    assert "+33.33" in (tmp_path / "f/x.md").read_text()
    page = (tmp_path / "f/x.html").read_text()
    assert "+33.33" in page and not re.search(r"(src|href)=", page), "it loads nothing"
    status, stdout, stderr = clear("score", *one, "--reference", "c")
    assert status == 1 and stderr.startswith("error: --reference c: no table is of this model; name one of a.")
