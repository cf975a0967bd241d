"""What the pipeline of a clone says: its stages in order, those that measure a model, and the model so far."""

from pathlib import Path

from clear.errors import ClearError

MODELS = "data/models/"


def stage_names(copy: Path) -> list[str]:
    """The stages of dvc.yaml, dependencies first."""
    return [stage.name for stage in _ordered(copy)]


def measuring(copy: Path, stage: str) -> list[str]:
    """The stages to run so that `stage` measures the model that is there: its data, but nothing that trains."""
    ordered = _ordered(copy)
    makers = {out.fs_path: node.name for node in ordered for out in node.outs}
    deps = {node.name: [dep.fs_path for dep in node.deps] for node in ordered}
    wanted, needed = [stage], set()
    while wanted:
        needed.add(name := wanted.pop())
        read = [path for path in deps[name] if path in makers and not _is_model(path, copy)]
        wanted += [makers[path] for path in read if makers[path] not in needed]
    return [node.name for node in ordered if node.name in needed]


def incumbent_of(copy: Path, model: str) -> Path:
    """The model folder that a model's evaluation reads. Raises ClearError if there is no such evaluation."""
    for stage in _ordered(copy):
        if stage.name == f"evaluate@{model}":
            for dep in stage.deps:
                if _is_model(dep.fs_path, copy):
                    return Path(dep.fs_path)
    raise ClearError(f"{copy}/dvc.yaml: no stage evaluate@{model} that reads {MODELS}…; see gate.model in params.yaml.")


def _is_model(path: str, copy: Path) -> bool:
    return path.startswith(f"{copy}/{MODELS}")


def _ordered(copy: Path) -> list:
    import networkx
    from dvc.repo import Repo
    from dvc.stage import PipelineStage

    with Repo(str(copy)) as repo:
        graph = networkx.reverse_view(repo.index.graph)
        # Data added with `dvc add` is a stage to DVC, without a name.
        ordered = networkx.lexicographical_topological_sort(graph, key=lambda stage: getattr(stage, "name", "") or "")
        return [stage for stage in ordered if isinstance(stage, PipelineStage)]
