"""Measure the hot paths: `make bench`, or `python tests/bench/run.py [name …]`.

Every function `bench_*` in tests/bench/bench_*.py returns `{row: {"value", "unit", "baseline", "ratio"}}`: what was
measured, in which unit, the same quantity for the plain way of doing it (measured in the same process, on the same
input), and value / baseline. The rows are printed; a run of all is written to data/results/bench.json.
"""

import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from clear.data.io import write_json  # noqa: E402
from clear.errors import ClearError  # noqa: E402

OUTPUT = Path("data/results/bench.json")
KEYS = {"value", "unit", "baseline", "ratio"}


def benchmarks(folder: Path, wanted: list[str]) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(name, function) of every benchmark in `folder`, or of the wanted ones. Raises ClearError for an unknown name."""
    found = {}
    for file in sorted(folder.glob("bench_*.py")):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found |= {name.removeprefix("bench_"): f for name, f in vars(module).items() if name.startswith("bench_")}
    if not found:
        raise ClearError(f"{folder}: no file bench_*.py with a function bench_* here.")
    unknown = set(wanted) - set(found)
    if unknown:
        raise ClearError(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(sorted(found))}.")
    yield from ((name, found[name]) for name in wanted or found)


def main(folder: Path = HERE, wanted: list[str] | None = None, output: Path = OUTPUT) -> None:
    """Run benchmarks and print one line per row; a run of all is written with the machine it was measured on."""
    rows = {}
    for name, measure in benchmarks(folder, wanted or []):
        for row, figures in measure().items():
            if set(figures) != KEYS:
                raise ClearError(f"benchmark {name}: {row} has the keys {sorted(figures)}, not {sorted(KEYS)}.")
            rows[row] = figures
            shown = f"{figures['value']:>12.4g} {figures['unit']:<10} baseline {figures['baseline']:<10.4g}"
            print(f"{row:<36}{shown} ratio {figures['ratio']:.3f}", flush=True)
    if wanted:  # figures of one run belong together
        print(f"{output} is left as it is: only a run of all benchmarks is written.")
        return
    write_json(output, {"machine": {"cores": os.cpu_count(), "processor": platform.machine()}, "rows": rows})
    print(f"written: {output}")


if __name__ == "__main__":
    try:
        main(wanted=sys.argv[1:])
    except ClearError as error:
        sys.exit(f"error: {error}")
