"""Which way a call is served, and why: pure functions of the request."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True)
class Choice:
    """The way that serves a call.

    Attributes:
        name: its name.
        reason: why it was picked.
        rejected: for every other way, its name and why it was not.
    """

    name: str
    reason: str
    rejected: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class BackendChoice(Choice):
    """The backend that serves a call: a `Choice`, whose name is `backend` as well.

    Examples:
        >>> x = torch.zeros(1, 8, 2, 16, device="meta")
        >>> choice = select_backend(x, x, "reference")
        >>> choice.backend, len(choice.rejected)
        ('reference', 2)
    """

    @property
    def backend(self) -> str:
        """Its name."""
        return self.name


Kind = TypeVar("Kind", bound=Choice)


def check_name(argument: str, given: object, names: tuple[str, ...]) -> None:
    """Raise a ValueError unless an argument is None or one of the names."""
    if given is not None and given not in names:
        raise ValueError(
            f"{argument} must be None or one of {', '.join(map(repr, names))}. Got {given!r}."
        )


def pick(
    argument: str,
    given: str | None,
    names: tuple[str, ...],
    reasons: Mapping[str, str],
    obstacles: Mapping[str, str | None],
) -> str:
    """The name of the way that serves a call, as `choose`, which says why as well."""
    if given is None:
        return next(name for name in reasons if obstacles.get(name) is None)
    check_name(argument, given, names)
    if (obstacle := obstacles.get(given)) is not None:
        raise ValueError(
            f"{argument} must be able to serve the call. Got {given!r}, but {obstacle}."
        )
    return given


def choose(
    kind: type[Kind],
    argument: str,
    given: str | None,
    names: tuple[str, ...],
    reasons: Mapping[str, str],
    obstacles: Mapping[str, str | None],
    unasked: Mapping[str, str],
) -> Kind:
    """Choose one of some ways to serve a call.

    Args:
        kind: the class of the result.
        argument: what the caller names one by, for errors.
        given: the name of one to force it, or None.
        names: all of them.
        reasons: for those that may be picked, in the order of preference, why each is.
        obstacles: for those that cannot serve the call, why; None where one can.
        unasked: for those that are never picked, why they run only when asked for.

    Raises:
        ValueError: `given` names none, or one that cannot serve the call.
    """
    picked = pick(argument, given, names, reasons, obstacles)
    if given is not None:
        others = [(name, f"{argument}={given!r} was given") for name in names if name != given]
        return kind(picked, "it was given", tuple(others))
    rejected = [*unasked.items()]
    rejected += [(name, why) for name, why in obstacles.items() if why is not None]
    later = [name for name in reasons if name != picked and obstacles.get(name) is None]
    rejected += [(name, f"{picked} serves the call and comes first") for name in later]
    return kind(picked, reasons[picked], tuple(rejected))
