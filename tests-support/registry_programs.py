"""What ranks run in the tests of attention that a registry builds."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dilated_factory import create_attention, default_registry


def tensors(length: int) -> list[Tensor]:
    """Query, key, value and the gradient of the output of a whole sequence."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, length, 4, 8)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(4)]


def attend(values: dict[str, Any], length: int, mesh: tuple[int, ...] | None) -> list[Tensor]:
    """This rank's rows of out, dq, dk and dv of a causal call."""
    group = None if mesh is None else init_device_mesh("cpu", mesh)
    module = create_attention(values, default_registry(), group=group)
    rows = length // dist.get_world_size()
    own = slice(dist.get_rank() * rows, (dist.get_rank() + 1) * rows)
    query, key, value, upstream = (x[:, own].contiguous() for x in tensors(length))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    out = module(*inputs, is_causal=True)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]
