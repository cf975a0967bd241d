"""What a Prefect run costs over plain DVC where there is nothing to do: `python -m flows.pipeline` against `dvc repro`.

Both run in a project of this one's stages and edges, everything cached. `flow_overhead` is the flow as it is deployed,
with a Prefect server at hand; it is to cost at most 15 s more. In `flow_overhead_without_server` the command starts and
ends Prefect's temporary server too.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clear.data.ports import HOST
from clear.errors import ClearError

ROOT = Path(__file__).resolve().parent.parent.parent
REPEATS = 3


def _workspace(folder: Path) -> None:
    """A project with the pipeline's stage names and edges, each stage a copy, reproduced once."""
    import yaml

    given = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    stages = {}
    for name, stage in given.items():
        body = stage.get("do", stage)
        for key, item in stage.get("foreach", {"": ""}).items():

            def filled(path: str, key: str = key, item: str = item) -> str:
                return path.replace("${key}", key).replace("${item}", item)

            outs = [filled(out) for out in body["outs"] if isinstance(out, str)] if "outs" in body else []
            own = f"{name}-{key}" if key else name
            outs = outs or [f"data/{own}.txt"]
            made = " && ".join(f"mkdir -p {Path(out).parent} && echo {own} > {out}" for out in outs)
            stages[own] = {"cmd": made, "deps": [filled(dep) for dep in body["deps"]], "outs": outs}
    produced = {out for stage in stages.values() for out in stage["outs"]}
    for stage in stages.values():
        stage["deps"] = [dep for dep in stage["deps"] if dep in produced]
    folder.mkdir()
    for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (folder / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    _seconds([sys.executable, "-m", "dvc", "repro", "-q"], folder, dict(os.environ))


def _seconds(command: list[str], folder: Path, environment: dict[str, str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClearError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-500:]}")
    return time.perf_counter() - start


def bench_flow_overhead() -> dict[str, dict]:
    """Seconds of the flow and of `dvc repro`, medians of three in turn."""
    from flows.service import children  # here, for other benchmarks do without Prefect
    from flows.service.local import start_server
    from tests.helpers.processes import free_port

    flow, plain = [sys.executable, "-m", "flows.pipeline"], [sys.executable, "-m", "dvc", "repro"]

    def compared(folder: Path, environment: dict[str, str]) -> dict:
        _seconds(flow, folder, environment)  # the first run fills caches, and creates the database of a new server
        pairs = [(_seconds(flow, folder, environment), _seconds(plain, folder, environment)) for _ in range(REPEATS)]
        took, needed = (statistics.median(column) for column in zip(*pairs, strict=True))
        return {"value": took, "unit": "s", "baseline": needed, "ratio": took / needed}

    with tempfile.TemporaryDirectory(prefix="clear-bench-") as made:
        folder = Path(made) / "project"
        _workspace(folder)
        environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
        environment |= {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(Path(made) / "prefect")}
        alone = compared(folder, environment)
        port = free_port()
        with (Path(made) / "server.log").open("w") as log:
            server = start_server(Path(made), port, environment, stdout=log)
            try:
                deployed = compared(folder, environment | {"PREFECT_API_URL": f"http://{HOST}:{port}/api"})
            finally:
                children.stop(server)
    return {"flow_overhead": deployed, "flow_overhead_without_server": alone}
