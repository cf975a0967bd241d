"""The pipeline as a Prefect flow: one task per DVC stage, in graph order.

Run it with `python -m flows.pipeline` (no server needed) or deploy it. Each task is `dvc repro --single-item <stage>`,
so DVC alone decides what is up to date; Prefect's own result caching is off. Tasks run one after the other, because
a DVC workspace has one writer; parallelism lives inside the stages.
"""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from clear.errors import ClearError

LOCK_CONTENTION = "Unable to acquire lock"


def stages_in_order(workspace: Path) -> list[str]:
    """All stage names of dvc.yaml, dependencies first; ties in alphabetical order."""
    import networkx
    from dvc.repo import Repo

    with Repo(str(workspace)) as repo:
        graph = networkx.reverse_view(repo.index.graph)
        ordered = networkx.lexicographical_topological_sort(graph, key=lambda stage: stage.addressing)
        return [stage.addressing for stage in ordered]


def _retry_on_lock(task_, run, state) -> bool:
    """Retry only when another process held DVC's lock: a failed stage would fail again."""
    return LOCK_CONTENTION in str(state.message)


@task(cache_policy=NO_CACHE, persist_result=False, retries=3, retry_delay_seconds=20, retry_condition_fn=_retry_on_lock)
def reproduce(stage: str, workspace: Path) -> State:
    """Reproduce one stage; its output becomes log lines and its state says whether it ran."""
    logger = get_run_logger()
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
    lines = []
    with subprocess.Popen(
        command, cwd=workspace, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            if line.strip():
                lines.append(line.strip())
                logger.info(lines[-1])
    if process.returncode:
        raise ClearError(f"stage {stage} failed: {' | '.join(lines[-3:]) or 'no output'}")
    cached = any("didn't change, skipping" in line for line in lines)
    return Completed(name="Cached" if cached else "Ran", message=f"{stage}: {'up to date' if cached else 'ran'}")


@flow(name="pipeline", log_prints=True)
def pipeline(workspace: str = ".", stages: Iterable[str] | None = None) -> dict[str, str]:
    """Reproduce all stages (or the named ones) of a workspace; returns {stage: "Ran" or "Cached"}."""
    folder = Path(workspace).resolve()
    if not (folder / "dvc.yaml").exists():
        raise ClearError(f"{folder} has no dvc.yaml; name the project's folder as `workspace`.")
    outcome = {}
    for stage in list(stages) if stages is not None else stages_in_order(folder):
        outcome[stage] = reproduce(stage, folder, return_state=True)
        if not outcome[stage].is_completed():
            return outcome[stage]
    return {stage: state.name for stage, state in outcome.items()}


if __name__ == "__main__":
    pipeline(*sys.argv[1:2])
