"""The kernels of `norms`; importing this module imports triton."""

# Kernels are a language of their own: their names have no Python types.
# mypy: ignore-errors

# A program serves one row after another, reads rows ahead, and holds a row in two blocks where one
# would be filled by three quarters or less. How many run for GELU, and with how many registers, was
# measured on an H200 (benchmarks/NOTES.md).

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dilated_core.extending import relaunched

_MULTIPROCESSORS = 132  # of an H200


class RowLaunch(NamedTuple):
    """How a kernel runs.

    Attributes:
        block: elements of a row's first block.
        rest: of its second one, which there may not be.
        warps: of a program.
        programs: on a multiprocessor.
        registers: the most that a thread has, if there is a limit.
        stages: two less than rows that are read ahead.
    """

    block: int
    rest: int
    warps: int
    programs: int
    registers: int | None = None
    stages: int = 3


def forward(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, total: Tensor | None,
    out: Tensor, moments: Tensor | None, eps: float, gelu: bool,
) -> None:  # fmt: skip
    """Fill out (..., F), and the total where something of the same shape is added.

    For a backward also moments (2, R): mean and reciprocal deviation of each row. Without them rows
    are taken for few.
    """
    features = x.shape[-1]
    rows = x.numel() // features
    how = forward_launch(features, gelu)
    stages = 1 if moments is None else how.stages
    tensors = (x, added, weight, bias, total, out, moments)
    _launch(
        0, min(rows, _MULTIPROCESSORS * how.programs), tensors,
        (rows, features, eps, gelu, how.block, how.rest, stages), how,
    )  # fmt: skip


def backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, moments: Tensor,
    grad_x: Tensor, grad_added: Tensor | None, gelu: bool,
) -> Tensor:  # fmt: skip
    """Fill grad_x and grad_added; return gradients of weight and bias in parts (2, programs, F).

    Where there was a sum, x is that, and grad_total its gradient if it has one beside the norm's.
    """
    features = x.shape[-1]
    rows = x.numel() // features
    how = backward_launch(features, gelu, grad_total is not None)
    programs = min(rows, _MULTIPROCESSORS * how.programs)
    parts = torch.empty((2, programs, features), dtype=torch.float32, device=x.device)
    tensors = (grad, grad_total, x, weight, moments, grad_x, grad_added, parts)
    numbers = (rows, features, gelu, how.block, how.rest, how.stages)
    _launch(1, programs, tensors, numbers, how)
    return parts


def _launch(
    which: int, programs: int, tensors: tuple[Tensor | None, ...], rest: tuple[float, ...],
    how: RowLaunch,
) -> None:  # fmt: skip
    """Launch the forward (0) or the backward (1)."""
    facts = tensors[0].get_device(), *(x if x is None else x.dtype for x in tensors), *rest[1:], how
    _doors()[which](facts, programs, tensors, rest, num_warps=how.warps, maxnreg=how.registers)


@cache
def _doors() -> tuple[Callable[..., None], Callable[..., None]]:
    return relaunched(_norm_kernel), relaunched(_norm_backward_kernel)


def forward_launch(features: int, gelu: bool) -> RowLaunch:
    """How the forward runs."""
    block, rest, warps = _blocks(features)
    registers = 128 if warps == 4 else None
    if gelu:
        return RowLaunch(block, rest, warps, max(64 // warps, 4), registers)
    programs = min(max(8192 // block, 1), 32)
    return RowLaunch(block, rest, warps, programs, registers, _stages(features))


def backward_launch(features: int, gelu: bool, summed: bool = False) -> RowLaunch:
    """How the backward runs: as many programs as there are at once, with so many registers."""
    block, rest, warps = _blocks(features)
    if summed and 512 < features <= 1024:
        return RowLaunch(1024, 0, 1, 4)
    if not gelu:
        programs = min(max(4096 // block, 1), 32)
        return RowLaunch(block, rest, warps, programs, None, _stages(features))
    if warps == 4:
        return RowLaunch(block, rest, warps, 3, 168)
    return RowLaunch(block, rest, warps, max(8 // warps, 2))


def _stages(features: int) -> int:
    """Rows that are wider than this are not read ahead: of float32, two do not fit on the chip."""
    return 3 if features <= 8192 else 1


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


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    x, added, weight, bias, total, out, moments, rows, features, eps, GELU: tl.constexpr,
    BLOCK: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr,
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
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        start = row * step
        g = _normed_value(x, added, total, start, columns, inside, GELU)  # 0 where outside
        level = tl.sum(g, 0)
        if REST:
            g2 = _normed_value(x, added, total, start, columns2, inside2, GELU)
            level += tl.sum(g2, 0)
        mean = level / features
        g = tl.where(inside, g - mean, 0.0)
        squares = tl.sum(g * g, 0)
        if REST:
            g2 = tl.where(inside2, g2 - mean, 0.0)
            squares += tl.sum(g2 * g2, 0)
        scale = tl.rsqrt(squares / features + eps)
        tl.store(out + start + columns, g * scale * w + b, mask=inside)
        if REST:
            tl.store(out + start + columns2, g2 * scale * w2 + b2, mask=inside2)
        if moments is not None:
            tl.store(moments + row, mean)
            tl.store(moments + rows + row, scale)


@triton.jit
def _normed_value(x, added, total, start, columns, inside, GELU: tl.constexpr):
    """What is normed of a row's block; a sum is written, and rounded as it is read again."""
    z = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
    if added is not None:
        z += tl.load(added + start + columns, mask=inside, other=0.0).to(tl.float32)
        kept = z.to(total.dtype.element_ty)
        tl.store(total + start + columns, kept, mask=inside)
        z = kept.to(tl.float32)
    if GELU:
        z *= _normal(z)[0]
    return z


@triton.jit(do_not_specialize=["rows"])
def _norm_backward_kernel(
    grad, grad_total, x, weight, moments, grad_x, grad_added, parts, rows, features,
    GELU: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr,
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
    for row in tl.range(program, rows, programs, num_stages=STAGES):
        start = row * step
        mean, scale = tl.load(moments + row), tl.load(moments + rows + row)
        # Where outside, dy is 0, and so is all that is summed.
        normed, slope, dy = _read(grad, x, start, columns, inside, mean, scale, GELU)
        of_weight += dy * normed
        of_bias += dy
        dy *= w
        along, level = tl.reduce((dy * normed, dy), 0, _add_both)
        if REST:
            normed2, slope2, dy2 = _read(grad, x, start, columns2, inside2, mean, scale, GELU)
            of_weight2 += dy2 * normed2
            of_bias2 += dy2
            dy2 *= w2
            along2, level2 = tl.reduce((dy2 * normed2, dy2), 0, _add_both)
            along += along2
            level += level2
        along /= features
        level /= features
        dz = (dy - normed * along - level) * scale * slope
        _write(grad_total, grad_x, grad_added, start + columns, inside, dz)
        if REST:
            dz2 = (dy2 - normed2 * along - level) * scale * slope2
            _write(grad_total, grad_x, grad_added, start + columns2, inside2, dz2)
    to = parts + program.to(tl.int64) * features
    of_biases = programs.to(tl.int64) * features
    tl.store(to + columns, of_weight, mask=inside)
    tl.store(to + of_biases + columns, of_bias, mask=inside)
    if REST:
        tl.store(to + columns2, of_weight2, mask=inside2)
        tl.store(to + of_biases + columns2, of_bias2, mask=inside2)


@triton.jit
def _read(grad, x, start, columns, inside, mean, scale, GELU: tl.constexpr):
    """What is normed of a row's block, after it; its slope by x; and the gradient."""
    z = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(grad + start + columns, mask=inside, other=0.0).to(tl.float32)
    slope = 1.0
    if GELU:
        below, bell = _normal(z)
        slope = below + z * 0.3989422804014327 * bell
        z *= below
    return (z - mean) * scale, slope, dy


@triton.jit
def _write(grad_total, grad_x, grad_added, places, inside, dz):
    """Write the gradient of a row's block, for both parts of a sum in their dtypes."""
    if grad_total is not None:
        dz += tl.load(grad_total + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_x + places, dz, mask=inside)
    if grad_added is not None:
        tl.store(grad_added + places, dz, mask=inside)


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
