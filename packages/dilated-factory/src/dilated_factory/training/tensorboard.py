"""The metrics of a run as TensorBoard events."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dilated_factory.errors import missing_package
from dilated_factory.training.loop import StepMetrics


def event_writer() -> Callable[[str], Any]:
    """What makes a writer of events into a folder.

    Raises:
        MissingPackageError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise missing_package("--tensorboard", "tensorboard") from None
    return SummaryWriter


@contextmanager
def logging_events(folder: Path) -> Iterator[Callable[[StepMetrics], None]]:
    """Yield what writes the numbers of a step into the folder; raises as `event_writer`."""
    writer = event_writer()(str(folder))

    def write(metrics: StepMetrics) -> None:
        for name, value in metrics.record().items():
            if name != "step":
                writer.add_scalar(name, value, metrics.step)

    try:
        yield write
    finally:
        writer.close()
