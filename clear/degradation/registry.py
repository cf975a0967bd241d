"""Degradations beyond the sixteen of MMD-Bench: the user's own (`degrade.plugins`) and presets (`degrade.presets`).

A degradation is a function marked with the decorator of `clear.degradation.plugin`, which plugin files may import from
here too. In the data the corruption of one named drizzle is "+drizzle": the mark keeps it apart from the sixteen in
every table, and no headline figure counts it. Plugin files lie below `plugins/`, a dependency of the stages, so that an
edit of a file reruns them.
What a plugin returns is checked on every sample: type, shape, and the same bytes for the same seed.
"""

import functools
import importlib.util
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clear.degradation.plugin import Degradation, degradation, marked
from clear.degradation.presets import select
from clear.degradation.protocol import training_weights
from clear.errors import ClearError

__all__ = ["Chosen", "apply", "chosen", "degradation", "extras", "training_mix"]

FOLDER = Path("plugins")


@dataclass(frozen=True)
class Chosen:
    """Which further degradations a run uses: what params name. Small, so that every job of a pool carries it."""

    plugins: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()


def chosen(plugins: Sequence[str], presets: Sequence[str]) -> Chosen:
    """What params name, checked by loading it once."""
    names = Chosen(tuple(plugins), tuple(presets))
    extras(names)
    return names


@functools.lru_cache(maxsize=8)
def extras(names: Chosen) -> Mapping[str, Degradation]:
    """The further degradations by label: those of the presets, then those of the plugins, in the order of params.

    Raises ClearError for an unknown preset, a file that is missing, lies outside plugins/, fails or defines no
    degradation, and for a name that two of them share.
    """
    found: dict[str, Degradation] = {}
    for entry in [*select(names.presets), *(entry for file in names.plugins for entry in _load(file))]:
        other = found.setdefault(entry.label, entry)
        if other is not entry:
            raise ClearError(
                f"degradation '{entry.name}' is defined twice, in {other.origin} and {entry.origin}; rename one."
            )
    return found


def training_mix(names: Chosen, held_out: Collection[str] = ()) -> dict[str, float]:
    """Relative frequencies in training: of the sixteen without those held out, and of the further ones by label."""
    return training_weights(held_out) | {label: entry.weight for label, entry in extras(names).items()}


def _load(name: str) -> list[Degradation]:
    path = Path(name)
    if not path.resolve().is_relative_to(FOLDER.resolve()):
        raise ClearError(f"degrade.plugins: {name} lies outside {FOLDER}/, the folder DVC watches; move it there.")
    if not path.is_file():
        raise ClearError(f"degrade.plugins: {name}: no such file; correct params or restore it.")
    module_name = f"_clear_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ClearError(f"degrade.plugins: {name} is not a Python file (*.py).")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    beside = str(path.parent.resolve())
    sys.path.insert(0, beside)  # a plugin may import what lies beside it
    known = set(sys.modules)
    try:
        spec.loader.exec_module(module)
    except ClearError as error:
        raise ClearError(f"{name}: {error}") from error
    except Exception as error:  # whatever the user's file raises is theirs to see, with the file's name
        raise ClearError(f"{name}: cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(beside)
        for other in set(sys.modules) - known - {module_name}:  # another plugin's helper may have the same name
            file = getattr(sys.modules[other], "__file__", None)
            if file and Path(file).resolve().is_relative_to(FOLDER.resolve()):
                del sys.modules[other]
    entries = marked(vars(module))
    if not entries:
        raise ClearError(f"{name}: defines no degradation; mark a function with @degradation(…).")
    return [replace(entry, origin=f"{name}:{entry.function.__name__}") for entry in entries]


def apply(entry: Degradation, image: np.ndarray, severity: str, seed: int, scale: float, sample: str) -> np.ndarray:
    """The degraded copy of uint8 RGB (H, W, 3). Raises ClearError naming file, function and sample for whatever goes
    wrong: an exception, another type or shape, other bytes for the same seed."""
    where = f"{entry.origin} ({entry.label}/{severity}, sample {sample})"
    out = _call(entry, image, severity, seed, scale, where)
    if not entry.trusted and not np.array_equal(out, _call(entry, image, severity, seed, scale, where)):
        raise ClearError(f"{where}: the same seed gave other pixels; draw everything random from `rng`.")
    return out


def _call(entry: Degradation, image: np.ndarray, severity: str, seed: int, scale: float, where: str) -> np.ndarray:
    given = np.array(image, order="C")
    try:
        out = entry.function(given, entry.severities[severity], np.random.default_rng(seed), scale)
    except Exception as error:  # a plugin may raise anything
        raise ClearError(f"{where}: {type(error).__name__}: {error}") from error
    if not isinstance(out, np.ndarray) or out.dtype != np.uint8 or out.shape != image.shape:
        found = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
        raise ClearError(f"{where}: returned {found}, expected uint8 {image.shape}.")
    return out
