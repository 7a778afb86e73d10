"""Argument checks of the public functions: an error names argument, requirement, value."""

import math
import sys
from collections.abc import Sequence


def positive_int(name: str, value: object) -> int:
    """Return `value` as an int, or raise an error that names it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int. Got {value!r} of type {type(value).__name__}.")
    if value <= 0:
        raise ValueError(f"{name} must be positive. Got {value}.")
    return value


def positive_ints(name: str, values: object) -> tuple[int, ...]:
    """Return `values` as a non-empty tuple of positive ints, or raise an error that names it."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of ints. Got {values!r}.")
    if not values:
        raise ValueError(f"{name} must not be empty. Got {values!r}.")
    return tuple(positive_int(f"{name}[{i}]", value) for i, value in enumerate(values))


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}. Got {value!r}.")


def boolean(name: str, value: object) -> bool:
    """Return `value` if it is a bool, or raise an error that names it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool. Got {value!r} of type {type(value).__name__}.")
    return value


def fraction(name: str, value: object) -> float:
    """Return `value` as a float in [0, 1), or raise an error that names it."""
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{name} must be a float. Got {value!r}.")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1). Got {value}.")
    return float(value)


def scale(value: object, largest: float = sys.float_info.max) -> float | None:
    """Return a scale of scores as a finite float, or None, or raise an error that names it.

    `largest` is what scores can be multiplied by.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"scale must be a float or None. Got {value!r}.")
    if abs(value) <= largest:
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"scale must be finite. Got {value}.")
    raise ValueError(f"scale must be between -{largest:.3g} and {largest:.3g} here. Got {value}.")
