"""Where commands print: plain text, so that brackets in paths and samples stay as they are."""

import errno
import os
import sys
from typing import IO, Any, cast

from rich.console import Console


def plain_console() -> Console:
    """A console that neither reads markup nor colours what looks like a number."""
    terminal = cast("IO[str]", _Terminal(sys.stdout)) if sys.stdout.isatty() else None
    return Console(file=terminal, markup=False, highlight=False)


def silent_console() -> Console:
    """A console that prints nothing: that of all processes but the first."""
    return Console(quiet=True)


def size(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = 0
    while count >= 1024 ** (power + 1) and power + 1 < len(units):
        power += 1
    return f"{count / 1024**power:,.{0 if power == 0 else 2}f} {units[power]}"


def seconds(duration: float | None) -> str:
    """Seconds in a readable unit; None where a speed is not known."""
    if duration is None:
        return "unknown: no speed of the links given"
    for unit, scale in (("days", 86400.0), ("h", 3600.0), ("s", 1.0), ("ms", 1e-3)):
        if duration >= scale * (2 if scale >= 3600 else 1):
            return f"{duration / scale:,.2f} {unit}"
    return f"{1e6 * duration:,.1f} µs"


class _Terminal:
    """A stream to a terminal; what is written after the terminal is gone goes nowhere.

    So a command that saves on SIGHUP is not stopped by a line that nobody can read.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, if the terminal is there."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._leave(error)
        return len(text)

    def flush(self) -> None:
        """Flush, if the terminal is there."""
        try:
            self._stream.flush()
        except OSError as error:
            self._leave(error)

    def _leave(self, error: OSError) -> None:
        if error.errno != errno.EIO:
            raise error
        # What the stream still holds goes there too, else Python would exit with code 120.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
