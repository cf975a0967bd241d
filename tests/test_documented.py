"""Every command that the documentation shows: its options exist, overrides compose, targets are there, and it runs.

Commands are parsed by the real parsers here. `RUN` names the test that runs each; the blocks about BAGEL-7B are run in
this file as they stand, apart from folders, hosts and the number of processes (slow). `NOT_RUN` lists what no test
runs, with the reason.
"""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from clear.config import compose, from_dict
from clear.model.checkpoint import MODEL
from clear.sources.scenes.render import scenes
from tests.chat_server import completion, serving, user_text
from tests.conftest import ROOT, git
from tests.helpers.documents import DOCUMENTS, blocks, commands, said_by_the_code
from tests.helpers.tables import b64, write_tsv
from tests.tiny import save_random_model

NOT_PARSED = {
    "aws": "its program is not among the requirements",
    "prefect": "its parser is private; tests/test_deployment.py runs these commands",
    "curl": "it has no parser of its own to ask; tests/test_serve.py runs it",
}
"""First words of commands of which only the name is looked at, and why."""

SHELL = (".", "cp", "export", "ln", "ls", "mkdir")
"""Programs of the system, which are looked for only."""

BAGEL = "test_documented::test_one_adapter_is_trained_as_documented"
BAGEL_FULL = "test_documented::test_the_full_model_is_trained_on_several_devices_as_documented"
DEPLOYED = "test_deployment::test_a_schedule_fires_and_its_run_completes_with_logs_states_and_artifacts"
APPLIED = "test_adopt::test_an_experiment_becomes_a_commit_as_documented"
RUN = {
    "make venv": "test_make::test_an_installation_uses_the_lock_and_marks_itself_complete",
    "make repro": "test_smoke::test_smoke_runs_from_end_to_end_in_a_fresh_clone",
    "make remote": "test_s3::test_what_one_clone_pushes_another_pulls_and_need_not_reproduce",
    "make stack": "test_stack::test_the_stack_is_created_updated_and_read",
    "make image": "test_docker_image::test_an_image_is_built_from_the_lock_pushed_once_and_runs_without_root",
    "make deploy": DEPLOYED,
    "make prefect-local": "test_deployment::test_prefect_local_is_one_command_and_ctrl_c_stops_server_and_worker",
    "prefect server start": DEPLOYED,
    "prefect worker start": DEPLOYED,
    "prefect deployment run": "test_deployment::test_the_deployed_sweeper_ends_at_once_where_nothing_is_in_the_cloud",
    "python -m flows.sweep": "test_compute_flow::test_the_sweeper_ends_what_nobody_waits_for_and_nothing_else",
    "python -m flows.tidy": "test_tidy::test_the_flow_only_lists_unless_it_is_told_otherwise",
    "clear tidy": "test_tidy::test_only_what_nobody_needs_is_removed_and_only_on_request",
    "clear lineage": "test_lineage::test_data_code_parameters_parents_and_commit_are_those_of_the_lock",
    "dask scheduler": "test_cluster::test_a_killed_worker_changes_no_byte",
    "dask worker": "test_cluster::test_a_killed_worker_changes_no_byte",
    "dvc exp run": BAGEL,
    "dvc repro": BAGEL_FULL,
    "dvc commit": BAGEL_FULL,
    "dvc pull": "test_s3::test_what_one_clone_pushes_another_pulls_and_need_not_reproduce",
    "dvc push": "test_s3::test_what_one_clone_pushes_another_pulls_and_need_not_reproduce",
    "accelerate launch": BAGEL_FULL,
    "clear params": BAGEL_FULL,
    "dvc exp apply": APPLIED,
    "make experiments": APPLIED,
    "make check": APPLIED,
    "clear memory": BAGEL,
    "clear merge": BAGEL,
    "clear quantise": "test_quantised::test_the_command_writes_a_folder_that_loads_to_the_same_model",
    "clear ask": "test_cli::test_ask_prints_the_trace_and_saves_the_picture",
    "clear browse": "test_browse::test_a_wide_window_shows_pictures_answers_and_traces",
    "clear serve": "test_serve::test_the_answer_is_that_of_clear_ask",
    "curl": "test_serve::test_curl",
    "clear answer": "test_answer::test_sigkill_at_any_moment_is_survived",
    "clear mmd-bench": "test_tsv_command::"
    "test_the_command_resumes_after_sigkill_with_the_bytes_of_an_uninterrupted_run",
    "clear score": "test_leaderboard::test_the_command_makes_all_forms_and_leaves_one_model_as_it_was",
    "clear export": "test_release::test_export_writes_a_folder_with_a_card_of_the_committed_metrics",
    "clear release": "test_registry::test_releases_are_assigned_put_back_and_fetched_by_a_fresh_clone",
    "clear watch": "test_watch::test_the_same_world_has_not_changed_and_the_status_says_so",
    "python -m flows.watch": "test_watch_flow::test_a_real_run_on_a_server_ends_as_drifted_with_an_event",
    "clear incoming": "test_incoming_stages::test_the_commands_list_and_refuse",
    "clear compare": "test_compare::test_all_formats_are_written_and_the_page_needs_nothing_else",
    "clear gate": "test_compare::test_verdict_and_gate_of_real_branches",
}
"""First words of a command → the test that runs it."""

NOT_RUN = {
    "make test": "is what is running",
    "make lint": "runs beside the tests (.ci/run), and a test of it would repeat it",
    "aws": "needs an account, and its program is not among the requirements",
}
"""First words of a command → why no test runs it."""
ALL = [pytest.param(words, id=f"{place} {' '.join(words)[:60]}") for place, b in blocks("sh") for words in commands(b)]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def _clear(arguments: list[str]) -> None:
    from clear.cli import app

    # The help is shown after the whole line has been parsed: an option that does not exist is an error before.
    shown = CliRunner().invoke(app, [*arguments, "--help"])
    assert shown.exit_code == 0, shown.output
    _composes([b for a, b in pairwise(arguments) if a == "--set"])


def _composes(overrides: list[str]) -> None:
    if overrides:
        compose([text.replace("$PWD", "/here") for text in overrides])


def _dvc(arguments: list[str]) -> None:
    from dvc.cli import parse_args

    given = parse_args(arguments)
    _composes(getattr(given, "set_param", None) or [])
    for target in getattr(given, "targets", None) or []:
        assert target.split("@")[0] in STAGES, f"no stage {target}"


def _make(arguments: list[str]) -> None:
    done = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _accelerate(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert arguments[0] == "launch"
    given = launch_command_parser().parse_args(arguments[1:])
    assert (ROOT / given.config_file).is_file()
    assert given.module and given.training_script == "clear"
    assert given.training_script_args[0] in STAGES
    _clear(given.training_script_args)


def _python(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "clear"]:
        return _clear(arguments[2:])
    done = subprocess.run([sys.executable, *arguments, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "usage" in done.stdout.lower(), done.stderr
    return None


def _dask(arguments: list[str]) -> None:
    from distributed.cli import dask_scheduler, dask_worker

    program = {"scheduler": dask_scheduler, "worker": dask_worker}[arguments[0]]
    assert program.main.main([*arguments[1:], "--help"], standalone_mode=False) == 0


PARSERS = {
    "clear": _clear,
    "dvc": _dvc,
    "make": _make,
    "accelerate": _accelerate,
    "python": _python,
    "dask": _dask,
}


@pytest.mark.parametrize("words", ALL)
def test_a_documented_command_is_one(words):
    program, *arguments = words
    if program in PARSERS:
        PARSERS[program](arguments)
    elif program not in NOT_PARSED:
        assert program in SHELL, f"{program}: parse it here, or say in NOT_PARSED why not"
        assert program in (".", "export") or shutil.which(program)


def _starts(words: list[str], known: str) -> bool:
    return words[: len(known.split())] == known.split()


def test_every_documented_command_is_run_by_a_test_or_has_a_reason():
    shown = [words for _, block in blocks("sh") for words in commands(block) if words[0] not in SHELL]
    for words in shown:
        known = [start for start in (*RUN, *NOT_RUN) if _starts(words, start)]
        assert len(known) == 1, f"{' '.join(words)}: name the test that runs it in RUN, or a reason in NOT_RUN"
    unused = [start for start in (*RUN, *NOT_RUN) if not any(_starts(words, start) for words in shown)]
    assert not unused, "no document shows these any more"
    for test in RUN.values():
        module, name = test.split("::")
        functions = {n.name for n in ast.parse((ROOT / f"tests/{module}.py").read_text()).body if hasattr(n, "name")}
        assert name in functions, test


def test_commands_stand_in_blocks_that_are_checked():
    """An indented command, or a block of another name, would escape the test above."""
    known = "|".join(map(re.escape, (*PARSERS, *NOT_PARSED)))
    for file in (file for pattern in DOCUMENTS for file in ROOT.glob(pattern)):
        fenced = re.sub(r"^```.*?^```$", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert not re.findall(rf"^ {{4}}(?:{known}) .*", fenced, re.MULTILINE), file
    for language in {*re.findall(r"^```(\w*)$", "".join(f.read_text() for f in ROOT.glob("docs/*.md")), re.MULTILINE)}:
        assert language in ("", "sh", "json", "yaml", "python"), language


@pytest.mark.parametrize(("block", "overrides"), [("bagel_7b_lora", "exp"), ("bagel_7b", "params")])
def test_the_way_with_bagel_has_whoever_writes_the_traces_of_photographs(block, overrides):
    """`traces` refuses an oracle for questions without evidence, as those of photographs are."""
    mine = [text for place, text in blocks("sh") if place.startswith("docs/BAGEL.md")]
    (text,) = [text for text in mine if f"profile={block} " in text]
    (words,) = [words for words in commands(text) if overrides in words]
    values = dict(word.split("=", 1) for word in words if "=" in word)
    assert values["source.kind"] == "llava_onevision"
    assert values["traces.kind"] == "teacher" and values["teacher.url"].startswith("https://")


RUNBOOK = ROOT / "docs/RUNBOOK.md"
SPAN = re.compile(r"`([^`]+)`")


def _rows() -> list[list[str]]:
    """The cells of the runbook's tables of symptom, cause and command."""
    lines = RUNBOOK.read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [row for row in cells if len(row) == 3 and row[0] != "it says"]


def test_every_message_of_the_runbook_is_one_of_the_code():
    """A cell that is nothing but code quotes messages; words beside it describe what another program says."""
    said = said_by_the_code()
    quoted = [text for row in _rows() if not SPAN.sub("", row[0]).strip(" ,") for text in SPAN.findall(row[0])]
    assert len(quoted) > 60
    assert [text for text in quoted if text not in said] == []


RUNBOOK_COMMANDS = sorted(
    {text for row in _rows() for text in SPAN.findall(row[2]) if text.split()[0] in (*PARSERS, *NOT_PARSED)}
)


@pytest.mark.parametrize("text", RUNBOOK_COMMANDS)
def test_every_command_of_the_runbook_is_one(text):
    program, *arguments = shlex.split(text)
    if program == "python":  # its start would take seconds; the blocks of other documents start these two
        assert importlib.util.find_spec(arguments[arguments.index("-m") + 1])
    elif program in PARSERS:
        PARSERS[program](arguments)


@pytest.mark.parametrize(("place", "text"), blocks("python"), ids=[place for place, _ in blocks("python")])
def test_a_documented_piece_of_python_runs(place, text):
    names, code = {"image": np.full((64, 80, 3), 90, np.uint8)}, compile(text, place, "exec")
    if "vlmeval" in text:  # not among the requirements; its part is compiled only
        return
    if "openai" in text:  # needs a server: test_serve.py asks one with this package
        return
    exec(code, names)
    if "drizzle" in names:
        made = names["drizzle"](names["image"], 0.5, np.random.default_rng(1))
        assert made.shape == names["image"].shape and made.dtype == np.uint8
    else:
        assert names["degraded"].shape == names["image"].shape


def test_the_parser_of_blocks_reads_what_a_shell_reads(tmp_path: Path):
    block = "a b \\\n  c=$PWD   # why\nfor s in x y; do\n  run $s && keep -f $s\ndone\n\nexport K=…\n"
    assert list(commands(block)) == [
        ["a", "b", "c=$PWD"],
        *(["run", "x"], ["keep", "-f", "x"], ["run", "y"], ["keep", "-f", "y"]),
        ["export", "K=…"],
    ]


SMALL = """\
# @package _global_
defaults: [smoke, _self_]
profile: bagel_7b_lora
runtime: {threads: 1, device: cpu, weights: bfloat16, precision: bfloat16, token_budget: 256}
source: {shares: [0.0, 0.4, 0.15, 0.15, 0.2, 0.1]}
lora: {rank: 2, alpha: 4.0}
sft: {drop_text: 0.1, restoration: {steps: 0}, traces: {steps: 3, warmup: 1}}
bridge: {kind: direct, distill: {steps: 0}, answer: {steps: 2, warmup: 1}}
grpo: {steps: 1, prompts: 2, group_size: 2, flow_steps: 2}
sampling: {max_think_tokens: 6, flow_steps: 3, text_guidance: 3.0, image_guidance: 1.5, guidance_renorm: text_channel}
traces: {questions: 1}
report: {pictures: 1}
"""
"""What the profile is replaced by: the same kinds of everything, small."""


def _teacher(body: dict, number: int) -> tuple[int, dict, object]:
    """Says what the prompt says is right, after asking for a restoration where it is told to."""
    text, first = user_text(body), len(body["messages"]) < 3
    answer = re.search(r"The right answer is: (.*?)\. Your answer must", text)
    if answer is None and first:
        return 200, {}, completion("<think> red </think> <image_restore>")
    return 200, {}, completion(f"<think> a shape </think> <answer> {answer[1] if answer else 'red'} </answer>")


def _run_as_documented(tmp_path: Path, mentions: str, changes: dict[str, str]) -> Path:
    """Run a block of docs/BAGEL.md in a clone, from a small checkpoint in BAGEL's layout and a folder of photographs.

    `mentions` is text that only this block has, `changes` maps parts of its text to others. Returns the clone.
    """
    here, photographs = tmp_path / "here", tmp_path / "photographs"
    git(tmp_path, "clone", "-q", str(ROOT), str(here))
    (here / "clear/conf/profile/bagel_7b_lora.yaml").write_text(SMALL)
    git(here, "commit", "-qam", "small")
    save_random_model(here / "weights", from_dict(compose(["profile=smoke"])))
    photographs.mkdir()
    rows = [
        {
            "id": sample.id,
            "image": {"bytes": sample.image, "path": None},
            "conversations": [{"from": "human", "value": q.text}, {"from": "gpt", "value": q.answer}],
        }
        for sample in scenes("sft", 60, 3, 256, 1)
        for q in sample.questions[:1]
    ]
    pd.DataFrame(rows).to_parquet(photographs / "train-00000-of-00001.parquet")
    (block,) = [text for place, text in blocks("sh") if place.startswith("docs/BAGEL.md") and mentions in text]
    lines = [line for line in block.splitlines() if not line.startswith("make venv")]  # tests/test_make.py installs
    with serving(_teacher) as server:
        script = "\n".join(lines)
        for text, other in (changes | {"https://host/v1": server.url, "/photographs": str(photographs)}).items():
            assert text in script, f"{text} is no longer part of the block"
            script = script.replace(text, other)
        done = subprocess.run(
            ["bash", "-ec", script],
            cwd=here,
            env=os.environ
            | {"PYTHONPATH": str(here), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            | {"CLEAR_TEACHER_KEY": "secret"}
            | {f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
    assert server.bodies, "the teacher wrote the traces"
    return here


@pytest.mark.slow
def test_one_adapter_is_trained_as_documented(tmp_path):
    """From the checkpoint to the report and the merged model."""
    changes = {"KEY=…": "KEY=secret", "/data/llava-onevision": "/photographs"}
    here = _run_as_documented(tmp_path, "clear merge", changes)
    assert json.loads((here / "data/metrics/traces.json").read_text())["teacher"]["model"] == "gpt-4.1"
    assert (here / "data/results/report.json").is_file() and (here / "merged/ema.safetensors").is_file()


@pytest.mark.slow
def test_a_published_checkpoint_is_scored_as_documented(tmp_path):
    """The table of docs/PUBLISHED.md: weights alone and their base, small ones, on tables under the authors' names."""
    here = tmp_path / "here"
    git(tmp_path, "clone", "-q", str(ROOT), str(here))
    (here / "clear/conf/profile/bagel_7b_lora.yaml").write_text(SMALL)
    save_random_model(here / "weights/BAGEL", from_dict(compose(["profile=smoke"])))
    (here / "weights/CLEAR").mkdir()
    shutil.copy(here / "weights/BAGEL" / MODEL, here / "weights/CLEAR/model.safetensors")
    (sample, *_) = scenes("bench", 2, 3, 256, 1)
    (here / "picture.png").write_bytes(sample.image)
    row = {"index": 0, "image": b64(sample.image), "question": "is the circle red ?", "answer": "yes"}
    for end in ("", "_LOW_LEVEL_HIGH", "_jpeg_compression"):
        write_tsv(here / f"lmu/RealWorldQA{end}.tsv", [row])
    (block,) = [t for place, t in blocks("sh") if place.startswith("docs/PUBLISHED.md") and "clear score" in t]
    # The small model's vocabulary has no words for the prompts of the evaluation kit.
    script = block.replace("make venv && . .venv/bin/activate\n", "").replace("--out out", "--out out --prompt plain")
    done = subprocess.run(
        ["bash", "-ec", script],
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(here), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
    board = json.loads((here / "scores.json").read_text())
    assert board["benchmarks"].keys() == {"RealWorldQA"} and board["models"].keys() == {"CLEAR", "BAGEL"}


@pytest.mark.slow
def test_the_full_model_is_trained_on_several_devices_as_documented(tmp_path):
    """Sharded between two processes of the CPU in place of eight GPUs; then DVC has nothing left to train."""
    launch = {
        "infra/fsdp.yaml": "infra/fsdp.yaml --num_processes=2",
        "-m clear $stage": "-m tests.sharded $stage",
        "clear params": "cp -rs /photographs $PWD/data/raw/llava\nclear params",  # as in the block above it
    }
    here = _run_as_documented(tmp_path, "accelerate launch", launch)
    for stage in ("sft_direct", "sft", "bridge", "grpo"):
        assert (here / "data/models" / stage / MODEL).is_file(), f"{stage} writes all weights, not an adapter"
    assert (here / "data/results/report.json").is_file()
    status = subprocess.run(
        [sys.executable, "-m", "dvc", "status"], cwd=here, capture_output=True, text=True, check=True, env=os.environ
    )
    assert "up to date" in status.stdout
