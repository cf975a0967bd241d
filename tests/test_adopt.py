"""What was changed in params.yaml becomes part of clear/conf: the values alone, so that comments and form stay."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clear.project.adopt import with_value
from tests.conftest import git
from tests.helpers.processes import run_dvc

TEXT = """# a file
seed: 1      # of everything

base:
  vit: {steps: 250, lr: 2.0e-3}  # short
  drop: 0.1            # chance
  shares: [0.0, 0.5]
"""


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("seed", 2, "seed: 2      # of everything"),
        ("base.drop", 0.25, "  drop: 0.25            # chance"),
        ("base.vit.steps", 9, "  vit: {steps: 9, lr: 2.0e-3}  # short"),
        ("base.shares", [0.1, 0.2, 0.3], "  shares: [0.1, 0.2, 0.3]"),
        ("base.vit.warmup", 4, "  vit: {steps: 250, lr: 2.0e-3, warmup: 4}  # short"),
        ("base.kind", "a: b", "  kind: 'a: b'"),
        ("model.base", "", "model: {base: ''}"),
        ("base.joint.steps", 3, "  joint: {steps: 3}"),
    ],
)
def test_one_value_changes_and_nothing_else(path, value, line):
    changed = with_value(TEXT, path.split("."), value)
    found = yaml.safe_load(changed)
    for key in path.split("."):
        found = found[key]
    assert found == value
    before, after = TEXT.splitlines(), changed.splitlines()
    assert line in after
    assert [one for one in before if one not in after] in (
        [],
        [b for b in before if b.split(":")[0] == line.split(":")[0]],
    )


def clear(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "clear", *arguments], cwd=folder, capture_output=True, text=True)


def drifts(folder: Path) -> list[str]:
    code = "from pathlib import Path; from clear.project.check import composition_drifts as found\n"
    code += "print(*found(Path()), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if line]


@pytest.mark.slow
def test_an_edit_and_another_profile_end_without_drift(clone, tmp_path):
    folder = tmp_path / "project"
    git(tmp_path, "clone", "-q", str(clone), str(folder))
    params = folder / "params.yaml"
    text = params.read_text().replace("group_size: 8", "group_size: 4")
    params.write_text(text)
    assert len(drifts(folder)) == 1 and "`clear params --adopt` keeps it" in drifts(folder)[0]
    done = clear(folder, "params", "--adopt")
    assert done.stdout == "config.yaml: grpo.group_size = 4 (was 8)\n", done.stderr
    assert drifts(folder) == [] and params.read_text() == text
    assert git(folder, "diff", "--stat", "clear/conf").endswith("1 file changed, 1 insertion(+), 1 deletion(-)\n")

    assert clear(folder, "params", "--set", "profile=smoke", "--set", "grpo.steps=5").returncode == 0
    assert len(drifts(folder)) > 20, "as after an experiment with another profile"
    done = clear(folder, "params", "--adopt")
    assert done.stdout.splitlines() == [
        "config.yaml: the default profile is smoke",
        "profile/smoke.yaml: grpo.steps = 5 (was 4)",
    ], done.stderr
    assert drifts(folder) == []
    assert clear(folder, "params", "--adopt").stdout == "clear/conf composes to params.yaml already.\n"

    params.write_text(params.read_text().replace("steps: 5", "steps: -5"))
    done = clear(folder, "params", "--adopt")
    assert done.returncode == 1 and "grpo.steps = -5 is outside" in done.stderr and done.stderr.count("\n") == 1
    assert "steps: 5" in (folder / "clear/conf/profile/smoke.yaml").read_text()


STAGES = """
stages:
  source:
    cmd: python code/source.py
    params: [seed, grpo.steps]
    deps: [code/source.py]
    outs: [data/samples]
    metrics: [data/metrics/a.json: {cache: false}]
"""
SOURCE = """
import pathlib, shutil
shutil.copy("params.yaml", "data/samples")
pathlib.Path("data/metrics").mkdir(exist_ok=True)
pathlib.Path("data/metrics/a.json").write_text('{"grpo": {"hard": 0.5, "mid": 1}}')
"""


@pytest.mark.slow
def test_an_experiment_becomes_a_commit_as_documented(clone, tmp_path):
    """The commands of docs/REVIEW.md, with a pipeline of one stage in this project's folder."""
    folder = tmp_path / "project"
    git(tmp_path, "clone", "-q", str(clone), str(folder))
    for name in ("dvc.lock", "data/dvc.yaml"):
        (folder / name).unlink()
    (folder / "dvc.yaml").write_text(STAGES)
    (folder / "code").mkdir()
    (folder / "code/source.py").write_text(SOURCE)
    run_dvc(folder, "repro", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "one stage")
    assert clear(folder, "check").returncode == 0

    run_dvc(folder, "exp", "run", "--temp", "-q", "-n", "more-steps", "-S", "grpo.steps=90", "-S", "profile=smoke")
    make = ["make", f"VENV={Path(sys.executable).parent.parent}"]
    shown = subprocess.run([*make, "experiments"], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert "more-steps" in shown and "grpo.steps" in "".join(shown.split()), shown
    assert "source.py" not in shown and "grpo.mid" not in shown and "Created" not in shown

    run_dvc(folder, "exp", "apply", "-q", "more-steps")
    assert clear(folder, "check").returncode == 1
    assert clear(folder, "params", "--adopt").returncode == 0
    checked = subprocess.run([*make, "check"], cwd=folder, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "steps: 90" in (folder / "data/samples").read_text(), "the data of the experiment"
