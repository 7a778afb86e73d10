"""What commands show while they run: a progress bar, or plain lines where there is no terminal."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dilated_factory.training.corpus import Reading
from dilated_factory.training.loop import StepMetrics

# Plain lines go to logs; one each ten seconds is enough there.
_SECONDS_BETWEEN_LINES = 10.0


class TrainingDisplay(Protocol):
    """A context manager that is shown every step."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def show(self, metrics: StepMetrics) -> None:
        """Show one step."""


def training_display(
    console: Console,
    *,
    flops_per_token: Callable[[int], float] = lambda step: 0.0,
    peak: float | None = None,
    unit: str = "byte",
) -> TrainingDisplay:
    """The display that suits the console.

    Args:
        console: where to show.
        flops_per_token: operations of a model for each token of a step.
        peak: operations a second that the devices could do; None where that is not known.
        unit: what the loss is per.
    """
    smoothed = _Smoothed(lambda step: flops_per_token(step) / peak if peak else 0.0, unit)
    return (_Bar if console.is_terminal else _Lines)(console, smoothed)


class _Smoothed:
    """Loss and speed over recent steps, since a single step is noisy."""

    def __init__(self, share_per_speed: Callable[[int], float], unit: str) -> None:
        self._share_per_speed, self.unit = share_per_speed, unit
        self.validation: float | None = None
        self.bits = 0.0
        self.tokens_per_second = 0.0
        self.seconds_left: float | None = None
        self._last: StepMetrics | None = None
        self._first: StepMetrics | None = None

    def update(self, now: StepMetrics) -> None:
        weight = 0.1 if self._last else 1.0
        self.bits += weight * (now.bits_per_byte - self.bits)
        if self._first is None or self._last is None:
            self._first = now
            self.tokens_per_second = tokens(now) / max(now.elapsed_seconds, 1e-9)
        else:
            seconds = max(now.elapsed_seconds - self._last.elapsed_seconds, 1e-9)
            speed = (tokens(now) - tokens(self._last)) / seconds
            self.tokens_per_second += weight * (speed - self.tokens_per_second)
            done = max(now.progress - self._first.progress, 1e-9)
            spent = now.elapsed_seconds - self._first.elapsed_seconds
            self.seconds_left = spent / done * (1 - now.progress)
        if now.validation_bits_per_byte is not None:
            self.validation = now.validation_bits_per_byte
        self._last = now

    @property
    def loss(self) -> str:
        """Of training, and of held-out bytes where they are looked at."""
        held_out = "" if self.validation is None else f" ({self.validation:.3f} held out)"
        return f"{self.bits:.3f} bits/{self.unit}{held_out}"

    @property
    def speed(self) -> str:
        """Tokens a second, and the share of what the devices could do, where that is known."""
        share = self._share_per_speed(self._last.step if self._last else 1) * self.tokens_per_second
        return f"{self.tokens_per_second:,.0f} tokens/s" + (f", MFU {share:.0%}" if share else "")


def tokens(metrics: StepMetrics) -> int:
    """What was read so far, in tokens."""
    return metrics.bytes_read if metrics.tokens_read is None else metrics.tokens_read


class _Bar:
    def __init__(self, console: Console, smoothed: _Smoothed) -> None:
        self._smoothed = smoothed
        self._progress = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TextColumn("[bold]{task.fields[loss]}[/]"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[left]} left"),
            console=console,
        )
        self._task = self._progress.add_task(
            "train", total=1.0, step=0, loss=f"? bits/{smoothed.unit}", speed="? tokens/s", left="?"
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, metrics: StepMetrics) -> None:
        smoothed = self._smoothed
        smoothed.update(metrics)
        self._progress.update(
            self._task,
            completed=metrics.progress,
            step=metrics.step,
            loss=smoothed.loss,
            speed=smoothed.speed,
            left=clock(smoothed.seconds_left),
        )


class _Lines:
    def __init__(self, console: Console, smoothed: _Smoothed) -> None:
        self._console = console
        self._smoothed = smoothed
        self._last_line = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def show(self, metrics: StepMetrics) -> None:
        smoothed = self._smoothed
        smoothed.update(metrics)
        now = time.monotonic()
        if now - self._last_line < _SECONDS_BETWEEN_LINES and metrics.progress < 1:
            return
        self._last_line = now
        self._console.print(
            f"step {metrics.step}  {metrics.progress:.0%}  {smoothed.loss}  {smoothed.speed}  "
            f"{clock(smoothed.seconds_left)} left",
        )


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """Yield what shows, on a terminal, what is being done and which share of all is done.

    It is on standard error, so that standard output holds results alone, and gone afterwards.
    Where standard error is no terminal, nothing is shown.
    """
    if not sys.stderr.isatty():
        # A disabled Progress of rich 13 still ends with an empty line.
        yield lambda what, share: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(
        *columns,
        console=Console(stderr=True, markup=False, highlight=False),
        transient=True,
        redirect_stdout=False,
    ) as progress:
        task = progress.add_task("", total=1.0)
        shown = ""

        def show(what: str, share: float) -> None:
            nonlocal shown
            progress.update(task, description=what, completed=share, refresh=what != shown)
            shown = what

        yield show


def show_readings(console: Console, readings: Sequence[Reading]) -> None:
    """Print what became of files, where there is more to tell than text."""
    if all(each.what in ("text", "empty") for each in readings):
        return
    table = Table("files", "what became of them", "such as")
    table.columns[0].justify = "right"
    for each in readings:
        became = each.what if each.was_read else f"skipped: {each.what}"
        table.add_row(f"{each.files:,}" if each.files else "", became, each.example)
    console.print(table)


def file_size(count: int) -> str:
    """Bytes in the largest decimal unit that leaves at least 1."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 999.95 or unit == "GB":
            break
        value /= 1000
    return f"{value:,.{0 if unit == 'bytes' else 1}f} {unit}"


def clock(seconds: float | None) -> str:
    """Seconds as h:mm:ss; a question mark for None, not known yet."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
