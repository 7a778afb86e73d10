"""What training shows: smoothed loss, speed, time left."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from dilated_factory import LongNetConfig, LongNetLM
from dilated_factory.cli.display import clock, file_size, training_display
from dilated_factory.training.flops import flops_per_token, peak_flops
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


@pytest.mark.parametrize("terminal", [True, False])
def test_held_out_loss_and_the_share_of_the_peak_are_shown_where_they_are_known(
    terminal: bool,
) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=140, color_system=None)
    # 500 bytes a second of 60 operations each.
    with training_display(console, flops_per_token=lambda step: 60.0, peak=75_000.0) as display:
        for step in range(1, 101):
            held_out = 3.25 if step == 50 else None
            display.show(replace(metrics(step, 2.0), validation_bits_per_byte=held_out))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    last = shown[shown.rindex("step ") :]
    assert "2.000 bits/byte (3.250 held out)" in last
    assert "500 tokens/s, MFU 40%" in last


def test_operations_of_a_token_are_those_of_its_matrices_and_of_the_keys_it_sees() -> None:
    config = LongNetConfig(
        embed_dim=32, num_heads=2, num_layers=3, ffn_dim=40, context=10, segment_lengths=(10,),
        dilation_rates=(1,),
    )  # fmt: skip
    matrices = 3 * (4 * 32 * 32 + 2 * 32 * 40) + 256 * 32
    attention = 3 * 2 * 4 * 16 * (10 + 1) / 2  # layers, heads, 4 * head_dim, keys on average
    assert flops_per_token(LongNetLM(config)) == 6 * matrices + 3 * attention
    assert peak_flops(torch.device("cpu"), "bfloat16") is None
