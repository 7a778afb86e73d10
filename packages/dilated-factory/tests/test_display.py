"""What training shows: smoothed loss, speed, time left."""

import io

import pytest
from rich.console import Console

from dilated_factory.cli.display import clock, file_size, training_display
from dilated_factory.training.loop import StepMetrics


def metrics(step: int, bits: float) -> StepMetrics:
    """Steps of 2 s and 1000 bytes in a run of 100 steps."""
    return StepMetrics(
        step=step,
        loss=bits * 0.69,
        bits_per_byte=bits,
        learning_rate=0.1,
        gradient_norm=1.0,
        bytes_read=1000 * step,
        elapsed_seconds=2.0 * step,
        progress=step / 100,
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_loss_speed_and_time_left_are_shown(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)
    with training_display(console) as display:
        for step in range(1, 101):
            display.show(metrics(step, 5.0 if step < 40 else 2.0))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    last = shown[shown.rindex("step ") :]
    # 61 steps at 2.0 after 5.0, each a tenth of the way.
    for part in ("step 100", "100%", f"{2 + 3 * 0.9**61:.3f}", "500 tokens/s", "0:00:00 left"):
        assert part in last


def test_the_bar_starts_without_numbers_that_are_none() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with training_display(console):
        pass
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "? bits/byte ? tokens/s ? left" in shown
    assert "nan" not in shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (38_123, "38.1 kB"),
        (999_950, "1.0 MB"),
        (219_800_000, "219.8 MB"),
        (5_000_000_000_000, "5,000.0 GB"),
    ],
)
def test_sizes_of_files_have_a_unit_that_shows_them(count: int, shown: str) -> None:
    assert file_size(count) == shown


def test_the_time_left_is_that_of_the_steps_left() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with training_display(console) as display:
        display.show(metrics(1, 3.0))
        display.show(metrics(40, 3.0))
    assert isinstance(console.file, io.StringIO)
    assert "0:02:00 left" in console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "?"), (0.4, "0:00:00"), (61, "0:01:01"), (36061.0, "10:01:01")]
)
def test_the_clock(seconds: float | None, shown: str) -> None:
    assert clock(seconds) == shown
