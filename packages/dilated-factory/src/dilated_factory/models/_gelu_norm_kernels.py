"""The kernels of `gelu_norm`; importing this module imports triton."""

# Kernels are a language of their own: their names have no Python types.
# mypy: ignore-errors

# A program serves one row after another, reads rows ahead, and holds a row in two blocks where one
# would be filled by three quarters or less. How many run, and with how many registers, was measured
# on an H200 (benchmarks/NOTES.md).

import torch
import triton
import triton.language as tl
from torch import Tensor

_MULTIPROCESSORS = 132  # of an H200


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, moments: Tensor, eps: float
) -> None:
    """Fill out (..., F), and moments (2, R): mean and reciprocal deviation of each row."""
    features = x.shape[-1]
    rows = x.numel() // features
    block, rest, warps = _blocks(features)
    programs = min(rows, _MULTIPROCESSORS * max(64 // warps, 4))
    _forward_kernel[(programs,)](
        x, weight, bias, out, moments, rows, features, eps, BLOCK=block, REST=rest,
        num_warps=warps, maxnreg=128 if warps == 4 else None,
    )  # fmt: skip


def backward(grad: Tensor, x: Tensor, weight: Tensor, moments: Tensor, grad_x: Tensor) -> Tensor:
    """Fill grad_x; return the gradients of weight and bias in parts (2, programs, F)."""
    features = x.shape[-1]
    rows = x.numel() // features
    block, rest, warps = _blocks(features)
    # As many as run at once, with the registers below.
    programs = min(rows, _MULTIPROCESSORS * (3 if warps == 4 else max(8 // warps, 2)))
    parts = torch.empty((2, programs, features), dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        grad, x, weight, moments, grad_x, parts, rows, features, BLOCK=block, REST=rest,
        num_warps=warps, maxnreg=168 if warps == 4 else None,
    )  # fmt: skip
    return parts


def _blocks(features: int) -> tuple[int, int, int]:
    """The widths of a row's blocks, the second may be 0, and warps for about 16 elements a thread.

    Triton's blocks are powers of two.
    """
    whole = triton.next_power_of_2(features)
    block = max(whole // 2, 16)
    rest = triton.next_power_of_2(max(features - block, 1))
    if block + rest >= whole:
        block, rest = whole, 0
    return block, rest, min(max(block // 512, 1), 16)


@triton.jit
def _forward_kernel(
    x, weight, bias, out, moments, rows, features, eps, BLOCK: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    inside = columns < features
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if REST:
        columns2 = BLOCK + tl.arange(0, REST)
        inside2 = columns2 < features
        w2 = tl.load(weight + columns2, mask=inside2, other=0.0).to(tl.float32)
        b2 = tl.load(bias + columns2, mask=inside2, other=0.0).to(tl.float32)
    step = tl.zeros([], tl.int64) + features
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=3):
        start = row * step
        z = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
        g = z * _normal(z)[0]  # 0 where outside
        total = tl.sum(g, 0)
        if REST:
            z2 = tl.load(x + start + columns2, mask=inside2, other=0.0).to(tl.float32)
            g2 = z2 * _normal(z2)[0]
            total += tl.sum(g2, 0)
        mean = total / features
        g = tl.where(inside, g - mean, 0.0)
        squares = tl.sum(g * g, 0)
        if REST:
            g2 = tl.where(inside2, g2 - mean, 0.0)
            squares += tl.sum(g2 * g2, 0)
        scale = tl.rsqrt(squares / features + eps)
        tl.store(out + start + columns, g * scale * w + b, mask=inside)
        if REST:
            tl.store(out + start + columns2, g2 * scale * w2 + b2, mask=inside2)
        tl.store(moments + row, mean)
        tl.store(moments + rows + row, scale)


@triton.jit
def _backward_kernel(
    grad, x, weight, moments, grad_x, parts, rows, features, BLOCK: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < features
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    of_weight = tl.zeros([BLOCK], tl.float32)
    of_bias = tl.zeros([BLOCK], tl.float32)
    if REST:
        columns2 = BLOCK + tl.arange(0, REST)
        inside2 = columns2 < features
        w2 = tl.load(weight + columns2, mask=inside2, other=0.0).to(tl.float32)
        of_weight2 = tl.zeros([REST], tl.float32)
        of_bias2 = tl.zeros([REST], tl.float32)
    step = tl.zeros([], tl.int64) + features
    for row in tl.range(program, rows, programs, num_stages=3):
        start = row * step
        mean, scale = tl.load(moments + row), tl.load(moments + rows + row)
        # Where outside, dy is 0, and so is all that is summed.
        normed, slope, dy = _read(grad, x, start, columns, inside, mean, scale)
        of_weight += dy * normed
        of_bias += dy
        dy *= w
        along, level = tl.reduce((dy * normed, dy), 0, _add_both)
        if REST:
            normed2, slope2, dy2 = _read(grad, x, start, columns2, inside2, mean, scale)
            of_weight2 += dy2 * normed2
            of_bias2 += dy2
            dy2 *= w2
            along2, level2 = tl.reduce((dy2 * normed2, dy2), 0, _add_both)
            along += along2
            level += level2
        along /= features
        level /= features
        to = grad_x + start + columns
        tl.store(to, (dy - normed * along - level) * scale * slope, mask=inside)
        if REST:
            to = grad_x + start + columns2
            tl.store(to, (dy2 - normed2 * along - level) * scale * slope2, mask=inside2)
    to = parts + program.to(tl.int64) * features
    of_biases = programs.to(tl.int64) * features
    tl.store(to + columns, of_weight, mask=inside)
    tl.store(to + of_biases + columns, of_bias, mask=inside)
    if REST:
        tl.store(to + columns2, of_weight2, mask=inside2)
        tl.store(to + of_biases + columns2, of_bias2, mask=inside2)


@triton.jit
def _read(grad, x, start, columns, inside, mean, scale):
    """The normed GELU of a row's block, the slope of the GELU, and the gradient."""
    z = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(grad + start + columns, mask=inside, other=0.0).to(tl.float32)
    below, bell = _normal(z)
    return (z * below - mean) * scale, below + z * 0.3989422804014327 * bell, dy


@triton.jit
def _normal(z):
    """The normal distribution up to z, and exp(-z * z / 2), of one exponential.

    The tail is bell * t * polynomial(t) with t = 1 / (1 + 0.31 |z|), as in Abramowitz and Stegun
    7.1.26, fitted anew: to 5e-6 of itself for |z| <= 14, a hundredth of what 16 bits can tell.
    """
    t = 1.0 / (1.0 + 0.31 * tl.abs(z))
    bell = tl.exp2(-0.7213475204444817 * z * z)
    tail = 0.1804651026 - 0.07393390515 * t
    tail = 0.01573405664 + tail * t
    tail = 0.1334275391 + tail * t
    tail = 0.1204409925 + tail * t
    tail = (0.1238606829 + tail * t) * t * bell
    return tl.where(z < 0, tail, 1.0 - tail), bell


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d
