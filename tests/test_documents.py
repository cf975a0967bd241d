"""What documents and comments point to exists: sections of METHOD and DESIGN, links, files, modules and functions.

Read are Markdown files outside their fenced code, docstrings and comments of Python files, and comments of YAML files.
Links into the network are not followed. docs/LOG.md and CHANGELOG.md speak of the files of their day: only their links
and citations are checked.
"""

import ast
import io
import re
import subprocess
import tokenize
import tomllib
from collections.abc import Iterator

import pytest
import yaml

from tests.conftest import ROOT

HISTORY = ("docs/LOG.md", "CHANGELOG.md")
FOLDERS = "clear|flows|docs|infra|tests|plugins|\\.github|\\.ci"
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "dvc.yaml", "params.yaml", "pyproject.toml")

_LINK = re.compile(r"\[[^\]\[]*\]\(([^)\s]+)\)")
_QUOTED = re.compile(r"`([^`\n]+)`")
_FILE = re.compile(rf"(?:{FOLDERS})/[\w./*-]+")
_PLAIN_FILE = re.compile(  # what lies in plugins/ is the reader's own
    rf"(?<![\w./-])((?!plugins)(?:{FOLDERS})/[\w./-]+\.(?:py|md|yaml|yml|json|html|txt|sh|safetensors))(?!\w)"
)
_MODULE = re.compile(r"(?<![\w./-])((?:clear|flows)(?:\.[A-Za-z_]\w*)+)")
_MEMBER = re.compile(r"`([\w./-]+\.py)` → `([\w.]+)`")
_CITED = re.compile(
    r"""[\s,;]*(?:and\s+)?(?:
        §(?P<section>\d+)
      | items?\s+(?P<items>\d+(?:(?:,\s*|\s+and\s+|\s*,\s*and\s+)\d+)*)
      | (?<=\s)["“](?P<name>[^"”]+)["”]
      | \((?P<aside>[a-z]\w+)\)
    )""",
    re.VERBOSE,
)


def files(*suffixes: str) -> list[str]:
    """Files that git tracks or would track, with one of the suffixes."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted({name for name in listed if name.endswith(suffixes) and (ROOT / name).is_file()})


def prose(name: str, text: str) -> str:
    """The part of a file that is written for people: lines keep their numbers, everything else is blank."""
    lines = text.splitlines()
    if name.endswith(".md"):
        fenced, kept = False, []
        for line in lines:
            mark = line.lstrip().startswith("```")
            fenced ^= mark
            kept.append("" if fenced or mark else line)
        return "\n".join(kept)
    if name.endswith((".yaml", ".yml")):
        return "\n".join(line[line.index("#") + 1 :] if "#" in line else "" for line in lines)
    kept = [""] * (len(lines) + 1)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            kept[token.start[0] - 1] = token.string.lstrip("#:")
    for node in ast.walk(ast.parse(text)):
        # Docstrings, also those behind a constant.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            kept[node.lineno - 1 : node.end_lineno] = lines[node.lineno - 1 : node.end_lineno]
    return "\n".join(kept)


def sections(method: str) -> dict[int, tuple[set[str], set[int]]]:
    """Section number → (names in bold or of headings, in lower case; item numbers) of docs/METHOD.md."""
    found: dict[int, tuple[set[str], set[int]]] = {}
    for part in re.split(r"^## ", prose("METHOD.md", method), flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        if number := re.match(r"(\d+)\. ", title):
            items = {int(n) for n in re.findall(r"^(\d+)\. ", body, re.MULTILINE)}
            found[int(number[1])] = (_names(body), items)
    return found


def _names(text: str) -> set[str]:
    """Names in bold (`**SDE step.**`) and headings, without the full stop, in lower case."""
    named = re.findall(r"\*\*([^*]+?)[.,:]?\*\*|^#+ +(.+)$", text, re.MULTILINE)
    return {(bold or heading).lower() for bold, heading in named}


def citations(text: str, within: bool = False) -> Iterator[tuple[int, int, str, set[int], str]]:
    """(position, section, name or "", items, as written) of each reference to METHOD.

    One place may cite several: `METHOD §1 "Flow matching" and "CFG", §4 "SDE step"`. `within` METHOD and the
    profiles, which give a source for each value, a bare § is a citation too.
    """
    for start in re.finditer(r"(?=§\d)" if within else r"\bMETHOD(?=\s+§)", text):
        position, section = start.end(), 0
        while part := _CITED.match(text, position):
            position = part.end()
            if part["section"]:
                section = int(part["section"])
            name = re.sub(r"\s+", " ", part["name"] or part["aside"] or "")
            items = {int(n) for n in re.findall(r"\d+", part["items"] or "")}
            yield start.start(), section, name, items, re.sub(r"\s+", " ", text[start.start() : position])


def unresolved(name: str, text: str, method: str, design: str) -> list[str]:
    """One line for each reference in `text` (the content of file `name`) that leads nowhere."""
    read, known, out = prose(name, text), sections(method), []

    def say(position: int, what: str) -> None:
        out.append(f"{name}:{read.count(chr(10), 0, position) + 1}: {what}")

    for position, section, part, items, written in citations(read, name.startswith(("docs/METHOD.md", "clear/conf/"))):
        if section not in known:
            say(position, f"{written}: docs/METHOD.md has no section {section}")
        elif part and part.lower() not in known[section][0]:
            say(position, f"{written}: section {section} of docs/METHOD.md has no paragraph **{part}.**")
        elif missing := sorted(items - known[section][1]):
            say(position, f"{written}: section {section} of docs/METHOD.md has no item {missing[0]}")
    for cited in re.finditer(r'\bDESIGN "([^"]+)"|\(DESIGN, (\w+)\)', read):
        part = re.sub(r"\s+", " ", cited[1] or cited[2])
        if part.lower() not in _names(design):
            say(cited.start(), f"docs/DESIGN.md has no paragraph or heading {part!r}")
    if name.endswith(".md"):
        for link in _LINK.finditer(read):
            if problem := _broken_link(name, text, link[1]):
                say(link.start(), problem)
    if name not in HISTORY:
        for position, problem in _missing_files(name, read):
            say(position, problem)
    return out


def _broken_link(name: str, text: str, target: str) -> str:
    if re.match(r"[a-z]+:", target):
        return ""
    path, _, anchor = target.partition("#")
    file = (ROOT / name).parent / path if path else ROOT / name
    if path and not file.exists():
        return f"link to {target}: {path} is not there (links are relative to {name})"
    content = text if not path else file.read_text() if file.suffix == ".md" else ""
    if anchor and anchor not in _anchors(content):
        return f"link to {target}: {path or name} has no heading of that name"
    return ""


def _anchors(markdown: str) -> set[str]:
    """GitHub's anchors of the headings."""
    titles = re.findall(r"^#+ +(.+?)\s*$", prose("x.md", markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _missing_files(name: str, read: str) -> Iterator[tuple[int, str]]:
    """(position, problem) for each path, module and member that `read` names and the project lacks."""
    named = _QUOTED.finditer(read) if name.endswith(".md") else ()
    paths = {m.start(1): m[1] for m in named if _FILE.fullmatch(m[1]) or m[1] in TOP}
    for position, path in (paths | {m.start(1): m[1] for m in _PLAIN_FILE.finditer(read)}).items():
        if not (any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()):
            yield position, f"{path} is not there"
    for module in _MODULE.finditer(read):
        if problem := _missing_module(module[1]):
            yield module.start(), problem
    for member in _MEMBER.finditer(read):
        if (ROOT / member[1]).exists() and (problem := _missing_member(member[1], member[2])):
            yield member.start(), problem


def _missing_module(dotted: str) -> str:
    """A package, a module, or a name in one: clear.data.records, clear.data.records.Sample."""
    place, parts = ROOT, dotted.split(".")
    for i, part in enumerate(parts):
        if (place / part).is_dir():
            place = place / part
        elif (file := place / f"{part}.py").is_file():
            return (
                _missing_member(file.relative_to(ROOT).as_posix(), ".".join(parts[i + 1 :])) if parts[i + 1 :] else ""
            )
        elif i and (place / "__init__.py").is_file() and part in (place / "__init__.py").read_text():
            return ""
        else:
            return f"{dotted}: {place.relative_to(ROOT)} has no module {part}"
    return ""


def _missing_member(file: str, member: str) -> str:
    """A function, class, method or constant that a file defines."""
    body = ast.parse((ROOT / file).read_text()).body
    for part in member.split("."):
        for node in body:
            assigned = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if part in (getattr(node, "name", None), *(getattr(target, "id", None) for target in assigned)):
                body = getattr(node, "body", [])
                break
        else:
            return f"{file} defines no {member}"
    return ""


@pytest.mark.parametrize("name", files(".md", ".py", ".yaml", ".yml"))
def test_what_is_referred_to_exists(name):
    method, design = ((ROOT / "docs" / f"{one}.md").read_text() for one in ("METHOD", "DESIGN"))
    assert unresolved(name, (ROOT / name).read_text(), method, design) == []


METHOD = "# M\n\n## 1. Model\n\n**Image resize.** Text.\n\n## 2. Data\n\n1. one\n2. two\n\n**Levels** and more\n"
DESIGN = "# D\n\n## Contracts\n\n**Interleaved GRPO.** Text.\n"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("docs/x.md", "see METHOD §3", "docs/x.md:1: METHOD §3: docs/METHOD.md has no section 3"),
        (
            "clear/x.py",
            '"""A thing.\n\nDone (METHOD §1, §7).\n"""\n',
            "clear/x.py:3: METHOD §1, §7: docs/METHOD.md has no section 7",
        ),
        ("clear/x.py", "x = 1  # METHOD §2 items 1, 3\n", "no item 3"),
        ("clear/x.py", "x = 1\n'''By METHOD §2, item 4.'''\n", "no item 4"),
        ("clear/x.py", '"""METHOD §1 "Image\nresize" and "Mask"."""\n', "no paragraph **Mask.**"),
        ("docs/x.md", "METHOD §2 (levels), §1 (mask)", "no paragraph **mask.**"),
        ("x.yaml", "a: 1  # METHOD §9\n", "no section 9"),
        ("docs/METHOD.md", "as in §2 item 5", "no item 5"),
        ("clear/conf/x.yaml", "a: 1  # §9; as published", "no section 9"),
        ("clear/x.py", '"""By DESIGN "Interleaved\nPPO"."""\n', "'Interleaved PPO'"),
        ("clear/x.py", '"""Checked (DESIGN, validation)."""\n', "'validation'"),
        ("docs/x.md", "a\n[b](METHOD.md) and [c](NONE.md)", "docs/x.md:2: link to NONE.md"),
        ("README.md", "[b](docs/DATA.md#no-such-heading)", "no heading of that name"),
        ("docs/x.md", "## A b\n\n[c](#a-c)", "no heading of that name"),
        ("docs/x.md", "`clear/no_such.py`", "clear/no_such.py is not there"),
        ("docs/x.md", "`clear/no_such/`", "clear/no_such/ is not there"),
        ("docs/x.md", "`infra/*.toml`", "infra/*.toml is not there"),
        ("clear/x.py", '"""As docs/NONE.md says."""\n', "docs/NONE.md is not there"),
        ("clear/x.py", "# as in clear.no_such\n", "clear has no module no_such"),
        ("docs/x.md", "`clear.config.no_such`", "clear/config.py defines no no_such"),
        ("docs/x.md", "`clear/cli/use.py` → `no_such`", "clear/cli/use.py defines no no_such"),
    ],
)
def test_a_reference_that_leads_nowhere_is_named(name, text, said):
    (line,) = unresolved(name, text, METHOD, DESIGN)
    assert said in line


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("docs/x.md", 'METHOD §1 "Image resize", §2 items 1 and 2; METHOD §2 (levels). METHOD §1 (which is short)'),
        ("docs/x.md", 'DESIGN "Contracts", [a](METHOD.md), [b](../README.md), [c](https://example.org/none)'),
        (
            "docs/x.md",
            "`tests/conftest.py`, `infra/*.yaml`, `clear.cli.main`, `clear/cli/__init__.py` → `main`, `data/none.json`",
        ),
        ("docs/x.md", "```\nMETHOD §9, [a](NONE.md), clear/no_such.py\n```\n"),
        ("clear/x.py", 'raise ValueError("METHOD §9, clear/no_such.py")\n'),
        ("docs/LOG.md", "`clear/gone.py`"),
    ],
)
def test_what_resolves_and_what_is_no_reference_is_passed(name, text):
    assert unresolved(name, text, METHOD, DESIGN) == []


def test_the_licence_and_the_version_are_stated_alike():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert project["version"] == str(citation["version"])
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()
