"""A pool's statistics as a table, and its events as a picture; needs the extra `report`."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dilated_pool._events import Event
from dilated_pool._stats import PoolStats

if TYPE_CHECKING:
    from rich.table import Table


def rows(stats: PoolStats) -> list[tuple[str, str]]:
    """The name and the readable value of each counter."""
    fields = dataclasses.asdict(stats)
    by_memory: dict[str, int] = fields.pop("reserved_by_memory")
    table = [(name, _readable(name, value)) for name, value in fields.items()]
    table += [(f"reserved_bytes, {name}", _size(value)) for name, value in by_memory.items()]
    table += [("hit_rate", f"{stats.hit_rate:.1%}")]
    return [*table, ("fragmentation", f"{stats.fragmentation:.3f}")]


def stats_table(stats: PoolStats, *, title: str = "Memory pool") -> "Table":
    """A rich table of all counters.

    Raises:
        ImportError: rich is not installed.

    Examples:
        >>> stats_table(UnifiedMemoryPool().stats()).row_count > 5
        True
    """
    try:
        from rich.table import Table
    except ImportError as error:
        raise ImportError('stats_table needs rich: pip install "rich>=13"') from error

    table = Table(title=title)
    table.add_column("counter")
    table.add_column("value", justify="right")
    for row in rows(stats):
        table.add_row(*row)
    return table


def plot_timeline(events: Iterable[Event], path: str | Path) -> None:
    """Draw live and reserved bytes over time into a PNG file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no event.

    Examples:
        >>> pool = UnifiedMemoryPool()
        >>> with pool.record() as log:
        ...     pool.lease((16,)).release()
        >>> plot_timeline(log, "timeline.png")
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'plot_timeline needs matplotlib: pip install "matplotlib>=3.9"'
        ) from error

    steps = list(events)
    if not steps:
        raise ValueError("events must hold at least one event. Got none.")
    seconds = [event.seconds for event in steps]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for label, sizes in (
        ("reserved", [event.reserved_bytes for event in steps]),
        ("live", [event.live_bytes for event in steps]),
    ):
        mebibytes = [size / 2**20 for size in sizes]
        axes.fill_between(seconds, mebibytes, step="post", alpha=0.3)
        axes.step(seconds, mebibytes, where="post", label=label)
    axes.set_xlabel("seconds")
    axes.set_ylabel("MiB")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")
    figure.savefig(path, format="png")


def _readable(name: str, value: int | None) -> str:
    if value is None:
        return "none"
    return _size(value) if name.endswith("bytes") else f"{value:,}"


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:,.0f} {unit}" if unit == "B" else f"{nbytes:,.2f} {unit}"
