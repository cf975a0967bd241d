"""The walls of the house: which package may import which, no loops, and who knows DVC, git, Prefect and trl.

docs/DESIGN.md has the plan. Imports inside functions and below `if TYPE_CHECKING` count like any other: they are
dependencies of a reader as well. Commands count as what they start: `["git", …]`, `[sys.executable, "-m", "dvc", …]`.
"""

import ast
import itertools
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

from tests.conftest import ROOT

ORDER = (
    ("errors", "interruption", "schema", "config"),
    ("data",),
    ("sources",),
    ("degradation",),
    ("model",),
    ("reasoning",),
    ("validation",),
    ("llm",),
    ("bench",),
    ("traces",),
    ("training",),
    ("report",),
    ("drift",),
    ("browse",),
    ("serve",),
    ("stages",),
    ("project",),
    ("cli",),
    ("__main__", "flows"),
)
"""Packages and modules from the bottom to the top: each may import what stands above it in this list, and itself."""

KNOWN_BY = {
    "dvc": ("clear.project", "flows"),
    "git": ("clear.project", "flows"),
    "prefect": ("flows",),
    "trl": ("clear.training.rl",),
}
"""Tool → the packages that may import it or start it."""


def _modules(root: Path) -> dict[str, Path]:
    files = [file for package in ("clear", "flows") for file in (root / package).rglob("*.py")]
    names = (file.relative_to(root).with_suffix("").parts for file in files)
    return {
        ".".join(parts[:-1] if parts[-1] == "__init__" else parts): f for parts, f in zip(names, files, strict=True)
    }


def _imported(file: Path) -> set[str]:
    """Dotted names that a file imports, `from a import b` as both a and a.b."""
    return _read(file.read_text())[0]


def _started(file: Path) -> set[str]:
    """Programs that a file starts, by the first word of a command or the module behind `-m`."""
    return _read(file.read_text())[1]


@cache
def _read(text: str) -> tuple[set[str], set[str]]:
    """What a program imports and what it starts; every test asks for every file."""
    found, started = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            found |= {word.value for word in node.args[:1] if isinstance(word, ast.Constant)}
        elif isinstance(node, ast.List | ast.Tuple):
            words = [word.value if isinstance(word, ast.Constant) else None for word in node.elts]
            started |= {word for word in words[:1] if isinstance(word, str)}
            started |= {after for word, after in itertools.pairwise(words) if word == "-m"}
    return found, started


def _imports(root: Path) -> dict[str, set[str]]:
    """Module → the modules of this project that it imports; a package's own file only where it holds something."""
    modules = _modules(root)
    return {
        name: {
            other for other in _imported(file) if other in modules and other != name and modules[other].stat().st_size
        }
        for name, file in modules.items()
    }


def _floor(module: str) -> int | None:
    """The place of a module's package in ORDER; None for the package `clear` itself."""
    parts = module.split(".")
    name = parts[0] if parts[0] == "flows" else parts[1] if len(parts) > 1 else ""
    if not name:
        return None
    return next(n for n, names in enumerate(ORDER) if name in names)


def _climbing(imports: dict[str, set[str]]) -> list[str]:
    return [
        f"{name} → {other}"
        for name, others in sorted(imports.items())
        for other in sorted(others)
        if _floor(name) is not None and _floor(other) is not None and _floor(other) > _floor(name)
    ]


def _loops(imports: dict[str, set[str]]) -> list[list[str]]:
    graph = nx.DiGraph([(name, other) for name, others in imports.items() for other in others])
    return [sorted(loop) for loop in nx.strongly_connected_components(graph) if len(loop) > 1]


def _strangers(root: Path, tool: str) -> list[str]:
    return sorted(
        name
        for name, file in _modules(root).items()
        if tool in {imported.partition(".")[0] for imported in _imported(file)} | _started(file)
        if not any(name == home or name.startswith(f"{home}.") for home in KNOWN_BY[tool])
    )


def test_imports_go_one_way_and_in_no_loop():
    imports = _imports(ROOT)
    assert _climbing(imports) == []
    assert _loops(imports) == []


@pytest.mark.parametrize("tool", KNOWN_BY)
def test_a_tool_is_known_where_it_belongs(tool):
    assert _strangers(ROOT, tool) == []


def test_few_modules_lie_loose():
    assert len([file for file in (ROOT / "clear").glob("*.py") if file.stat().st_size]) <= 8


def test_no_test_module_imports_another():
    """What several need is in tests/helpers or a fixture: a test module can be changed without reading the others."""
    tests = {file.stem for file in (ROOT / "tests").glob("test_*.py")}
    imported = {
        f"{file.name} → {name}"
        for file in (ROOT / "tests").rglob("*.py")
        for name in _imported(file)
        if name.startswith("tests.") and name.split(".")[1] in tests
    }
    assert imported == set()


def test_what_breaks_a_wall_is_named(tmp_path):
    texts = {
        "clear/data/io.py": "def f():\n    from clear.report import page\n",
        "clear/report/page.py": "from clear.report.plot import draw\nimport prefect\n",
        "clear/report/plot.py": "import clear.report.page\nrun(['git', 'log'])\nrun([python, '-m', 'dvc', 'repro'])\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    imports = _imports(tmp_path)
    assert _climbing(imports) == ["clear.data.io → clear.report.page"]
    assert _loops(imports) == [["clear.report.page", "clear.report.plot"]]
    assert [_strangers(tmp_path, tool) for tool in ("git", "dvc", "prefect", "trl")] == [
        *([["clear.report.plot"]] * 2),
        ["clear.report.page"],
        [],
    ]
