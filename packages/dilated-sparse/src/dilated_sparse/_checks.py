"""Argument checks of the public functions: an error names argument, requirement, value."""


def integer(name: str, value: object, *, low: int = 1) -> int:
    """Return `value` as an int of at least `low`, or raise an error that names it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int. Got {value!r} of type {type(value).__name__}.")
    if value < low:
        required = "positive" if low == 1 else f"at least {low}"
        raise ValueError(f"{name} must be {required}. Got {value}.")
    return value


def boolean(name: str, value: object) -> bool:
    """Return `value` if it is a bool, or raise an error that names it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool. Got {value!r} of type {type(value).__name__}.")
    return value


def share(name: str, value: object) -> float:
    """Return `value` as a float in (0, 1], or raise an error that names it."""
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError(f"{name} must be a float. Got {value!r}.")
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name} must be in (0, 1]. Got {value}.")
    return float(value)
