"""Ctrl-C, SIGTERM and SIGHUP as a request to stop after the present step."""

import signal
import time
from types import FrameType
from typing import Self

# Windows has no SIGHUP.
_HANGUP: int | None = getattr(signal, "SIGHUP", None)
SIGNALS: tuple[int, ...] = (
    signal.SIGINT,
    signal.SIGTERM,
    *(() if _HANGUP is None else (_HANGUP,)),
)
# Seconds within which a second signal belongs to the first.
_AT_ONCE = 0.05


class StopRequest:
    """While active, the first of `SIGNALS` is noted; the next one acts as it would without.

    Two exceptions. What was ignored before stays ignored: so it is under nohup, and for Ctrl-C in
    the background jobs of a script. And SIGHUP never cuts the saving short: a terminal that closes
    sends it twice, by its shell and by the kernel. Signals that come at once are one: of those that
    come before Python sees any the lowest number counts, so SIGHUP and SIGTERM are a SIGHUP.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._noted = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            previous = signal.getsignal(number)
            if previous is not signal.SIG_IGN:
                self._previous[number] = previous
                signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore(*self._previous)

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """The shell's convention for the signal that came: 129, 130 or 143."""
        assert self.signal is not None
        return 128 + self.signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._noted = number, now
        elif number != _HANGUP and now - self._noted > _AT_ONCE:
            # Only now: Python complains of a signal that is on its way when its handler goes.
            self._restore(number)
            signal.raise_signal(number)

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            signal.signal(number, self._previous.pop(number))  # type: ignore[arg-type]
