"""Bounds of a parameter, as metadata of a dataclass field; clear/config.py checks them."""

from dataclasses import field
from typing import Any


def between(low: float, high: float) -> Any:
    """A required number in [low, high]."""
    return field(metadata={"low": low, "high": high})


def one_of(*values: str) -> Any:
    """A required string among `values`."""
    return field(metadata={"values": values})


def count() -> Any:
    """A required whole number ≥ 1."""
    return between(1, 10**9)
