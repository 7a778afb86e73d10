"""What a measurement depends on, as each script of this folder prints it first."""

import datetime
import importlib.metadata
import platform
from pathlib import Path

import torch


def describe(device: str | torch.device = "cpu") -> dict[str, str | int]:
    """The day, the processor or GPU, the number of threads, and versions."""
    is_cuda = torch.device(device).type == "cuda"
    described: dict[str, str | int] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if is_cuda else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if is_cuda:
        described["triton"] = importlib.metadata.version("triton")
        described["cudnn"] = torch.backends.cudnn.version() or 0
        described["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return described


def processor() -> str:
    """The name of the processor."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
