"""torch.compile for a model's blocks, one graph for all of them, and whether it can be had."""

import functools

import torch
from torch.utils.checkpoint import checkpoint

from dilated_factory.models.longnet import LongNetLM


def compile_blocks(model: LongNetLM) -> None:
    """Compile each block where it stands, so that compilation takes as long for any depth."""
    for block in model.blocks:
        block.compile()


def compiler_fault(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device here; None if it can."""
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(2, device=device))
    except Exception as error:  # any of torch's, of a C compiler or of triton
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else 'without a message'}"
    return None


def recompute(model: LongNetLM, what: str) -> None:
    """Have backward compute again what is not worth its memory: "none", "feed_forward" or "all"."""
    model.activation_checkpointing = what == "all"
    if what == "feed_forward":
        for block in model.blocks:
            part = block.feed_forward
            assert isinstance(part, torch.nn.Module)
            part.forward = functools.partial(checkpoint, part.forward, use_reentrant=False)
