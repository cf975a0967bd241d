"""DVC's own views of two revisions are readable: few, well named metrics; params by name; plots that draw offline."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clear.config import compose
from tests.browser import executable
from tests.conftest import ROOT, git

SHOWN = (
    *("dvc.yaml", "params.yaml", ".dvc/config", ".dvc/.gitignore", ".dvc/plots", ".dvcignore"),
    *("clear/conf", "data/dvc.yaml", "data/metrics", "data/plots", "data/results", "dvclive/.gitkeep"),
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """The committed run, then a branch on which CLEAR answers worse at hard and one parameter differs."""
    folder = tmp_path_factory.mktemp("views")
    for name in SHOWN:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "run")
    git(folder, "checkout", "-q", "-b", "change")
    summary = json.loads((folder / "data/results/summary.json").read_text())
    summary["grpo"]["hard"] -= 0.1
    (folder / "data/results/summary.json").write_text(json.dumps(summary))
    params = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(re.sub(r"group_size: \d+", "group_size: 64", params))
    git(folder, "commit", "-q", "-a", "-m", "change")
    return folder


def dvc(folder: Path, *arguments: str):
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def leaves(tree, path=()):
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in leaves(value, (*path, key))]
    return [(path, tree)]


def test_metrics_are_few_and_a_change_is_one_line(repository):
    shown = dvc(repository, "metrics", "show", "--json")[""]["data"]
    assert list(shown) == ["data/results/summary.json"]
    figures = leaves(shown["data/results/summary.json"]["data"])
    assert len(figures) <= 32
    models, names = {path[0] for path, _ in figures}, {path[1] for path, _ in figures}
    assert models == {"base", "sft_direct", "sft", "reencode", "bridge", "grpo"}
    assert names == {"clean", "low", "mid", "hard", "restores_hard"}
    assert all(0 <= value <= 1 for _, value in figures)
    changed = dvc(repository, "metrics", "diff", "main", "change", "--json")
    assert list(changed["data/results/summary.json"]) == ["grpo.hard"]
    assert changed["data/results/summary.json"]["grpo.hard"]["diff"] == pytest.approx(-0.1)


def test_the_summary_is_that_of_the_evaluations(repository):
    git(repository, "checkout", "-q", "main")
    summary = json.loads((repository / "data/results/summary.json").read_text())
    for model, figures in summary.items():
        full = json.loads((repository / f"data/metrics/evaluate_{model}.json").read_text())
        assert [figures[name] for name in ("clean", "low", "mid", "hard")] == [
            full["accuracy"][level] for level in ("clean", "low", "mid", "high")
        ]
        assert figures.get("restores_hard", 0) == full["call_rate"]["high"]
    with (repository / "data/results/accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["model"], row["level"]): float(row["accuracy"]) for row in rows} == {
        (model, level): value
        for model, figures in summary.items()
        for level, value in figures.items()
        if level != "restores_hard"
    }
    assert all(float(row["low"]) <= float(row["accuracy"]) <= float(row["high"]) for row in rows)


def test_a_changed_parameter_is_named(repository):
    changed = dvc(repository, "params", "diff", "main", "change", "--json")
    old = compose()["grpo"]["group_size"]
    assert changed == {"params.yaml": {"grpo.group_size": {"old": old, "new": 64, "diff": 64 - old}}}


def test_experiments_are_listed_with_the_few_metrics(repository):
    table = dvc(repository, "exp", "show", "--json", "-A", "-n", "1")
    found = {row["rev"] if row["rev"] == "workspace" else row["name"]: row["data"]["metrics"] for row in table}
    assert {"workspace", "main", "change"} <= set(found)
    for metrics in found.values():
        assert list(metrics) == ["data/results/summary.json"]


@pytest.mark.slow
def test_the_page_of_plots_draws_every_plot_without_a_network(repository, tmp_path):
    command = [sys.executable, str(ROOT / "infra/plots.py"), str(tmp_path / "plots"), "main", "change"]
    subprocess.run(command, cwd=repository, check=True, capture_output=True)
    page = tmp_path / "plots" / "index.html"
    text = page.read_text()
    specs = [json.loads(found) for found in re.findall(r"var spec = (\{.*\});", text)]
    assert len(specs) == 8
    for spec in specs:
        assert {row["rev"] for row in spec["data"]["values"]} == {"main", "change"}
        assert spec["title"] and "<DVC_METRIC" not in json.dumps(spec)
    outside = re.sub(r"<script>.*?</script>", "", text, count=1, flags=re.DOTALL)  # Vega's own text names such tags
    assert "vegaEmbed" in text and not re.search(r"<(script|link|img)[^>]+(src|href)=", outside)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000"]
    options.append("--host-resolver-rules=MAP * ~NOTFOUND")
    drawn = subprocess.run(
        [executable(), *options, "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=120
    )
    assert drawn.stdout.count('class="marks"') == 8
