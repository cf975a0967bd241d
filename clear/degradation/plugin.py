"""What a degradation beyond the sixteen of MMD-Bench is: a function with an intensity for each severity.

    @degradation("drizzle", severities={"low": 0.2, "mid": 0.5, "high": 0.9})
    def drizzle(image, intensity, rng, scale=1.0): ...

The form of the function is that of `clear.degradation.corruptions`. Plugin files and the presets of the project mark
theirs alike; `clear.degradation.registry` finds and runs them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from clear.data.records import EXTRA
from clear.degradation.corruptions import CORRUPTIONS
from clear.errors import ClearError

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
