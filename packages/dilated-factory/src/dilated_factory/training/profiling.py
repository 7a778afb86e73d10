"""Where a training step goes: a trace of some steps, and a table of their operations."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

_WARM_STEPS, _TRACED_STEPS = 5, 5
_ROWS = 25


@contextmanager
def profiling(
    trace: Path, device: torch.device, show: Callable[[str], None]
) -> Iterator[Callable[[object], None]]:
    """Yield what is to be told of each step; a few, after the first ones, are traced.

    Args:
        trace: where the trace goes, for chrome://tracing or ui.perfetto.dev.
        device: what computes.
        show: is given the table once the steps are over.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)

    def finish(traced: profile) -> None:
        traced.export_chrome_trace(str(trace))
        order = f"self_{device.type}_time_total"
        show(traced.key_averages().table(order, row_limit=_ROWS, max_name_column_width=60))

    plan = schedule(wait=0, warmup=_WARM_STEPS, active=_TRACED_STEPS, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=finish) as running:
        yield lambda step: running.step()
