"""Where a run keeps what DVC does not track: checkpoints, timings and rendered reports.

One rule. `CLEAR_HOME` (default `.clear` in the working directory) is the private folder of the project; the rendered
report goes beside it, to `data/report/<profile>`. `make` exports CLEAR_HOME as an absolute path, so a stage that
DVC runs in a copy of the workspace (`clear scratch`, `dvc exp run --temp`) still keeps its checkpoints and shows
its report in the user's own folder. Nothing here may enter a tracked output.

    $CLEAR_HOME/checkpoints/<profile>/<stage>/    resumable training state, deleted on success
    $CLEAR_HOME/runs/<profile>/<stage>.json       machine, seconds, memory and whatever the stage adds with `record_run`
    $CLEAR_HOME/latents/                          latents that stages share, see clear/model/latents.py
    $CLEAR_HOME/scratch/<profile>/                copies of the workspace for other profiles
    $CLEAR_HOME/../data/report/<profile>/         the report
    $CLEAR_HOME/../data/replies/<name>.sqlite     paid replies of a teacher or judge, kept by `make clean`
"""

import hashlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from clear.config import PARAMS, value_at
from clear.data.io import write_json
from clear.errors import ClearError, shown
from clear.schema import Config


def home() -> Path:
    """The private folder of this project, absolute; not created here."""
    return Path(os.environ.get("CLEAR_HOME") or ".clear").absolute()


def profile(workspace: Path | str = "") -> str:
    """The profile named by `params.yaml` in a workspace (default: the working directory).

    Raises ClearError if there is no such file or it names no profile.
    """
    import yaml

    file = Path(workspace) / PARAMS
    if not file.exists():
        raise ClearError(
            f"{shown(file.absolute())} is not here; run this from the project's folder, or `make params` to compose it."
        )
    try:
        name = yaml.safe_load(file.read_text())["profile"]
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ClearError(f"{file}: no readable key 'profile'; compose the file with `make params`.") from error
    if not isinstance(name, str) or not name.isidentifier():
        raise ClearError(f"{file}: profile = {name!r} is not a profile's name; compose the file with `make params`.")
    return name


def report_dir(name: str | None = None, create: bool = True) -> Path:
    """Folder of the rendered report of a profile (default: the current one), created if need be."""
    folder = home().parent / "data" / "report" / (name or profile())
    return _made(folder) if create else folder


def replies_file(name: str) -> Path:
    """Where the replies of an endpoint (`teacher`, `judge`) are kept; every profile and scratch copy shares them."""
    return _made(home().parent / "data" / "replies") / f"{name}.sqlite"


def latents_dir() -> Path:
    """Folder of the latents that stages, profiles and scratch copies share; not created here."""
    return home() / "latents"


def checkpoint_dir(stage: str) -> Path:
    """Folder for the resumable state of a stage under the current profile, created if need be."""
    return _made(home() / "checkpoints" / profile() / stage)


def model_folder(stage: str, config: Config) -> Path:
    """Where the model of a stage lies: data/models/<stage>, or for `base` the checkpoint folder that params name.

    The folder holds weights, or an adapter that names the folder with its weights (clear/model/lora.py).
    """
    given = stage == "base" and config.model.checkpoint
    return Path(config.model.checkpoint if given else f"data/models/{stage}")


def completing(config: Config) -> Path | None:
    """The model folder that completes a folder of weights alone (clear/model/checkpoint): `model.base`, or else the
    checkpoint itself, whose configs and tokenizer a model trained from it has."""
    given = config.model.base or config.model.checkpoint
    return Path(given) if given else None


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _runs() -> Path:
    return home() / "runs" / profile()


def run_records() -> dict[str, dict]:
    """What the last run of every stage recorded under the current profile, by stage; empty before the first run."""
    return {file.stem: _read(file) for file in sorted(_runs().glob("*.json"))}


def record_run(stage: str, **values: Any) -> None:
    """Add figures (JSON values) about this run of a stage, such as tokens per second, to its run record."""
    file = _runs() / f"{stage}.json"
    write_json(file, (_read(file) if file.exists() else {}) | values)


def _read(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ClearError(f"{file}: not valid JSON ({error}); delete it, it only holds timings.") from error


_began_with: dict[str, Any] = {}
"""What the stage that this process runs was started with, by `_given`."""
_SHOWN = 3


@contextmanager
def unedited() -> Iterator[None]:
    """Remember what the stage that DVC runs in this process is given, for `require_unedited` in the block; to be
    entered before anything of it is read."""
    _began_with.update(_given())
    try:
        yield
    finally:
        _began_with.clear()


def require_unedited() -> None:
    """Raise ClearError where what people edit is not as the block of `unedited` found it.

    DVC looks at code, parameters and added data after a stage has ended, and would record, in dvc.lock and in its run
    cache, that the result is made from what is there by then.
    """
    if not _began_with:
        return
    try:
        now = _given()
    except Exception:  # whatever is wrong with these files now was not when the stage began: it is an edit
        now = {}
    if edited := [name for name in _began_with | now if _began_with.get(name) != now.get(name)]:
        more = f" and {len(edited) - _SHOWN} more" if len(edited) > _SHOWN else ""
        raise ClearError(
            f"{', '.join(edited[:_SHOWN])}{more}: edited while this stage ran; it began before the edit, and its "
            "result is not recorded. Undo the edit and repeat, where a training goes on from its last checkpoint, or "
            "repeat to run it anew."
        )


def _given() -> dict[str, Any]:
    """Parameters, code and data that no stage makes, of the stage in dvc.yaml that DVC runs in this process: each
    parameter's value, a hash of each file of code, and one of the names, sizes and times below each path of data.

    {} where DVC runs none: nothing is recorded then.
    """
    import yaml

    running = os.environ.get("DVC_STAGE", "").rpartition(":")[2].partition("@")[0]
    stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"] if running and Path("dvc.yaml").is_file() else {}
    if running not in stages:
        return {}
    parts = {name: stage.get("do", stage) for name, stage in stages.items()}
    made = {out if isinstance(out, str) else next(iter(out)) for one in parts.values() for out in one.get("outs", ())}
    values = yaml.safe_load(Path(PARAMS).read_text())
    named = [key for key in parts[running].get("params", ()) if isinstance(key, str)]
    lines = Path(".dvcignore").read_text().splitlines() if Path(".dvcignore").is_file() else []
    ignored = [line for line in lines if line and "/" not in line]  # names anywhere, such as __pycache__
    found: dict[str, Any] = {f"{PARAMS}: {key}": value_at(values, key) for key in named}
    for path in (Path(dep) for dep in parts[running].get("deps", ()) if dep not in made):
        if path.parts[0] == "data":  # of any size
            facts = hashlib.sha256()
            for file in _files(path, ignored):
                stat = file.stat()
                facts.update(f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
            found[str(path)] = facts.hexdigest()
        else:
            found |= {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in _files(path, ignored)}
    return found


def _files(path: Path, ignored: list[str]) -> Iterator[Path]:
    """The files of a dependency, sorted, without those that have one of these names, or are below one."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if not any(fnmatch(part, pattern) for pattern in ignored for part in file.parts) and file.is_file():
            yield file


@contextmanager
def stage_run(stage: str) -> Iterator[None]:
    """Start the run record of a stage anew; when the block succeeds, add the machine and what it cost.

    `seconds` is wall time, `cpu_seconds` includes children, `peak_mb` is the largest resident set of this process
    and `children_peak_mb` that of its largest child (MiB). The last one and the children's CPU time count only
    children that have ended. A run resumed from a checkpoint records its own part.
    """
    if int(os.environ.get("RANK", 0)):  # one record per run, by the first of several processes
        yield
        return
    (_runs() / f"{stage}.json").unlink(missing_ok=True)
    start, cpu_start = time.perf_counter(), _cpu_seconds()
    yield
    record_run(
        stage,
        machine=_machine(),
        seconds=time.perf_counter() - start,
        cpu_seconds=_cpu_seconds() - cpu_start,
        peak_mb=_peak_mb(resource.RUSAGE_SELF),
        children_peak_mb=_peak_mb(resource.RUSAGE_CHILDREN),
    )


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _peak_mb(who: int) -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(who).ru_maxrss / unit


def _machine() -> str:
    """What bytes may depend on beyond code, data and parameters: processor, GPU if there is one, Python, torch and the
    instructions that it uses (AVX2, AVX512), since `runtime.precision: auto` goes by these."""
    torch = sys.modules.get("torch")  # not imported only to be asked
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(":")[2].strip() for line in names if line.startswith("model name")), "")
    parts = [f"{processor or platform.machine()} × {os.cpu_count()}", f"Python {platform.python_version()}"]
    if torch is not None:
        parts.append(f"torch {torch.__version__} with {torch.backends.cpu.get_cpu_capability()}")
        if torch.cuda.is_available():
            parts.insert(0, torch.cuda.get_device_name())
    return ", ".join(parts)
