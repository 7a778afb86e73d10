"""The kernels of `gelu_norm`; importing this module imports triton."""

# Kernels are a language of their own: their names have no Python types.
# mypy: ignore-errors

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs of the backward, which each sum the gradients of weight and bias over their rows.
_PROGRAMS = 528


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, moments: Tensor, eps: float
) -> None:
    """Fill out (..., F), and moments (2, R): mean and reciprocal deviation of each row."""
    features = x.shape[-1]
    rows = x.numel() // features
    block = triton.next_power_of_2(features)
    _forward_kernel[(rows,)](
        x, weight, bias, out, moments, rows, features, eps, BLOCK=block, num_warps=_warps(block)
    )


def backward(grad: Tensor, x: Tensor, weight: Tensor, moments: Tensor, grad_x: Tensor) -> Tensor:
    """Fill grad_x; return the gradients of weight and bias in parts (2, programs, F)."""
    features = x.shape[-1]
    rows = x.numel() // features
    block, programs = triton.next_power_of_2(features), min(rows, _PROGRAMS)
    parts = torch.empty((2, programs, features), dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        grad, x, weight, moments, grad_x, parts, rows, features, BLOCK=block,
        num_warps=_warps(2 * block),
    )  # fmt: skip
    return parts


def _warps(block: int) -> int:
    """About 16 elements a thread."""
    return min(max(block // 512, 1), 16)


@triton.jit
def _forward_kernel(
    x, weight, bias, out, moments, rows, features, eps, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < features
    z = tl.load(x + row * features + columns, mask=inside, other=0.0).to(tl.float32)
    g = 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))  # 0 where outside
    mean = tl.sum(g, 0) / features
    centred = tl.where(inside, g - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / features + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * features + columns, centred * scale * w + b, mask=inside)
    tl.store(moments + row, mean)
    tl.store(moments + rows + row, scale)


@triton.jit
def _backward_kernel(
    grad, x, weight, moments, grad_x, parts, rows, features, BLOCK: tl.constexpr
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < features
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    of_weight = tl.zeros([BLOCK], tl.float32)
    of_bias = tl.zeros([BLOCK], tl.float32)
    step = tl.zeros([], tl.int64) + features
    for row in range(program, rows, programs):
        start = row * step
        z = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad + start + columns, mask=inside, other=0.0).to(tl.float32)
        mean, scale = tl.load(moments + row), tl.load(moments + rows + row)
        below = 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476))
        slope = below + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
        normed = tl.where(inside, (z * below - mean) * scale, 0.0)
        of_weight += dy * normed
        of_bias += dy
        dy *= w
        along, level = tl.sum(dy * normed, 0) / features, tl.sum(dy, 0) / features
        dz = (dy - normed * along - level) * scale * slope
        tl.store(grad_x + start + columns, dz, mask=inside)
    to = parts + program.to(tl.int64) * features + columns
    tl.store(to, of_weight, mask=inside)
    tl.store(to + programs.to(tl.int64) * features, of_bias, mask=inside)
