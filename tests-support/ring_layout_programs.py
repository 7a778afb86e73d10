"""What ranks run in the tests of ring attention over block layouts."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from dilated_ring import ring_attention
from dilated_testing import SCALES, relative_error, stretch
from process_ranks import device
from ring_programs import Results, joined
from sparse_problems import NAMES, Problem, dense_masks

__all__ = ["SCALES", "Problem", "attend_layout", "dense_masks", "joined", "relative_error"]


def attend_layout(problem: Problem, options: dict[str, Any]) -> Results:
    """This rank's rows of out, lse, dq, dk and dv."""
    n = problem.layout.length // dist.get_world_size()
    rows = slice(dist.get_rank() * n, dist.get_rank() * n + n)
    tensors = [x.detach()[:, rows].to(device()).requires_grad_() for x in problem.tensors()]
    mask = problem.mask()
    torch.manual_seed(problem.seed)
    out, lse = ring_attention(
        *tensors, problem.layout, is_causal=problem.is_causal, scale=problem.scale,
        dropout_p=problem.dropout_p, enable_gqa=True, return_lse=True,
        key_padding_mask=None if mask is None else mask[:, rows].to(device()), **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(problem.seed + 2)
    length, heads = problem.layout.length, problem.heads
    shapes = (problem.batch, length, heads, problem.head_dim), (problem.batch, heads, length)
    grad_out, grad_lse = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes
    )
    grad_lse = grad_lse[:, :, rows].to(device()).masked_fill(lse == -torch.inf, 0.0)
    upstream = [grad_out[:, rows].to(device()), grad_lse]
    dq, *grads = torch.autograd.grad([out, lse], tensors, upstream)
    dq = dq * stretch(problem.scale, problem.head_dim)
    found = zip(NAMES, (out, lse, dq, *grads), strict=True)
    return {name: x.detach().cpu() for name, x in found}
