"""What goes wrong between ranks, as exceptions."""

from collections.abc import Sequence


class RingError(RuntimeError):
    """A fault on some rank ended a call on every rank; the group cannot be used any more.

    Attributes:
        ranks: the global ranks at fault, as far as they are known.
        step: what was being done, e.g. "forward: exchange of keys and values".

    Examples:
        >>> RingError("rank 1 died (step exchange)", ranks=(1,), step="exchange").ranks
        (1,)
    """

    def __init__(self, message: str, *, ranks: Sequence[int] = (), step: str = "") -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)
        self.step = step

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuilt, (type(self), str(self), self.ranks, self.step))


class RankMismatchError(RingError, ValueError):
    """The ranks of a group were called with arguments that do not fit together.

    Raised alike on every rank, before anything is exchanged; the group remains usable. `ranks` are
    those that differ from the first rank, or whose arguments are invalid.

    Examples:
        >>> issubclass(RankMismatchError, ValueError)
        True
    """


class RemoteError(Exception):
    """The cause of a RingError whose origin is on another rank: its traceback, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _rebuilt(kind: type[RingError], message: str, ranks: tuple[int, ...], step: str) -> RingError:
    return kind(message, ranks=ranks, step=step)
