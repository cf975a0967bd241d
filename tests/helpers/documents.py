"""What the documentation shows: its fenced blocks, the commands in them, and what the code says."""

import ast
import re
import shlex
from collections.abc import Iterator

from tests.conftest import ROOT

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "data/README.md", "docs/*.md")


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


def said_by_the_code() -> str:
    """Every text of the code, one a line, with … for the values that are filled in."""
    found = []
    for folder in ("clear", "flows", "infra"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
    found.append(re.sub(r"\$\(\(.*?\)\)|\$\w+", "…", (ROOT / "infra/install.sh").read_text()))
    return "\n".join(found)
