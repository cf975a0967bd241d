"""Every command that the documentation shows: its options exist, its overrides compose, its targets are there.

Commands are parsed by the real parsers and not run, so the check takes seconds. What is nowhere run, and why, is
`ELSEWHERE`; that the way through BAGEL's stages works is shown by tests/test_from_checkpoint.py.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from clear.config import compose, from_dict
from clear.sources.scenes.render import scenes
from tests.chat_server import completion, serving, user_text
from tests.conftest import ROOT, git
from tests.tiny import save_random_model

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "data/README.md", "docs/*.md")
SHELL = (".", "cp", "export", "ln", "ls", "mkdir")
ELSEWHERE = {
    "aws": "needs an account, and its program is not among the requirements",
    "prefect": "asks a server; tests/test_deployment.py runs server, worker and deployments",
}
"""First words of commands that are only looked at, and why."""


def blocks(language: str) -> list[tuple[str, str]]:
    """(place, text) of all fenced blocks of a language."""
    found = []
    for file in sorted(file for pattern in DOCUMENTS for file in ROOT.glob(pattern)):
        text = file.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start(1)) + 1
            found.append((f"{file.relative_to(ROOT)}:{line}", match[1]))
    return found


def commands(block: str) -> Iterator[list[str]]:
    """The commands of a shell block as lists of words; a loop's commands for each of its values."""
    loop: tuple[str, list[str]] | None = None
    for line in block.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if word != "…"]
        if not words or words == ["done"]:
            loop = None if words else loop
        elif words[0] == "for":
            loop = words[1], [value.rstrip(";") for value in words[3:-1]]
        else:
            for value in loop[1] if loop else [""]:
                named = [word.replace(f"${loop[0]}", value) if loop else word for word in words]
                ends = [n for n, word in enumerate(named) if word == "&&"]
                yield from (named[a + 1 : b] for a, b in zip([-1, *ends], [*ends, len(named)], strict=True))


ALL = [pytest.param(words, id=f"{place} {' '.join(words)[:60]}") for place, b in blocks("sh") for words in commands(b)]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def _clear(arguments: list[str]) -> None:
    from clear.cli import app

    # The help is shown after the whole line has been parsed: an option that does not exist is an error before.
    shown = CliRunner().invoke(app, [*arguments, "--help"])
    assert shown.exit_code == 0, shown.output
    _composes([b for a, b in pairwise(arguments) if a == "--set"])


def _composes(overrides: list[str]) -> None:
    from_dict(compose([text.replace("$PWD", "/here") for text in overrides]))


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


PARSERS = {"clear": _clear, "dvc": _dvc, "make": _make, "accelerate": _accelerate, "python": _python}


@pytest.mark.parametrize("words", ALL)
def test_a_documented_command_is_one(words):
    program, *arguments = words
    if program in PARSERS:
        PARSERS[program](arguments)
    elif program not in ELSEWHERE:
        assert program in SHELL, f"{program}: run it here, or say in ELSEWHERE why not"
        assert program in (".", "export") or shutil.which(program)


def test_commands_stand_in_blocks_that_are_checked():
    """An indented command, or a block of another name, would escape the test above."""
    known = "|".join(map(re.escape, (*PARSERS, *ELSEWHERE)))
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


@pytest.mark.parametrize(("place", "text"), blocks("python"), ids=[place for place, _ in blocks("python")])
def test_a_documented_piece_of_python_runs(place, text):
    names, code = {"image": np.full((64, 80, 3), 90, np.uint8)}, compile(text, place, "exec")
    if "vlmeval" in text:  # not among the requirements; its part is compiled only
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


@pytest.mark.slow
def test_the_way_with_bagel_runs_as_the_readme_shows_it(tmp_path):
    """From a checkpoint in BAGEL's layout and a folder of photographs to the report and the merged model."""
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
    (block,) = [text for place, text in blocks("sh") if place.startswith("docs/BAGEL.md") and "clear merge" in text]
    lines = [line for line in block.splitlines() if not line.startswith("make venv")]  # tests/test_make.py installs
    with serving(_teacher) as server:
        script = "\n".join(lines).replace("/data/llava-onevision", str(photographs)).replace("KEY=…", "KEY=secret")
        done = subprocess.run(
            ["bash", "-ec", script.replace("https://host/v1", server.url)],
            cwd=here,
            env=os.environ
            | {"PYTHONPATH": str(here), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            | {f"GIT_{who}_{what}": "test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
    assert server.bodies, "the teacher wrote the traces"
    assert json.loads((here / "data/metrics/traces.json").read_text())["teacher"]["model"] == "gpt-4.1"
    assert (here / "data/results/report.json").is_file() and (here / "merged/ema.safetensors").is_file()
