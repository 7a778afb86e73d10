"""Whether torch.compile can be had for a model's blocks, and its quiet."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from dilated_factory.errors import InputError
from dilated_factory.training.parallel import Parallel

Compile = Literal["auto", "on", "off"]


def decide_compile(
    wanted: Compile, parallel: Parallel, tell: Callable[[str], None] = lambda line: None
) -> bool:
    """Whether the blocks are to be compiled; where that was wanted and cannot be, a line says why.

    Args:
        wanted: "auto" is on CUDA and where it works.
        parallel: where it would run.
        tell: is given the line.

    Raises:
        InputError: "on", and nothing can be compiled here.
    """
    if wanted == "off" or (wanted == "auto" and parallel.device.type != "cuda"):
        return False
    if parallel.shares_sequences:
        tell("not compiled: processes that share a sequence exchange rows within each block")
        return False
    fault = compiler_fault(parallel.device)
    if fault is None:
        return True
    if wanted == "on":
        raise InputError(f"--compile on: nothing can be compiled here: {fault}")
    tell(f"not compiled, and slower for it: {fault}")
    return False


@contextmanager
def compiling() -> Iterator[None]:
    """Leave out what the compiler says of its own doings while it traces a block."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning
        )
        yield


def compiler_fault(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device here; None if it can."""
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(2, device=device))
    except Exception as error:  # any of torch's, of a C compiler or of triton
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"
    return None
