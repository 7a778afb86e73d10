"""The log of a pool's events, and its form as JSON lines."""

import dataclasses
import enum
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dilated_pool._shelf import MemoryBlock


class EventKind(enum.StrEnum):
    """What happened.

    Examples:
        >>> EventKind("lease")
        <EventKind.LEASE: 'lease'>
    """

    LEASE = "lease"
    RELEASE = "release"
    GROW = "grow"
    TRIM = "trim"


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One event of a pool.

    Attributes:
        seconds: since the recording began.
        kind: what happened.
        live_bytes: live bytes after the event.
        reserved_bytes: reserved bytes after the event.
        lease: number of the lease, None for "grow" and "trim", as all that follows.
        shape: shape of the leased tensor.
        dtype: its type without "torch.", such as "float32".
        device: its device.
        pin_memory: whether it is page-locked.

    Examples:
        >>> pool = UnifiedMemoryPool()
        >>> with pool.record() as log:
        ...     with pool.borrow((4,), dtype=torch.float32, device="cpu"):
        ...         pass
        >>> [str(event.kind) for event in log]
        ['grow', 'lease', 'release']
    """

    seconds: float
    kind: EventKind
    live_bytes: int
    reserved_bytes: int
    lease: int | None = None
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    device: str | None = None
    pin_memory: bool | None = None


class EventLog:
    """The events of a pool in the order in which they happened.

    Examples:
        >>> pool = UnifiedMemoryPool()
        >>> with pool.record() as log:
        ...     pool.lease((4,)).release()
        >>> len(log)  # a block was made, lent and given back
        3
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._start = time.perf_counter()

    def __iter__(self) -> Iterator[Event]:
        return iter(self._events)

    def __len__(self) -> int:
        return len(self._events)

    def add(
        self, kind: EventKind, block: MemoryBlock | None, live_bytes: int, reserved_bytes: int
    ) -> None:
        """Append an event; the pool calls this."""
        seconds = time.perf_counter() - self._start
        event = Event(seconds, kind, live_bytes, reserved_bytes)
        if block is not None:
            request = block.request
            event = dataclasses.replace(
                event,
                lease=block.number,
                shape=request.shape,
                dtype=str(request.dtype).removeprefix("torch."),
                device=str(request.device),
                pin_memory=request.pin_memory,
            )
        self._events.append(event)

    def write(self, path: str | Path) -> None:
        """Write one JSON object per line and event."""
        with Path(path).open("w", encoding="utf-8") as file:
            for event in self._events:
                fields = dataclasses.asdict(event)
                known = {name: value for name, value in fields.items() if value is not None}
                file.write(json.dumps(known) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> "EventLog":
        """Read what `write` wrote.

        Raises:
            ValueError: a line is not an event; the message says which.
        """
        log = cls()
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    log._events.append(_parse(json.loads(line)))
                except (KeyError, RecursionError, TypeError, ValueError) as error:
                    raise ValueError(f"{path}, line {number}, is not an event: {error}") from error
        return log


def _parse(fields: dict[str, Any]) -> Event:
    fields["kind"] = EventKind(fields["kind"])
    if "shape" in fields:
        fields["shape"] = tuple(fields["shape"])
    return Event(**fields)
