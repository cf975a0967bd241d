"""MMD-Bench for a git revision or a model folder, in a clone: `python -m flows.benchmark`, or deployed and scheduled.

The run happens in a clone of the revision in `.clear/scratch/benchmark` that shares the workspace's DVC cache and
remote; the workspace is only read. A model under test is a stage `evaluate@<model>` of that revision, so the code, the
benchmark and the parameters are the revision's own. A given folder takes the place of the model that the stage reads.
By default DVC decides whether anything is to be measured at all; `force` measures anew, as the nightly deployment
does, and the table then shows both what was recorded with the revision and what this machine found. With `cluster`
the workers of a Dask cluster answer the questions, with the same predictions.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import yaml
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from prefect.states import Cancelled

from clear.bench.models import MODELS
from clear.config import PARAMS
from clear.data.lock import Busy, writer
from clear.errors import ClearError, say
from clear.project.release.fetch import released
from clear.project.scratch import clone, link
from flows.dvc_commands import address, command_lock, dvc, remote_of
from flows.pipeline import here_and_now, reproduce
from flows.service import children
from flows.service.artifacts import metrics_table, read_json
from flows.service.naming import profile_and_commit


@flow(name="benchmark", flow_run_name=profile_and_commit)
def benchmark(
    workspace: str = ".",
    revision: str = "HEAD",
    models: list[str] | None = None,
    folder: str | None = None,
    force: bool = False,
    when_busy: Literal["wait", "leave"] = "wait",
    cluster: str | None = None,
) -> dict[str, Any]:
    """Evaluate models (default: all six) of a revision; returns {model: content of its metrics file}.

    `folder` names a model folder, or a release such as `@prod` or `grpo@v1.2.0`, to be evaluated in place of the one
    that the single model in `models` reads. Two
    benchmarks of one workspace do not run at once: the second waits or leaves, as `when_busy` says. `cluster` is the
    address of a Dask scheduler, "" this machine, and None what the revision's parameters say.
    """
    source = Path(workspace).resolve()
    chosen = models or list(MODELS)
    if folder is not None and len(chosen) != 1:
        raise ClearError(f"folder = {folder}: name the one model it is evaluated as, such as models = ['grpo'].")
    given = None if folder is None else released(Path(folder), source).resolve()
    if given is not None and not given.is_dir():
        raise ClearError(f"{given}: no model folder here; name one such as data/models/grpo.")
    logger = get_run_logger()
    scratch = source / ".clear" / "scratch"
    if given is not None and given.is_relative_to(scratch / "benchmark"):
        raise ClearError(f"{given} is in the benchmark's own clone, which is made anew; copy it elsewhere first.")
    try:
        with writer(scratch, when_busy, f"flow run {flow_run.name}", logger.info):
            return _measure(source, revision, chosen, given, force, cluster, scratch / "benchmark")
    except Busy as busy:
        logger.warning(str(busy))
        return Cancelled(message=str(busy))


def _measure(
    source: Path, revision: str, models: list[str], given: Path | None, force: bool, cluster: str | None, copy: Path
) -> Any:
    """Metrics by model; raises what the first evaluation that failed raised."""
    children.settle(command_lock(copy))
    commit = clone(source, revision, copy)
    get_run_logger().info(f"commit {commit} in {copy}")
    if cluster is not None:
        answer_on(cluster, copy)
    recorded = metrics_table(copy)
    stages = {model: f"evaluate@{model}" for model in models}
    replaced = fetch_inputs(copy, list(stages.values()), skip_models=given is not None)
    if given is not None:
        for name in replaced:
            shutil.copytree(given, copy / name, copy_function=link, dirs_exist_ok=False)
    done = {}
    for stage in stages.values():
        state = reproduce(stage, copy, force or given is not None, return_state=True)
        state.result()
        done[stage] = state.name
    what = f"{given} as {models[0]}, with the code of {commit}" if given else f"commit {commit}"
    text = f"Measured: {what}\n\n{metrics_table(copy, done)}\n\nRecorded in commit {commit}:\n\n{recorded}"
    create_markdown_artifact(text, "benchmark", f"MMD-Bench of {what}")
    return {model: read_json(copy / "data/metrics" / f"evaluate_{model}.json") for model in models}


def answer_on(cluster: str, copy: Path) -> None:
    """Set `evaluate.cluster` in the copy's params.yaml. Raises ClearError where the revision knows no such parameter.

    It is not a DVC parameter: what is up to date stays so.
    """
    params = yaml.safe_load((copy / PARAMS).read_text())
    if "cluster" not in params.get("evaluate", {}):
        raise ClearError(f"cluster = {cluster!r}: this revision evaluates on one machine only; leave it out.")
    params["evaluate"]["cluster"] = cluster
    (copy / PARAMS).write_text(yaml.safe_dump(params, sort_keys=False))


def fetch_inputs(copy: Path, stages: list[str], skip_models: bool = False) -> list[str]:
    """Bring the data that the stages read into the copy, from the cache or else the remote.

    Returns the model folders that the stages read; with `skip_models` these are not brought. Raises ClearError for a
    stage that the revision does not have.
    """
    from dvc.repo import Repo

    with Repo(str(copy)) as repo:
        known = {address(stage, copy): stage for stage in repo.index.stages}
        for stage in stages:
            if stage not in known:
                raise ClearError(f"this revision has no stage {stage}; it has {', '.join(sorted(known))}.")
        cached = {out.fs_path for out in repo.index.outs if out.use_cache}
        read = {dep.fs_path for stage in stages for dep in known[stage].deps if dep.fs_path in cached}
    names = sorted(os.path.relpath(path, copy) for path in read)
    models = [name for name in names if name.startswith("data/models/")]
    wanted = [name for name in names if not (skip_models and name in models)]
    lacking = wanted
    for command in ["checkout", *(["pull"] if remote_of(copy) else [])]:
        if lacking:
            dvc([command, "--allow-missing", *lacking], copy, get_run_logger().info)
        lacking = [name for name in wanted if not (copy / name).exists()]
    if lacking:
        raise ClearError(
            f"{', '.join(lacking)}: neither in the cache nor in a remote; make them with `make repro` in the "
            "workspace, or set the remote that has them with `make remote`."
        )
    return models


def main(arguments: list[str] | None = None) -> int:
    """Run the flow here and now and print the figures; the exit status of `here_and_now`."""
    parser = argparse.ArgumentParser(prog="python -m flows.benchmark", description="MMD-Bench, aside.")
    parser.add_argument("revision", nargs="?", default="HEAD", help="git revision")
    parser.add_argument("--model", action="append", dest="models", help=f"{', '.join(MODELS)}; default: all")
    parser.add_argument("--folder", help="evaluate this folder or release (@prod) in place of the model's own")
    parser.add_argument("--force", action="store_true", help="measure even what is recorded as up to date")
    parser.add_argument("--when-busy", choices=("wait", "leave"), default="wait", help="if another benchmark runs")
    parser.add_argument("--cluster", help="address of a Dask scheduler whose workers answer; '' = this machine")
    given = parser.parse_args(arguments)
    chosen = (given.models, given.folder, given.force, given.when_busy, given.cluster)
    status, done = here_and_now(lambda: benchmark(".", given.revision, *chosen), ", it starts anew")
    if done:
        say(metrics_table(Path(".clear/scratch/benchmark")))
    return status


if __name__ == "__main__":
    sys.exit(main())
