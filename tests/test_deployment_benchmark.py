"""The benchmark flow on a real Prefect server: a revision or a folder, aside, with nothing of the workspace changed."""

import shlex
import sys
import textwrap

import pytest
import yaml

from clear.config import load
from clear.errors import ClearError
from clear.project.scratch import write_params
from flows.benchmark import answer_on, benchmark
from tests.conftest import git
from tests.helpers.processes import run_dvc

pytest_plugins = ["tests.helpers.prefect_server"]

EVALUATE = """
    evaluate:
      foreach: {{base: base, grpo: grpo}}
      do:
        cmd: {python} code/evaluate.py ${{key}}
        deps: [code/evaluate.py, data/samples, "data/models/${{item}}"]
        metrics:
          - data/metrics/evaluate_${{key}}.json: {{cache: false}}
    models:
      cmd: mkdir -p data/models/base data/models/grpo && echo 1 > data/models/base/w && echo 2 > data/models/grpo/w
      outs: [data/models/base, data/models/grpo]
"""


@pytest.fixture
def evaluated(project):
    """The small project with models and one evaluation each, reproduced and committed."""
    stages = "stages:\n  source:\n    cmd: cp code/source.txt data/samples\n    deps: [code/source.txt]\n"
    stages += "    outs: [data/samples]\n" + textwrap.indent(
        textwrap.dedent(EVALUATE.format(python=shlex.quote(sys.executable))).strip(), "  "
    )
    (project / "dvc.yaml").write_text(stages + "\n")
    (project / "dvc.lock").unlink()
    (project / ".gitignore").write_text("/data/samples\n/.clear/\n/data/models/\n")
    (project / "code/evaluate.py").write_text(
        "import json, pathlib, sys\nname = sys.argv[1]\n"
        "weight = int(pathlib.Path(f'data/models/{name}/w').read_text())\n"
        "json.dump({'average': weight / 10}, open(f'data/metrics/evaluate_{name}.json', 'w'))\n"
    )
    run_dvc(project, "repro")
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "evaluated")
    return project


@pytest.mark.slow
def test_a_benchmark_measures_a_revision_or_a_folder_aside(server, evaluated, tmp_path):
    before = {file: file.read_bytes() for file in evaluated.rglob("*") if file.is_file() and ".git" not in file.parts}
    (evaluated / "code/evaluate.py").write_text("raise SystemExit('not committed, not used')")
    assert benchmark(str(evaluated), models=["grpo"]) == {"grpo": {"average": 0.2}}
    assert benchmark(str(evaluated), models=["base", "grpo"], force=True) == {
        "base": {"average": 0.1},
        "grpo": {"average": 0.2},
    }
    given = tmp_path / "model"
    given.mkdir()
    (given / "w").write_text("7")
    assert benchmark(str(evaluated), "main", ["grpo"], str(given)) == {"grpo": {"average": 0.7}}
    assert benchmark(str(evaluated), models=["base"], cluster="tcp://a:1") == {"base": {"average": 0.1}}
    params = yaml.safe_load((evaluated / ".clear/scratch/benchmark/params.yaml").read_text())
    assert params["evaluate"]["cluster"] == "tcp://a:1"
    (evaluated / "code/evaluate.py").write_bytes(before[evaluated / "code/evaluate.py"])
    assert git(evaluated, "status", "--porcelain") == ""
    for file, content in before.items():
        if "tmp" not in file.parts:
            assert file.read_bytes() == content, file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"revision": "nowhere"}, "nowhere"),
        ({"models": ["sft"]}, "no stage evaluate@sft; it has evaluate@base, evaluate@grpo"),
        ({"folder": "data/models/grpo"}, "name the one model it is evaluated as"),
        ({"models": ["grpo"], "folder": "elsewhere"}, "no model folder here"),
        ({"models": ["grpo"], "folder": ".clear/scratch/benchmark/data/models/grpo"}, "which is made anew; copy it"),
    ],
)
def test_a_benchmark_of_what_is_not_there_says_so(server, evaluated, given, said):
    (evaluated / ".clear/scratch/benchmark/data/models/grpo").mkdir(parents=True)
    with pytest.raises(Exception, match=said):
        benchmark(str(evaluated), **given)


def test_a_cluster_is_the_only_parameter_that_changes(tmp_path):
    write_params(tmp_path / "params.yaml")
    before = load(tmp_path / "params.yaml")
    answer_on("tcp://a:1", tmp_path)
    after = load(tmp_path / "params.yaml")
    assert after.evaluate.cluster == "tcp://a:1"
    answer_on("", tmp_path)
    assert load(tmp_path / "params.yaml") == before
    (tmp_path / "params.yaml").write_text("evaluate: {bootstrap: 2000}")
    with pytest.raises(ClearError, match="this revision evaluates on one machine only"):
        answer_on("", tmp_path)
