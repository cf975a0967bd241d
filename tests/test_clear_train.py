"""The published training set: its records become samples and traces, and a record that cannot has a reason."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from clear.bench import predictions
from clear.config import compose, from_dict
from clear.data.images import decode_image, encode_image
from clear.data.records import CLEAN, INCOMING, read_samples, write_samples
from clear.degradation.protocol import degrade as degraded
from clear.errors import ClearError
from clear.model import lora
from clear.model.checkpoint import MODEL, PLAIN
from clear.project.scratch import write_params
from clear.sources import clear_train
from clear.sources.scenes.render import scenes
from clear.stages import base, degrade, evaluate, mmd_bench, sft, source, traces, validate
from clear.traces.given import REPLY
from clear.traces.table import read_traces
from clear.validation.suites import incoming_checks
from tests.tiny import save_random_model

RESTORES = "<think> insufficient : restore </think> <image_restore>\n<think> a shape </think> <answer> {} </answer>"
DIRECT = "<think> sufficient : a shape </think>\n<answer> {} </answer>"


def record(id: str, image: str, question: str, reply: str, **more) -> dict:
    """A line of a table, as the authors' scripts write it."""
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": reply}]
    tool = "<image_restore>" in reply
    return {
        "id": id,
        "subset": "chart",
        "image": image,
        "conversations": turns,
        "split_type": "tool" if tool else "no_tool",
        "tool_used": tool,
    } | more


class Published:
    """A folder in the layout of the training set, below data/raw."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for side in (clear_train.CLEAN, clear_train.DEGRADED):
            (folder / side).mkdir(parents=True)
        self.lines: list[str] = []

    def picture(self, number: int, name: str, sides: str = "both", **size: int) -> str:
        array = np.random.default_rng(number).integers(0, 255, (size.get("height", 64), 80, 3), np.uint8)
        if sides in ("both", "clean"):
            (self.folder / clear_train.CLEAN / name).write_bytes(encode_image(array))
        if sides in ("both", "degraded"):
            (self.folder / clear_train.DEGRADED / name).write_bytes(encode_image(array // 2, "jpeg"))
        return name

    def add(self, line: dict | str) -> None:
        if isinstance(line, dict):
            half = "\ud83d" in json.dumps(line, ensure_ascii=False)
            line = json.dumps(line, ensure_ascii=half)  # half an emoji only as an escape, which JSON allows
        self.lines.append(line)

    def close(self) -> None:
        (self.folder / "tool.jsonl").write_bytes("\n".join(self.lines).encode(errors="surrogatepass") + b"\n")


@pytest.fixture
def published(tmp_path, monkeypatch) -> Published:
    monkeypatch.chdir(tmp_path)
    return Published(tmp_path / "data/raw/clear")


KIND = ["source.kind=clear_train", "source.path=data/raw/clear", "degrade.workers=1", "traces.kind=given"]


def read(published: Published, shares: str = "[0,1,0,0,0,0]") -> tuple[list, dict[str, tuple[str, str]]]:
    """The samples of sft, and reason and detail of every reject, by id."""
    published.close()
    write_params(Path("params.yaml"), ["profile=smoke", *KIND, f"source.shares={shares}"])
    source.run(from_dict(compose([*KIND, f"source.shares={shares}"])))
    found = pd.read_parquet("data/rejects/source.parquet")
    return list(read_samples("data/samples/sft")), {
        row.id: (row.reason, row.detail) for row in found.itertuples(index=False)
    }


def test_a_record_is_a_sample_with_its_degraded_copy_and_its_reply(published):
    name = published.picture(1, "Ünï côde\u202f中.png")
    reply = RESTORES.format("красный\nкруг")
    published.add(record("7", name, "Какой?\nA. α\nB. β", RESTORES.format("B"), subset="ai2d(gpt4v)"))
    published.add(record("7", name, "Что это?", reply))
    samples, rejects = read(published)
    assert not rejects and [sample.id for sample in samples] == ["ai2d(gpt4v):7", "chart:7"]
    first, second = samples
    assert first.degraded == (published.folder / clear_train.DEGRADED / name).read_bytes()
    assert first.image == (published.folder / clear_train.CLEAN / name).read_bytes() and first.paired
    assert (first.corruption, first.severity, first.source) == ("clear_train", INCOMING, "clear_train")
    assert (first.questions[0].text, first.questions[0].answer) == ("Какой?\nA. α\nB. β", "B")
    assert first.questions[0].options == ("α", "β") and second.questions[0].options == ()
    kept = json.loads(second.annotation)
    assert kept[REPLY] == reply and kept["tool_used"] is True and kept["split_type"] == "tool"
    assert second.questions[0].answer == "красный\nкруг" and second.questions[0].task == "chart"


def test_only_what_is_trained_on_keeps_the_copy_that_came_with_it(published):
    for n in range(40):
        published.add(record(str(n), published.picture(n, f"{n}.png"), "What?", DIRECT.format("x")))
    read(published, "[0.1,0.3,0.2,0.1,0.2,0.1]")
    for split in ("pretrain", "sft", "rl", "validation", "bench", "development"):
        samples = list(read_samples(f"data/samples/{split}"))
        assert samples, split
        brings = [sample.degraded is not None and sample.corruption == "clear_train" for sample in samples]
        assert all(brings) if split in ("sft", "rl") else not any(brings)
        assert split in ("sft", "rl") or all((s.corruption, s.severity) == (CLEAN, CLEAN) for s in samples)
    config = from_dict(compose([*KIND, "degrade.validation_copies=2"]))
    degrade.run(config)
    for split in ("sft", "rl"):
        assert list(read_samples(f"data/degraded/{split}")) == list(read_samples(f"data/samples/{split}"))
    counts = json.loads(Path("data/metrics/degrade.json").read_text())["images"]
    assert counts["sft"] == {"clear_train": {INCOMING: len(list(read_samples("data/samples/sft")))}}
    assert "clear_train" not in counts["validation"] and counts["validation"]
    mmd_bench.run(config)
    checks = validate.prepare(validate.measured_frames(1), config)["incoming_clear_train"]
    assert {check.name for check in checks} == {check.name for check in incoming_checks(0)}, "a source, not a set"


GOOD = DIRECT.format("red")
TURNS = record("", "", "What?", GOOD)["conversations"]


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        ({"image": "../outside.png"}, "no image", "lies outside"),
        ({"image": "/etc/passwd"}, "no image", "lies outside"),
        ({"image": "a/../../corruption_images/0.png"}, "no image", "lies outside"),
        ({"image": "gone.png"}, "no image", "images: `image` = 'gone.png': no such file"),
        ({"image": "alone.png"}, "partner", "corruption_images: `image` = 'alone.png': no such file"),
        ({"image": "text.png"}, "image", "not a complete image"),
        ({"image": "cut.png"}, "image", "degraded: "),
        ({"image": "flat.png"}, "partner", "clean 80 x 64 px, degraded 80 x 48 px"),
        ({"image": "same.png"}, "partner", "has the pixels of the clean one"),
        ({"image": ""}, "no image", "expected a file's name"),
        ({"image": ["0.png"]}, "no image", "expected a file's name"),
        ({"image": "x" * 5000}, "no image", "neither a file name"),
        ({"image": "0.png\x00"}, "no image", "U+0000"),
        ({"id": None}, "id", "`id`"),
        ({"id": "two\nlines"}, "id", "one line"),
        ({"subset": None}, "line", "`subset`"),
        ({"subset": "two\nlines"}, "line", "one line"),
        ({"conversations": "What?"}, "conversation", "expected a question and a reply"),
        ({"conversations": TURNS[:1]}, "conversation", "expected a question and a reply"),
        ({"conversations": TURNS * 2}, "conversation", "expected a question and a reply"),
        ({"conversations": TURNS[::-1]}, "conversation", "by ['gpt', 'human']"),
        ({"conversations": [TURNS[0], TURNS[1] | {"from": "system"}]}, "conversation", "'system'"),
        ({"conversations": [TURNS[0], TURNS[1] | {"value": None}]}, "conversation", "`value` is None"),
        ({"conversations": [TURNS[0], TURNS[1] | {"value": "red"}]}, "conversation", "no answer block"),
        ({"conversations": [TURNS[0], TURNS[1] | {"value": "\ud83d" + GOOD}]}, "conversation", "U+D83D"),
        ({"conversations": [TURNS[0], TURNS[1] | {"value": DIRECT.format("")}]}, "conversation", "answer is empty"),
        ({"conversations": [{"from": "human", "value": " <image> "}, TURNS[1]]}, "conversation", "question is empty"),
        ({"conversations": [{"from": "human", "value": "<image><image>?"}, TURNS[1]]}, "conversation", "2 images"),
    ],
)
def test_a_record_that_cannot_be_used_has_a_reason_and_the_others_are_kept(published, change, reason, said):
    (published.folder.parent / "outside.png").write_bytes(encode_image(np.zeros((64, 80, 3), np.uint8)))
    published.picture(0, "0.png")
    published.picture(1, "alone.png", "clean")
    published.picture(2, "cut.png", "clean")
    published.picture(3, "flat.png", "clean")
    whole = (published.folder / clear_train.CLEAN / "0.png").read_bytes()
    for side in (clear_train.CLEAN, clear_train.DEGRADED):
        (published.folder / side / "text.png").write_text("no picture")
        (published.folder / side / "same.png").write_bytes(whole)
    (published.folder / clear_train.DEGRADED / "cut.png").write_bytes(whole[: len(whole) // 2])
    published.picture(3, "flat.png", "degraded", height=48)
    published.add(record("bad", "0.png", "What?", GOOD) | change)
    published.add(record("good", "0.png", "What?", GOOD))
    samples, rejects = read(published)
    assert [sample.id for sample in samples] == ["chart:good"]
    ((found, detail),) = rejects.values()
    assert found == reason and said in detail, detail


def test_broken_lines_and_repeated_ids_are_rejected_and_the_run_continues(published):
    published.picture(0, "0.png")
    for line in ('{"id": "cut', "[]", "null", '{"id": "1", "id": "2"}'):
        published.add(line)
    for subset in ("a", "b", "a"):
        published.add(record("1", "0.png", "What?", GOOD, subset=subset))
    published.lines.append("\ud83d")
    samples, rejects = read(published)
    assert [sample.id for sample in samples] == ["a:1", "b:1"], "an id may occur in several subsets"
    assert {name: reason for name, (reason, _) in rejects.items()} == {
        **{f"tool-00000{n}": "line" for n in (1, 2, 3, 4, 8)},
        "a:1": "id",
    }
    assert "another row has this id" in rejects["a:1"][1] and "occurs twice" in rejects["tool-000004"][1]


@pytest.mark.parametrize("missing", ["tables", clear_train.CLEAN, clear_train.DEGRADED])
def test_a_folder_of_another_layout_is_named(published, missing):
    if missing != "tables":
        published.add(record("1", "0.png", "What?", GOOD))
        published.close()
        (published.folder / missing).rmdir()
    with pytest.raises(ClearError, match=r"no \*\.jsonl" if missing == "tables" else f"{missing}: no such folder"):
        list(clear_train.rows(published.folder))


# --- traces ----------------------------------------------------------------------------------------------------------


def test_replies_become_traces_and_those_without_the_grammar_are_rejected(published):
    replies = {
        "restores": RESTORES.format("red"),
        "direct": DIRECT.format("red"),
        "tight": "<think>a</think><image_restore>\n<think>Ünï\ncode</think><answer>red</answer>",
        "unthought": "<answer>red</answer>",
        "open": "<think> a <answer> red </answer>",
        "unfinished": "<think> a </think> <image_restore> <answer> red </answer>",
        "twice": RESTORES.format("red").replace("a shape </think>", "b </think> <image_restore>"),
        "more": DIRECT.format("red") + " and more",
        "empty": "<think> a </think><answer></answer><answer> red </answer>",
    }
    for n, (name, reply) in enumerate(replies.items()):
        published.add(record(name, published.picture(n, f"{n}.png"), "What?", reply))
    samples, rejects = read(published)
    assert len(samples) == len(replies) and not rejects, "they are pictures with a question all the same"
    shutil.copytree("data/samples/sft", "data/degraded/sft")
    traces.run(from_dict(compose(KIND)))
    rows = {row.sample.removeprefix("chart:"): row for row in read_traces("data/traces")}
    assert rows.keys() == {"restores", "direct", "tight"}
    assert rows["direct"].trace.replies == (DIRECT.format("red"),) and not rows["direct"].base_correct
    restored = rows["tight"]
    assert restored.reply_1 == "<think>a</think> <image_restore>"
    assert restored.reply_2 == restored.direct == restored.restored == "<think>Ünï\ncode</think><answer>red</answer>"
    assert (restored.corruption, restored.severity, restored.text) == ("clear_train", INCOMING, "What?")
    found = pd.read_parquet("data/rejects/traces.parquet")
    bad = {row.id.split("/")[0].removeprefix("chart:"): row.reason for row in found.itertuples()}
    assert bad == dict.fromkeys(replies.keys() - rows.keys(), "grammar")
    metrics = json.loads(Path("data/metrics/traces.json").read_text())
    assert metrics["traces"] == 3 and metrics["rejects"] == {"grammar": 6} and metrics["validation"]["success"]
    assert (
        metrics["restoring_share"] == pytest.approx({INCOMING: 2 / 3}, abs=1e-6) and "base_accuracy" not in metrics
    ), "no base was asked"


def test_a_trace_that_breaks_an_expectation_is_rejected_under_its_name(published, monkeypatch):
    for n, name in enumerate(("good", "bad")):
        published.add(record(name, published.picture(n, f"{n}.png"), "What?", RESTORES.format("red")))
    read(published)
    good, bad = read_samples("data/samples/sft")
    other = replace(bad, questions=(replace(bad.questions[0], answer="blue"),))
    write_samples("data/degraded/sft", [good, other])
    traces.run(from_dict(compose(KIND)))
    assert [row.sample for row in read_traces("data/traces")] == ["chart:good"]
    (reject,) = pd.read_parquet("data/rejects/traces.parquet").itertuples()
    assert (reject.reason, reject.detail[:8]) == ("answer", "not true")


def test_samples_that_bring_no_reply_are_rejected_and_without_any_the_stage_stops(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_params(Path("params.yaml"), ["profile=smoke"])
    write_samples("data/degraded/sft", scenes("sft", 2, 3, 128, 1))
    with pytest.raises(ClearError, match=r"the data brought no usable trace.*'conversation': 2"):
        traces.run(from_dict(compose(["traces.kind=given", "traces.questions=1"])))


# --- the way from a checkpoint and the training set to an evaluated model -------------------------------------------


@pytest.mark.slow
def test_weights_alone_are_trained_on_the_published_set_and_evaluated(tmp_path, monkeypatch):
    """Every stage that reads them, in its order, with one adapter; then the adapter is merged and answers."""
    monkeypatch.chdir(tmp_path)
    published = Published(tmp_path / "data/raw/clear")
    made = list(scenes("sft", 60, 3, 128, 1))
    for n, sample in enumerate(made):
        name, question = f"{sample.id}.png", sample.questions[0]
        (published.folder / clear_train.CLEAN / name).write_bytes(sample.image)
        copy = degraded(decode_image(sample.image), "gaussian_noise", "high", sample.id, 0.4)
        (published.folder / clear_train.DEGRADED / name).write_bytes(encode_image(copy, "jpeg"))
        reply = (RESTORES, DIRECT)[n % 2].replace("a shape", "red circle").format(question.answer)
        published.add(record(str(n), name, question.text, reply))
    published.close()
    whole, alone = tmp_path / "BAGEL", tmp_path / "CLEAR"
    settings = [
        *("profile=smoke", *KIND, "source.shares=[0,0.4,0.1,0.1,0.2,0.2]", "runtime.threads=1"),
        *(f"model.checkpoint={alone}", f"model.base={whole}", "lora={rank: 2, alpha: 4.0}", "bridge.kind=direct"),
        *("sft.restoration.steps=0", "sft.traces.steps=2", "sft.other_path=0.0", "sft.both_paths=false"),
        *("sampling.max_think_tokens=4", "sampling.flow_steps=2"),
    ]
    write_params(Path("params.yaml"), settings)
    config = from_dict(compose(settings))
    save_random_model(whole, config)
    alone.mkdir()
    (whole / MODEL).rename(alone / PLAIN)
    torch.save({}, alone / "optimizer.00000-of-00008.pt")
    source.run(config)
    degrade.run(config)
    mmd_bench.run(config)
    validate.run(config)
    base.run(config)
    traces.run(config)
    sft.run(config)
    evaluate.run(config, "base")
    evaluate.run(config, "sft")
    for name in ("base", "sft"):
        assert len(predictions.read(tmp_path / f"data/predictions/{name}.parquet"))
    known = json.loads(Path("data/models/sft/base.json").read_text())
    assert known["rest"] == str(whole) and known["folder"] == str(alone)
    assert {PLAIN, "llm_config.json", "ae.safetensors", "tokenizer.json"} <= known["files"].keys()
    assert not any(name.startswith("optimizer") for name in known["files"])
    lora.merge("data/models/sft", tmp_path / "merged", torch.float32)
    assert (tmp_path / "merged" / "llm_config.json").is_file(), "a whole folder again"
    lora.load_model(tmp_path / "merged")
