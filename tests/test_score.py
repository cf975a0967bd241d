"""Scoring prediction files of the public benchmarks: options, circular, pairs, a judge over HTTP, robustness."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from clear.bench import judge
from clear.bench.vlmeval import scores
from clear.bench.vlmeval.options import REFUSED
from clear.errors import ClearError
from clear.llm.endpoint import connect
from clear.project.scratch import write_params
from tests.chat_server import completion, serving, settings, user_text
from tests.conftest import ROOT


def write(file, rows) -> str:
    pd.DataFrame(rows).to_csv(file, sep="\t", index=False)
    return str(file)


def mcq(index: int, prediction: str, answer: str = "A", **more) -> dict:
    listed = {"A": "red", "B": "blue"}
    return {"index": index, "question": "Which?", **listed, "answer": answer, "prediction": prediction, **more}


def scored(tmp_path, client=None, **files):
    paths = [Path(write(tmp_path / f"{name}.tsv", rows)) for name, rows in files.items()]
    return scores.score(scores.read_predictions(paths), client)


@pytest.mark.parametrize("bench", ["CLEAR_MMBench_DEV_EN_V11", "M_MMStar", "CV-Bench-2D", "M_My-Bench"])
@pytest.mark.parametrize(
    "end",
    [
        "exact_matching_result",
        "openai_result",
        "acc",
        "gpt-4-0125_result",
        "gpt-4-turbo_score",
        "gpt-4o",
        "dark",
        "high",
        "lens_blur_low",
        "LOW_LEVEL",
        "LOW_LEVEL_HIGH_result",
        "jpeg_compression_HIGH",
        "LOW_LEVEL_HARD",
    ],
)
def test_a_name_that_ends_in_something_else_is_no_clean_benchmark(tmp_path, bench, end):
    file = Path(write(tmp_path / f"{bench}_{end}.tsv", [mcq(0, "A")]))
    with pytest.raises(ClearError, match=rf"{end}\.tsv: the name {bench}_{end}: '.*' is not a level or corruption"):
        scores.read_predictions([file])
    write(file, [mcq(0, "A", bench=bench, corruption="clean", severity="clean")])
    assert scores.read_predictions([file])["bench"].tolist() == [bench], "unless its columns say what it is"


def test_mmbench_counts_a_question_only_if_every_rotation_is_right(tmp_path):
    rows = [
        mcq(1, "A"),
        mcq(1000001, "B", "B"),
        mcq(2, "A"),
        mcq(1000002, "A", "B"),
        mcq(2000002, "B", "B"),
        mcq(3, "?"),
    ]
    found = scores.summary(scored(tmp_path, MMBench_DEV_EN_V11=rows))["benchmarks"]["MMBench_DEV_EN_V11"]
    level = found["levels"]["clean"]
    assert level["circular"] == level["score"] == pytest.approx(1 / 3) and level["single"] == pytest.approx(4 / 6)
    assert level["questions"] == 6 and level["unmatched"] == 1 and level["rejected"] == 0


def test_mmbench_without_rotations_is_not_called_circular(tmp_path):
    rows = [mcq(1, "A"), mcq(2, "B"), mcq(3, "A"), mcq(4, "A")]
    found = scores.summary(scored(tmp_path, MMBench_DEV_EN_V11=rows))
    bench = found["benchmarks"]["MMBench_DEV_EN_V11"]
    assert bench["circular"] is False and bench["levels"]["clean"]["score"] == 0.75
    assert "circular" not in bench["levels"]["clean"]
    assert "MMBench_DEV_EN_V11 (no rotations)" in scores.table(found)
    # A level without rotations is not compared with one that has them.
    mixed = scored(tmp_path, MMBench_DEV_EN_V11=[*rows, mcq(1000001, "B")], MMBench_DEV_EN_V11_LOW_LEVEL_HIGH=rows)
    bench = scores.summary(mixed)["benchmarks"]["MMBench_DEV_EN_V11"]
    assert bench["circular"] is False and bench["levels"]["clean"]["score"] == 3 / 5


def test_rotations_without_their_first_row_are_dropped_as_in_vlmevalkit_and_said(tmp_path):
    rows = [mcq(1, "A"), mcq(1000001, "A"), mcq(2, "B"), mcq(1000003, "A"), mcq(2000003, "A")]
    found = scores.summary(scored(tmp_path, MMBench_DEV_EN_V11=rows))
    level = found["benchmarks"]["MMBench_DEV_EN_V11"]["levels"]["clean"]
    assert level["circular"] == 0.5 and level["incomplete"] == 1 and level["single"] == 0.8
    assert "MMBench_DEV_EN_V11: 1 questions of which the first row is missing" in scores.table(found)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("left_out", [0, 1, 7, 8, 299])
def test_a_row_that_is_left_out_breaks_its_own_mmvp_pair_and_no_other(tmp_path, first, left_out):
    """300 rows, every second pair right: with positions in place of indices all pairs fell apart."""
    rows = [mcq(first + n, "A" if n // 2 % 2 else "B", question=f"Pair {n // 2}?") for n in range(300)]
    level = scores.summary(scored(tmp_path, MMVP=rows))["benchmarks"]["MMVP"]["levels"]["clean"]
    assert level["pair"] == 0.5 and level["incomplete"] == 0
    del rows[left_out]
    found = scores.summary(scored(tmp_path, MMVP=rows[::-1]))
    level = found["benchmarks"]["MMVP"]["levels"]["clean"]
    assert level["pair"] == pytest.approx((75 - left_out // 2 % 2) / 149) and level["incomplete"] == 1
    assert "MMVP: 1 pairs of which one half is missing" in scores.table(found)


def test_cv_bench_is_given_plain_and_by_source(tmp_path):
    rows = [mcq(n, "A" if n < 5 else "B", source="ADE20K" if n < 4 else "COCO", category="Count") for n in range(6)]
    found = scores.summary(scored(tmp_path, **{"CV-Bench-2D": rows, "CV-Bench-2D_dark_HIGH": rows}))
    level = found["benchmarks"]["CV-Bench-2D"]["levels"]["high"]
    assert level["score"] == pytest.approx(5 / 6) and level["sources"] == 0.75
    assert level["by_source"] == {"ADE20K": 1.0, "COCO": 0.5} and level["by_category"] == {
        "Count": pytest.approx(5 / 6)
    }
    assert "  mean over sources" in scores.table(found)


def test_an_option_without_text_keeps_its_letter(tmp_path):
    """VLMEvalKit reads the option "None" as an empty cell, and writes it as one."""
    gap = {"A": "", "B": "two", "C": "", "D": "four"}
    said = ["A", "The answer is C.", "Either A or D", "four"]
    rows = [mcq(n, text, "D" if n > 1 else "AC"[n], **gap) for n, text in enumerate(said)]
    frame = scored(tmp_path, MMStar=rows)
    assert frame.score.tolist() == [1, 1, 0, 1] and frame.how.tolist() == ["rule", "rule", "unmatched", "rule"]
    last = {"A": "one", "B": "two", "C": ""}  # the last one, where it is the answer
    frame = scored(tmp_path, MMStar=[mcq(n, text, "C", **last) for n, text in enumerate(["C", "A or C", "two"])])
    assert frame.score.tolist() == [1, 0, 0] and frame.extracted.tolist() == ["C", "", "B"]


def test_an_answer_tag_that_is_never_closed_still_answers(tmp_path):
    frame = scored(
        tmp_path, MMStar=[mcq(0, "<think>B, no</think> <answer> A"), mcq(1, "the answer is **a**, I see it so")]
    )
    assert frame.score.tolist() == [1, 1]


def test_mmvp_is_scored_by_single_question_and_by_pair(tmp_path):
    rows = [mcq(i, "A" if right else "B") for i, right in zip((1, 2, 3, 4, 5), (1, 1, 1, 0, 1), strict=True)]
    level = scores.summary(scored(tmp_path, MMVP=rows))["benchmarks"]["MMVP"]["levels"]["clean"]
    assert level["score"] == level["single"] == pytest.approx(0.8)
    assert level["pair"] == 0.5, "the last question has no partner and is not a pair"


def test_levels_give_robustness_and_averages_need_every_benchmark(tmp_path):
    right, wrong = mcq(0, "<think>B?</think><answer>A</answer>"), mcq(1, "B")
    frame = scored(
        tmp_path,
        MMStar=[right, mcq(1, "A")],
        MMStar_LOW_LEVEL_HIGH=[right, wrong],
        RealWorldQA=[right, mcq(1, "A"), mcq(2, "A"), mcq(3, "B")],
        RealWorldQA_dark_HIGH=[right],
        RealWorldQA_jpeg_HIGH=[wrong, mcq(2, "B")],
        RealWorldQA_jpeg_LOW=[right],
    )
    found = scores.summary(frame)
    star, real = found["benchmarks"]["MMStar"], found["benchmarks"]["RealWorldQA"]
    assert star["robustness"] == {"absolute": 0.5, "relative": 0.5}
    assert real["levels"]["high"]["corruptions"] == {"dark": 1.0, "jpeg": 0.0}
    assert real["levels"]["high"]["score"] == 0.5, "the mean over corruptions, however many rows each has"
    assert real["robustness"]["relative"] == 0.5, "all three questions of hard are right at clean"
    assert found["average"]["levels"] == {"clean": pytest.approx(0.875), "high": 0.5}, "low was not run on MMStar"
    text = scores.table(found)
    average = next(line for line in text.splitlines() if line.startswith("average"))
    assert average.split() == ["average", "87.50", "–", "50.00", "50.00"]


def test_free_answers_are_matched_exactly_and_gold_answers_may_be_texts(tmp_path):
    free = {"index": 0, "question": "How many?", "answer": "Two.", "prediction": "two"}
    frame = scored(tmp_path, RealWorldQA=[free, mcq(1, "B", "blue"), free | {"index": 2, "prediction": "2"}])
    assert frame.score.tolist() == [1.0, 1.0, 0.0] and frame.how.tolist() == ["exact", "rule", "exact"]
    with pytest.raises(ClearError, match=r"X\.tsv: index 1: the answer 'green' names none"):
        scored(tmp_path, X=[mcq(1, "B", "green")])


def test_signs_decide_a_free_answer_and_files_with_and_without_options_go_together(tmp_path):
    said = [("5", "-5"), ("-3", "3"), ("<", "<"), ("1,000", "1000"), ("2/3", "2 3")]
    free = [{"index": n, "question": "x?", "answer": a, "prediction": b} for n, (a, b) in enumerate(said)]
    frame = scored(tmp_path, MathVista_MINI=free, MMStar=[mcq(0, "A")])
    assert frame.score.tolist() == [0, 0, 1, 1, 0, 1]


@pytest.mark.parametrize("ending", ["tsv", "csv", "xlsx", "parquet", "json", "jsonl"])
def test_every_format_gives_the_same_scores(tmp_path, ending):
    """Options called None and NA, different numbers of options, and a prediction that is missing."""
    rows = [
        mcq(1, "(A) None", "A", A="None", B="NA", C="007", image="x" * 99),
        mcq(2, "007", "C", A="None", B="NA", C="007", image="x" * 99),
        mcq(3, None, "B", A="1e5", B="true", C=None, image="1"),
        mcq(4, "na", "B", A="None", B="NA", C=None, image="1"),
    ]
    frame = pd.DataFrame(rows)
    file = tmp_path / f"M_Bench.{ending}"
    if ending == "tsv":
        frame.to_csv(file, sep="\t", index=False)
    elif ending == "csv":
        frame.to_csv(file, index=False)
    elif ending == "xlsx":
        frame.to_excel(file, index=False)
    elif ending == "parquet":
        frame.to_parquet(file)
    else:
        frame.to_json(file, orient="records", lines=ending == "jsonl")
    found = scores.score(scores.read_predictions([file]))
    assert found["index"].tolist() == ["1", "2", "3", "4"] and found.score.tolist() == [1, 1, 0, 1]
    assert found["A"].tolist() == ["None", "None", "1e5", "None"] and found["prediction"][2] == ""
    assert found["bench"].tolist() == ["M_Bench"] * 4 and "image" not in found


def mmvet(index: int, answer: str, prediction: str) -> dict:
    return {"index": index, "question": f"Q{index}?", "answer": answer, "prediction": prediction}


def test_mm_vet_is_graded_by_the_judge_and_a_failing_judge_rejects_the_row(tmp_path):
    def answer(body, number):
        text = user_text(body)
        asked = text[text.rindex("Question: ") :]
        if "Q0?" in asked:
            return 200, {}, completion("0.5")
        if "Q1?" in asked:  # an unusable reply first
            return 200, {}, completion("rather good" if body["temperature"] == 0 else "Grade: 1.0")
        if "Q2?" in asked:
            return 200, {}, completion("7")
        if "Q3?" in asked:
            return 500, {}, b"down"
        if "Which?" in asked:
            return 200, {}, completion("B." if "the azure" in asked else "Z")
        return 400, {}, {"error": "filtered"}

    rows = [mmvet(i, "x <AND> y", "x") for i in range(5)]
    with serving(answer) as server:
        with connect(settings(server.url, retries=1), "judge", tmp_path / "j.sqlite", pause=0.01) as client:
            frame = scored(tmp_path, client, MMVet=rows, MMStar=[mcq(0, "the azure one", "B"), mcq(1, "hm")])
        assert "x <AND> y" in user_text(server.bodies[0]) and server.bodies[0]["temperature"] == 0
    vet, star = frame[frame.bench == "MMVet"], frame[frame.bench == "MMStar"]
    assert vet.score.tolist()[:2] == [0.5, 1.0] and vet.score.isna().tolist() == [False, False, True, True, True]
    assert [reason.split(":")[0] for reason in vet.reject] == ["", "", "malformed", "outage", "refused"]
    assert star.score.tolist() == [1.0, 0.0] and star.how.tolist() == ["judge", "judge"]
    assert star.extracted.tolist() == ["B", REFUSED]
    found = scores.summary(frame)["benchmarks"]["MMVet"]["levels"]["clean"]
    assert found["score"] == 0.75 and found["rejected"] == 3 and found["questions"] == 5
    with pytest.raises(ClearError, match=r"graded by a judge; set judge.url"):
        scored(tmp_path, MMVet=rows)


def test_a_level_of_which_nothing_was_graded_has_no_figure(tmp_path):
    with serving(lambda body, number: (500, {}, b"")) as server:
        client = connect(settings(server.url, retries=0), "judge", tmp_path / "j.sqlite", pause=0.01)
        frame = scored(tmp_path, client, MMVet=[mmvet(0, "x", "x")])
        client.close()
    found = scores.summary(frame)
    assert found["benchmarks"]["MMVet"]["levels"]["clean"]["score"] is None and found["average"]["levels"] == {}
    assert "–" in scores.table(found)


def test_agreement_is_read_from_json_and_nothing_else(tmp_path):
    replies = {
        "q0": '{"consistent": true}',
        "q1": 'Sure: ```{"consistent": false}```',
        "q2": "yes",
        "q3": '{"consistent": 1}',
    }

    def answer(body, number):
        return 200, {}, completion(next(v for k, v in replies.items() if f"Question: {k}" in user_text(body)))

    with serving(answer) as server:
        with connect(settings(server.url), "judge", tmp_path / "j.sqlite") as client:
            found = judge.agreements(client, [(q, "r", "a") for q in replies])
        assert server.bodies[0]["response_format"] == {"type": "json_object"}
    assert found[:2] == [True, False]
    assert all(
        isinstance(one, str) and one.startswith("malformed: the judge gave no verdict in 5") for one in found[2:]
    )


def test_a_judge_may_repeat_the_options_text(tmp_path):
    """As VLMEvalKit reads its judge's replies: by letter or by text; anything else is asked again, then rejected."""
    options = ["a red cup", "two cups on a long table"]
    replies = {"q0": "B. two cups on a long table", "q1": "a red cup", "q2": "Letter: Z", "q3": "A or B, I cannot say"}

    def answer(body, number):
        return 200, {}, completion(next(v for k, v in replies.items() if f"Question: {k}" in user_text(body)))

    with serving(answer) as server, connect(settings(server.url), "judge", tmp_path / "j.sqlite") as client:
        found = judge.options_meant(client, [(q, options, "hm") for q in replies])
    assert found[:3] == [["B"], ["A"], [REFUSED]] and found[3].startswith("malformed: the judge gave no verdict in 5")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"index": 1, "question": "?", "answer": "x"}], "no column 'prediction'"),
        ([mcq(1, "A"), mcq(1, "B")], "index 1 occurs twice"),
        ([mcq(1, "A", "")], "index 1 has no answer"),
        ([mcq(1, "A", bench="X", corruption="dark", severity="worst")], "severity 'worst' is not one of"),
    ],
)
def test_a_file_that_cannot_be_scored_is_named(tmp_path, rows, said):
    with pytest.raises(ClearError, match=rf"X\.tsv: .*{said}"):
        scores.read_predictions([Path(write(tmp_path / "X.tsv", rows))])


def test_rows_without_a_verdict_are_told_beside_the_table(tmp_path, clear, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "MMVet.tsv", [mmvet(0, "x", "x"), mmvet(1, "x", "y")])
    with serving(lambda body, number: (200, {}, completion("1.0" if number == 0 else "no idea"))) as server:
        write_params(tmp_path / "params.yaml", [f"judge.url={server.url}"])
        monkeypatch.setenv("CLEAR_JUDGE_KEY", "k")
        status, stdout, stderr = clear("score", file, "--judge")
    assert status == 0 and "MMVet" in stdout
    assert stderr.splitlines()[-1].startswith("1 rows have no verdict and are in no figure; the first: malformed: ")


def test_the_command_prints_a_table_and_writes_json_and_rows(tmp_path, clear, monkeypatch):
    """With a judge that is there only the first time: the second run asks nothing."""
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path / "params.yaml")
    files = [
        write(tmp_path / "MMVet.tsv", [mmvet(0, "x", "x"), mmvet(1, "x", "")]),
        write(tmp_path / "MMVet_LOW_LEVEL_HIGH.tsv", [mmvet(0, "x", "y")]),
    ]
    arguments = ["score", *files, "--json", "s.json", "--rows", "out/r.parquet"]

    status, _, stderr = clear(*arguments)
    assert status == 1 and "set judge.url" in stderr
    text = (tmp_path / "params.yaml").read_text()
    head, tail = text.split("judge:\n")
    (tmp_path / "params.yaml").write_text(f"{head}judge:\n{tail.replace(chr(39) * 2, '$J_URL', 1)}")
    assert "J_URL is not set" in clear(*arguments, "--judge")[2]
    monkeypatch.setenv("CLEAR_JUDGE_KEY", "k")
    with serving(lambda body, number: (200, {}, completion("1.0" if number < 2 else "0.2"))) as server:
        monkeypatch.setenv("J_URL", server.url)
        # A process of its own: what the second run knows of this one, it has read from files.
        done = subprocess.run(
            [sys.executable, "-m", "clear", *arguments, "--judge"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert len(server.bodies) == 3 and server.keys[0] == "Bearer k"
    found = json.loads((tmp_path / "s.json").read_text())
    assert set(found["benchmarks"]) == {"MMVet"} and found["judge"]["model"] == "gpt-4.1"
    assert found["judge"]["replies"] == 3 and len(found["judge"]["prompts"]) == 12
    assert done.stdout.startswith("benchmark") and "MMVet" in done.stdout
    assert len(pd.read_parquet(tmp_path / "out/r.parquet")) == 3
    status, stdout, stderr = clear(*arguments, "--judge")
    assert status == 0 and stdout == done.stdout, stderr
