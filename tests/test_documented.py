"""Every command that the documentation shows: its options exist, its overrides compose, its targets are there.

Commands are parsed by the real parsers and not run, so the check takes seconds. What is nowhere run, and why, is
`ELSEWHERE`; that the way through BAGEL's stages works is shown by tests/test_from_checkpoint.py.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from clear.config import compose, from_dict
from tests.conftest import ROOT

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
    (readme,) = [text for place, text in blocks("sh") if place.startswith("README.md") and f"profile={block} " in text]
    (words,) = [words for words in commands(readme) if overrides in words]
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
