"""Launching the kernels: arguments, outputs.

B batch, N queries, M keys, H query heads, H_kv key heads, D head_dim.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dilated_core import _dropout
from dilated_core._branches import Branches
from dilated_core._call import DilatedCall, Scores, Upstream
from dilated_core._partial import Partial
from dilated_core._triton import _kernels
from dilated_core._triton._blocks import config, head_dim_blocks, value_blocks
from dilated_core._triton._driving import Config, Pass, Sizes, Tiling
from dilated_core._triton._pattern_plans import PatternTiling
from dilated_core._triton._plan import TilePlan
from dilated_core._triton._triton_internals import Launch

Gradients = tuple[Tensor, Tensor, Tensor]
_HERE = nullcontext()
_LAUNCHES_OF_A_PLAN = 64


class KernelCall:
    """What the passes of one call have in common."""

    def __init__(
        self, scores: Scores, tiling: Tiling, query: Tensor, key: Tensor, value: Tensor,
        cu_seqlens: Tensor | None = None, first_key: int = 0,
    ) -> None:  # fmt: skip
        self.scores, self.tiling, self.cu_seqlens = scores, tiling, cu_seqlens
        mask = scores.key_padding_mask
        self.padding = None if mask is None else _flat(mask).view(torch.uint8)
        self.query, self.key, self.value = _flat(query), _flat(key), _flat(value)
        self.batch, length, self.heads, self.head_dim = query.shape
        _, key_length, self.kv_heads, _ = key.shape
        last_rows = cu_seqlens is None and scores.is_causal
        self.sizes = Sizes(
            length, key_length, self.heads, self.kv_heads,
            first_key + (key_length - length if last_rows else 0), first_key, scores.is_causal,
            query.device,
        )  # fmt: skip
        self.strides = self.query.stride()[:3], self.key.stride()[:3], self.value.stride()[:3]

    def launch(
        self, which: Pass, pointers: list[Tensor], strides: tuple[tuple[int, ...], ...], **more: Any
    ) -> None:
        """Launch the kernel of a pass.

        Args:
            which: the pass.
            pointers: its tensors, before those of the tables.
            strides: theirs, in the order of its arguments.
            more: compile-time arguments that the pass has alone.
        """
        scores, chosen = self.scores, config(which, self.tiling, self.sizes, self.query)
        tables = self.tiling.plan(self.sizes, which == "key", chosen.blocks)
        known = (
            which, chosen, self.batch, self.kv_heads, self.head_dim, strides, scores.scale,
            scores.dropout_p, self.padding is None, tuple([x.dtype for x in pointers]),
            *more.values(),
        )  # fmt: skip
        made = tables.launches.get(known)
        if made is None:
            if len(tables.launches) >= _LAUNCHES_OF_A_PLAN:
                tables.launches.clear()
            made = tables.launches[known] = self._launch(which, chosen, tables, strides, more)
        made(
            pointers,
            # Absent ones are any pointer.
            tables.tiles if self.cu_seqlens is None else self.cu_seqlens,
            tables.tiles if self.padding is None else self.padding,
            tables.tiles if scores.seed is None else scores.seed,
        )

    def _launch(
        self, which: Pass, chosen: Config, tables: TilePlan,
        strides: tuple[tuple[int, ...], ...], more: dict[str, Any],
    ) -> Launch:  # fmt: skip
        scores, slots = self.scores, tables.tiles.shape[1]
        heads = self.kv_heads if which == "key" else self.heads
        drop = min(_dropout.threshold(scores.dropout_p), 2**32 - 1)
        scale = [abs(scores.scale) * math.log2(math.e)]
        # Those that hold the columns.
        first, second = strides[1][1], strides[2][1]
        if which == "key":
            first, second = strides[0][1], strides[4][1]
        if which != "forward":
            scale.append(scores.scale)
        numbers = [
            *(x for each in strides for x in each), *scale, drop, 1.0 / (1.0 - scores.dropout_p),
            slots, tables.early, self.sizes.first_query, self.sizes.first_key,
        ]  # fmt: skip
        width, tail = head_dim_blocks(which, self.head_dim)
        constants = {
            "HEADS": heads, "GROUP": self.heads // self.kv_heads, "D": self.head_dim,
            "BLOCK_D": width, "TAIL": tail, **more,
            "MASK": tables.mask, "EARLY": tables.early > 0, "BLOCK_ROWS": chosen.rows,
            "FULL_COLUMNS": chosen.columns, "MASKED_COLUMNS": chosen.blocks.masked,
            "CAUSAL": scores.is_causal, "PADDED": self.padding is not None,
            "DROPOUT": scores.dropout_p > 0, "PACKED": self.cu_seqlens is not None,
            "NEGATIVE": scores.scale < 0,
            "WIDE": tables.largest_step * chosen.columns * max(first, second) >= 2**31,
            "ALIKE": first == second, "IEEE": self.query.dtype == torch.float32,
        }  # fmt: skip
        options = {
            "num_warps": chosen.warps, "num_stages": chosen.stages, "maxnreg": chosen.registers,
        }  # fmt: skip
        grid = slots * heads * self.batch
        return Launch(_KERNELS[which], grid, tables.tensors(), numbers, constants, options)

    @property
    def mask_strides(self) -> tuple[int, ...]:
        """The stride of the padding mask's batch."""
        return (0 if self.padding is None else self.padding.stride(0),)


_KERNELS: dict[Pass, Any] = {
    "forward": _kernels.forward_kernel,
    "query": _kernels.query_gradient_kernel,
    "key": _kernels.key_gradient_kernel,
}


def pattern_call(
    call: DilatedCall, query: Tensor, key: Tensor, value: Tensor, first_key: int = 0
) -> KernelCall:
    """A call of dilated attention; the keys start at position `first_key` of their sequence."""
    pattern, scores, cu_seqlens = call
    tiling = PatternTiling(pattern, cu_seqlens)
    return KernelCall(scores, tiling, query, key, value, cu_seqlens, first_key)


def rows_call(scores: Scores, query: Tensor, key: Tensor, value: Tensor) -> KernelCall:
    """A call in which every query sees every key or, when causal, those at and before it."""
    pattern = _dense(max(query.shape[1], key.shape[1], 1))
    return pattern_call(DilatedCall(pattern, scores), query, key, value)


@lru_cache(maxsize=256)
def _dense(length: int) -> Branches:
    return Branches([length], [1])


def forward(call: KernelCall, *, wide: bool = False) -> Partial:
    """Compute out (B, N, H, D) in query's dtype or, if `wide`, in float32, like lse (B, H, N)."""
    query = call.query
    # Kernels are launched on the current device, so make it the tensors' one.
    with _on_device(query):
        out, lse = (empty_wide if wide else empty_like)(query), empty_lse(query)
        if query.numel():
            value_width, value_tail = value_blocks(call.head_dim)
            # A padding mask may hide the keys that shifts are taken from, and weights that are
            # relative to any other score than the greatest do not fit in float16.
            optimistic = call.padding is None and query.dtype != torch.float16
            call.launch(
                "forward", [query, call.key, call.value, out, lse],
                (*call.strides, out.stride()[:3], lse.stride()[:2], call.mask_strides),
                VALUE_D=value_width, VALUE_TAIL=value_tail, OPTIMISTIC=optimistic,
            )  # fmt: skip
    return Partial(out, lse)


def backward(call: KernelCall, upstream: Upstream, *, wide: bool = False) -> Gradients:
    """Gradients to query, key and value, in their dtype or, if `wide`, in float32."""
    make = empty_wide if wide else empty_like
    query, key, value = call.query, call.key, call.value
    with _on_device(query):
        dq, dk, dv = grads = make(query), make(key), make(value)
        if not query.numel() or not key.numel():
            for grad in grads:
                grad.zero_()
            return grads
        do = _flat(upstream.grad_out)
        terms = torch.empty_like(upstream.total.lse, dtype=torch.int64)
        query_gradient(call, do, upstream.grad_lse, upstream.total, terms, dq)
        key_gradients(call, do, terms, dk, dv)
    return grads


def query_gradient(
    call: KernelCall,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    total: Partial,
    terms: Tensor,
    grad_query: Tensor,
) -> None:
    """Fill grad_query, and terms (B, H, N) int64, which the gradients to keys need."""
    out, lse = total
    seen = lse if grad_lse is None else grad_lse
    batch, head, row = seen.stride()
    call.launch(
        "query", [call.query, call.key, call.value, out, lse, grad_out, seen, grad_query, terms],
        (
            *call.strides, out.stride()[:3], grad_out.stride()[:3], lse.stride()[:2],
            (batch, row, head), call.mask_strides,
        ),
        GRAD_LSE=grad_lse is not None,
    )  # fmt: skip


def key_gradients(
    call: KernelCall, grad_out: Tensor, terms: Tensor, grad_key: Tensor, grad_value: Tensor
) -> None:
    """Fill grad_key and grad_value."""
    call.launch(
        "key", [call.query, call.key, call.value, grad_out, grad_key, grad_value, terms],
        (
            *call.strides, grad_key.stride()[:3], grad_out.stride()[:3], terms.stride()[:2],
            call.mask_strides,
        ),
    )  # fmt: skip


def _on_device(x: Tensor) -> AbstractContextManager[object]:
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def empty_like(x: Tensor) -> Tensor:
    """Uninitialized and contiguous."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def empty_wide(x: Tensor) -> Tensor:
    """Uninitialized, contiguous and in float32."""
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


def empty_lse(query: Tensor) -> Tensor:
    """An uninitialized lse (B, H, N)."""
    batch, length, heads, _ = query.shape
    return torch.empty((batch, heads, length), dtype=torch.float32, device=query.device)


def _flat(x: Tensor) -> Tensor:
    """The kernels read rows of unit stride; anything else is copied."""
    return x if x.stride(-1) == 1 else x.contiguous()
