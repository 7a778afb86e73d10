"""Rows of a tile and rows of a run, (rows, dims), and what kernels do with them."""

# Kernels are a language of their own: their names have no Python types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def row_pointers(base, start, step, offsets, stride, dims, WIDE: tl.constexpr):
    """Pointers (rows, dims) to the rows start + step * offsets."""
    base += start.to(tl.int64) * stride
    if WIDE:
        rows = offsets.to(tl.int64) * (step.to(tl.int64) * stride)
    else:
        rows = offsets * (step * stride)
    # In this order there is one addition of 64 bits for each pointer.
    return base + (rows[:, None] + dims[None, :])


@triton.jit
def load_columns(
    base, start, step, offsets, stride, dims, present,
    D: tl.constexpr, END: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Load the rows start + step * offsets; those not present and padded dims are 0.

    `dims` are below END.
    """
    pointers = row_pointers(base, start, step, offsets, stride, dims, WIDE)
    if MASKED:
        return tl.load(pointers, mask=present[:, None] & (dims < D)[None, :], other=0.0)
    if END <= D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(dims < D)[None, :], other=0.0)


@triton.jit
def load_rows(base, rows, stride, dims, inside, D: tl.constexpr):
    pointers = base + rows[:, None] * stride + dims[None, :]
    return tl.load(pointers, mask=inside[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, stride, dims, inside, values, D: tl.constexpr):
    pointers = base + rows[:, None] * stride + dims[None, :]
    values = values.to(base.dtype.element_ty)
    tl.store(pointers, values, mask=inside[:, None] & (dims < D)[None, :])


@triton.jit
def pack(low, high):
    """Two float32 in one int64, so that they are stored as one; in memory `low` comes first."""
    low = low.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return (high.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low


@triton.jit
def product(a, b, IEEE: tl.constexpr):
    if IEEE:
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def add_product(a, b, acc, IEEE: tl.constexpr):
    if IEEE:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc)
