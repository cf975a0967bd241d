"""Degradations beyond the sixteen of MMD-Bench: the user's own (`degrade.plugins`) and presets (`degrade.presets`).

A degradation is a pure function of the form of `clear.degradation.corruptions`, with an intensity for each severity:

    @degradation("drizzle", severities={"low": 0.2, "mid": 0.5, "high": 0.9})
    def drizzle(image, intensity, rng, scale=1.0): ...

In the data its corruption is "+drizzle": the mark keeps it apart from the sixteen in every table, and no headline
figure counts it. Plugin files lie below `plugins/`, a dependency of the stages, so that an edit of a file reruns them.
What a plugin returns is checked on every sample: type, shape, and the same bytes for the same seed.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from clear.data.records import EXTRA
from clear.degradation.corruptions import CORRUPTIONS
from clear.errors import ClearError

FOLDER = Path("plugins")
LEVELS = ("low", "mid", "high")
Function = TypeVar("Function", bound=Callable)
_MARK = "_clear_degradation"


@dataclass(frozen=True)
class Degradation:
    """One degradation. `severities`: level to intensity in (0, 1], rising. `weight` is its relative frequency in
    training, where the sixteen together have 400. `psnr` may state a band in dB per level. `monotone` says that PSNR
    and SSIM fall from level to level, which is then checked. `trusted` code is not run twice. `origin` is for messages.
    """

    name: str
    function: Callable
    severities: Mapping[str, float]
    weight: float = 25.0
    psnr: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    monotone: bool = True
    origin: str = ""
    trusted: bool = False

    @property
    def label(self) -> str:
        """Its name in `Sample.corruption`."""
        return EXTRA + self.name


@dataclass(frozen=True)
class Chosen:
    """Which further degradations a run uses: what params name. Small, so that every job of a pool carries it."""

    plugins: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()


def degradation(
    name: str,
    severities: Mapping[str, float],
    weight: float = 25.0,
    psnr: Mapping[str, tuple[float, float]] | None = None,
    monotone: bool = True,
) -> Callable[[Function], Function]:
    """Mark a function as a degradation (see `Degradation`). Raises ClearError for a name or levels it cannot have."""
    where = f"@degradation({name!r})"
    if not isinstance(name, str) or not name.isidentifier() or not name.islower():
        raise ClearError(f"{where}: the name must be a lower-case identifier.")
    if name in CORRUPTIONS:
        raise ClearError(f"{where}: one of the sixteen corruptions has this name; choose another.")
    values = [severities.get(level) for level in LEVELS] if isinstance(severities, Mapping) else []
    numbers = all(isinstance(v, int | float) and 0 < v <= 1 for v in values) and len(values) == len(severities)
    if not values or not numbers or sorted(set(values)) != values:
        raise ClearError(
            f"{where}: severities = {severities!r} must map low, mid and high to rising numbers in (0, 1]."
        )
    if not isinstance(weight, int | float) or not 0 < weight < 1e6:
        raise ClearError(f"{where}: weight = {weight!r} must be a positive number (the sixteen together have 400).")
    for level, band in (psnr or {}).items():
        if level not in LEVELS or len(band) != 2 or not band[0] < band[1]:
            raise ClearError(f"{where}: psnr[{level!r}] = {band!r} must be (low, high) in dB for low, mid or high.")

    def mark(function: Function) -> Function:
        entry = Degradation(name, function, dict(severities), float(weight), dict(psnr or {}), monotone)
        setattr(function, _MARK, entry)
        return function

    return mark


def marked(namespace: Mapping[str, object]) -> list[Degradation]:
    """The degradations among the values of a module, in the order of their definition."""
    found = [getattr(value, _MARK) for value in namespace.values() if callable(value) and hasattr(value, _MARK)]
    return list({id(entry): entry for entry in found}.values())


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
    from clear.degradation.presets import select

    found: dict[str, Degradation] = {}
    for entry in [*select(names.presets), *(entry for file in names.plugins for entry in _load(file))]:
        other = found.setdefault(entry.label, entry)
        if other is not entry:
            raise ClearError(
                f"degradation '{entry.name}' is defined twice, in {other.origin} and {entry.origin}; rename one."
            )
    return found


def _load(name: str) -> list[Degradation]:
    path = Path(name)
    if not path.resolve().is_relative_to(FOLDER.resolve()):
        raise ClearError(f"degrade.plugins: {name} lies outside {FOLDER}/, the folder DVC watches; move it there.")
    if not path.is_file():
        raise ClearError(f"degrade.plugins: {name}: no such file; correct params or restore it.")
    module_name = f"_clear_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ClearError(f"degrade.plugins: {name} is no Python file (*.py).")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    beside = str(path.parent.resolve())
    sys.path.insert(0, beside)  # a plugin may import what lies beside it
    try:
        spec.loader.exec_module(module)
    except ClearError as error:
        raise ClearError(f"{name}: {error}") from error
    except Exception as error:  # whatever the user's file raises is theirs to see, with the file's name
        raise ClearError(f"{name}: cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(beside)
    entries = marked(vars(module))
    if not entries:
        raise ClearError(f"{name}: defines no degradation; mark a function with @degradation(…).")
    origins = (f"{name}:{entry.function.__name__}" for entry in entries)
    return [_with_origin(entry, origin) for entry, origin in zip(entries, origins, strict=True)]


def _with_origin(entry: Degradation, origin: str) -> Degradation:
    from dataclasses import replace

    return replace(entry, origin=origin)


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
