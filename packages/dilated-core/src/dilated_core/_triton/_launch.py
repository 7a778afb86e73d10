"""Launching the kernels: arguments, outputs.

B batch, N queries, M keys, H query heads, H_kv key heads, D head_dim.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dilated_core import _dropout, _torch_internals
from dilated_core._branches import Branches
from dilated_core._caches import remembered
from dilated_core._call import DilatedCall, Scores, Upstream
from dilated_core._partial import Partial
from dilated_core._triton import _kernels
from dilated_core._triton._blocks import head_dim_blocks, pair_of, value_blocks
from dilated_core._triton._driving import Config, Pass, Sizes, Tiling
from dilated_core._triton._pattern_plans import PatternTiling
from dilated_core._triton._plan import TilePlan, raw_stream
from dilated_core._triton._support import on_device
from dilated_core._triton._triton_internals import Launch

Gradients = tuple[Tensor, Tensor, Tensor]
_Strides = tuple[int, int, int, int]
_MOST_LAUNCHES = 1024
# Bytes of gradients: above them the GPU takes longer than the host to allocate each alone.
_ONE_ALLOCATION = 32 * 2**20


class KernelCall:
    """What the passes of one call have in common."""

    def __init__(
        self, scores: Scores, tiling: Tiling, query: Tensor, key: Tensor, value: Tensor,
        cu_seqlens: Tensor | None = None, first_key: int = 0,
    ) -> None:  # fmt: skip
        self.scores, self.tiling, self.cu_seqlens = scores, tiling, cu_seqlens
        mask = scores.key_padding_mask
        self.padding = mask if mask is None else _flat(mask).view(torch.uint8)
        self.query, self.key, self.value = _flat(query), _flat(key), _flat(value)
        self.first_key = first_key
        self._device = query.get_device()
        absent = cu_seqlens is None and mask is None and scores.seed is None
        self._others: tuple[Tensor | None, ...]
        self._others = () if absent else (cu_seqlens, self.padding, scores.seed)
        cache = tiling.cache()
        self._launches, name = ({}, None) if cache is None else (cache[0].launches, cache[1])
        # With what a pass has alone, all that a launch depends on but addresses.
        self._facts = (
            name, self._device, query.dtype, query.shape, key.shape, self.query.stride(),
            self.key.stride(), self.value.stride(), self.mask_stride, first_key, scores.is_causal,
            scores.scale, scores.dropout_p,
        )  # fmt: skip

    @property
    def mask_stride(self) -> int:
        """The stride of the padding mask's batch; -1 if there is none."""
        return -1 if self.padding is None else self.padding.stride(0)

    @property
    def sizes(self) -> Sizes:
        """What plans may depend on."""
        _, length, heads, _ = self.query.shape
        _, key_length, kv_heads, _ = self.key.shape
        last_rows = self.cu_seqlens is None and self.scores.is_causal
        first_query = self.first_key + (key_length - length if last_rows else 0)
        return Sizes(
            length, key_length, heads, kv_heads, first_query, self.first_key,
            self.scores.is_causal, self.query.device,
        )  # fmt: skip

    def launch(
        self, which: Pass, tensors: list[Tensor], facts: tuple[object, ...], grad_lse: bool = False
    ) -> None:
        """Launch the kernel of a pass.

        Args:
            which: the pass.
            tensors: its tensors, before those of the tables.
            facts: what its launch depends on, beside what the passes share.
            grad_lse: whether there is a gradient to lse; `facts` tell it, too.
        """
        known = which, self._facts, facts
        made = self._launches.get(known)
        stream, captured = 0, False
        if self._device >= 0:
            stream = raw_stream(self._device)
            captured = torch.cuda.is_current_stream_capturing()
        if made is None or captured or made.stream != stream:
            sizes, query = self.sizes, self.query
            pair = pair_of(which, query.shape[-1], query.dtype)
            chosen = self.tiling.choose(which, sizes, pair)
            plan = self.tiling.plan(sizes, which == "key", chosen.blocks)
            made = self._launches.get(known)  # cleared if the plan was built
            if made is None:
                if len(self._launches) >= _MOST_LAUNCHES:
                    self._launches.clear()
                made = self._launches[known] = self._launch(which, chosen, plan, tensors, grad_lse)
        made(stream, tensors, self._others)

    def _launch(
        self, which: Pass, chosen: Config, plan: TilePlan, tensors: list[Tensor], grad_lse: bool
    ) -> Launch:  # fmt: skip
        scores, slots, sizes = self.scores, plan.tiles.shape[1], self.sizes
        batch, _, _, head_dim = self.query.shape
        heads = sizes.kv_heads if which == "key" else sizes.heads
        drop = min(_dropout.threshold(scores.dropout_p), 2**32 - 1)
        scale = [abs(scores.scale) * math.log2(math.e)]
        strides = [tensors[at].stride()[:-1] for at in _STRIDED[which]]
        # Those that hold the columns.
        first, second = strides[1][1], strides[2][1]
        if which == "key":
            first, second = strides[0][1], strides[4][1]
        if which != "forward":
            scale.append(scores.scale)
        if which == "query":
            strides.append(tensors[6].transpose(1, 2).stride())  # of the gradient to lse
        numbers = [
            *(x for each in strides for x in each), max(self.mask_stride, 0), *scale, drop,
            1.0 / (1.0 - scores.dropout_p), slots, plan.early, sizes.first_query, sizes.first_key,
        ]  # fmt: skip
        width, tail = head_dim_blocks(which, head_dim)
        constants = {
            "HEADS": heads, "GROUP": sizes.heads // sizes.kv_heads, "D": head_dim,
            "BLOCK_D": width, "TAIL": tail, **self._own_constants(which, grad_lse),
            "MASK": plan.mask, "EARLY": plan.early > 0, "BLOCK_ROWS": chosen.rows,
            "FULL_COLUMNS": chosen.columns, "MASKED_COLUMNS": chosen.blocks.masked,
            "CAUSAL": scores.is_causal, "PADDED": self.padding is not None,
            "DROPOUT": scores.dropout_p > 0, "PACKED": self.cu_seqlens is not None,
            "NEGATIVE": scores.scale < 0,
            "WIDE": plan.largest_step * chosen.columns * max(first, second) >= 2**31,
            "ALIKE": first == second, "IEEE": self.query.dtype == torch.float32,
        }  # fmt: skip
        options = {
            "num_warps": chosen.warps, "num_stages": chosen.stages, "maxnreg": chosen.registers,
        }  # fmt: skip
        grid = slots * heads * batch
        return Launch(_KERNELS[which], grid, plan, numbers, constants, options)

    def _own_constants(self, which: Pass, grad_lse: bool) -> dict[str, Any]:
        """The compile-time arguments that a pass has alone."""
        if which == "key":
            return {}
        if which == "query":
            return {"GRAD_LSE": grad_lse}
        width, tail = value_blocks(self.query.shape[-1])
        return {"VALUE_D": width, "VALUE_TAIL": tail}


_KERNELS: dict[Pass, Any] = {
    "forward": _kernels.forward_kernel,
    "query": _kernels.query_gradient_kernel,
    "key": _kernels.key_gradient_kernel,
}
# By pass, the places of the tensors whose strides a kernel takes, in the order in which it does.
_STRIDED: dict[Pass, tuple[int, ...]] = {
    "forward": (0, 1, 2, 3, 4),
    "query": (0, 1, 2, 3, 5, 4),
    "key": (0, 1, 2, 4, 3, 6),
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


@remembered(256)
def _dense(length: int) -> Branches:
    return Branches([length], [1])


def forward(call: KernelCall, *, wide: bool = False) -> Partial:
    """Compute out (B, N, H, D) in query's dtype or, if `wide`, in float32, like lse (B, H, N)."""
    query = call.query
    # Kernels are launched on the current device, so make it the tensors' one.
    with on_device(query):
        out, lse = (empty_wide if wide else empty_like)(query), empty_lse(query)
        if query.numel():
            call.launch("forward", [query, call.key, call.value, out, lse], (wide,))
    return Partial(out, lse)


def backward(call: KernelCall, upstream: Upstream, *, wide: bool = False) -> Gradients:
    """Gradients to query, key and value, in their dtype or, if `wide`, in float32."""
    query, key = call.query, call.key
    with on_device(query):
        dq, dk, dv, terms = empty_grads(query, key, upstream.total.lse, wide)
        if not query.numel() or not key.numel():
            return dq.zero_(), dk.zero_(), dv.zero_()
        grad_out = _flat(upstream.grad_out)
        query_gradient(call, grad_out, upstream.grad_lse, upstream.total, terms, dq)
        key_gradients(call, grad_out, terms, dk, dv)
    return dq, dk, dv


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
    facts = (
        grad_query.dtype, out.dtype, out.stride(), lse.dtype, lse.stride(), grad_out.dtype,
        grad_out.stride(), None if grad_lse is None else (grad_lse.dtype, grad_lse.stride()),
    )  # fmt: skip
    given = lse if grad_lse is None else grad_lse
    tensors = [call.query, call.key, call.value, out, lse, grad_out, given, grad_query, terms]
    call.launch("query", tensors, facts, grad_lse is not None)


def key_gradients(
    call: KernelCall, grad_out: Tensor, terms: Tensor, grad_key: Tensor, grad_value: Tensor
) -> None:
    """Fill grad_key and grad_value."""
    facts = grad_key.dtype, grad_key.stride(), grad_out.dtype, grad_out.stride(), terms.stride()
    tensors = [call.query, call.key, call.value, grad_out, grad_key, grad_value, terms]
    call.launch("key", tensors, facts)


def empty_like(x: Tensor) -> Tensor:
    """Uninitialized and contiguous."""
    return x.new_empty(x.shape)


def empty_wide(x: Tensor) -> Tensor:
    """Uninitialized, contiguous and in float32."""
    return x.new_empty(x.shape, dtype=torch.float32)


def empty_lse(query: Tensor) -> Tensor:
    """An uninitialized lse (B, H, N)."""
    batch, length, heads, _ = query.shape
    return query.new_empty((batch, heads, length), dtype=torch.float32)


def empty_grads(
    query: Tensor, key: Tensor, lse: Tensor, wide: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialized gradients to query, key and value, contiguous, and terms, laid out as lse.

    Small ones are of one allocation, because in torch's thread for backwards each takes the host
    longer than a launch. So one of them that is kept keeps all.
    """
    dtype = torch.float32 if wide else query.dtype
    rooms = _rooms(query.shape, key.shape, dtype)
    if rooms is None or not lse.is_contiguous():
        make = empty_wide if wide else empty_like
        return make(query), make(key), make(key), torch.empty_like(lse, dtype=torch.int64)
    words, strides, key_strides, starts = rooms
    whole = query.new_empty(words, dtype=torch.int64)
    with _torch_internals.unrelated_views():
        grads = whole.view(dtype)
        return (
            grads.as_strided(query.shape, strides, starts[0]),
            grads.as_strided(key.shape, key_strides, starts[1]),
            grads.as_strided(key.shape, key_strides, starts[2]),
            whole.as_strided(lse.shape, lse.stride(), 0),
        )


@remembered(1024)
def _rooms(
    shape: tuple[int, ...], key_shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[int, _Strides, _Strides, tuple[int, int, int]] | None:
    """How gradients lie behind the terms; None if they take more than `_ONE_ALLOCATION`.

    Returns:
        The int64 elements of all; the strides of the gradient to query, and of those to key and
        value; where each of the three starts, in its own elements.
    """
    batch, length, heads, _ = shape
    grad, key_grad = (_padded(math.prod(x) * dtype.itemsize) for x in (shape, key_shape))
    terms = _padded(batch * heads * length * 8)
    if grad + 2 * key_grad > _ONE_ALLOCATION:
        return None
    first, second, third = (
        x // dtype.itemsize for x in (terms, terms + grad, terms + grad + key_grad)
    )
    strides, key_strides = (
        (rows * heads * dim, heads * dim, dim, 1) for _, rows, heads, dim in (shape, key_shape)
    )
    words = (terms + grad + 2 * key_grad) // 8
    return words, strides, key_strides, (first, second, third)


def _padded(size: int) -> int:
    """At least so many bytes, so that what follows starts with a line of the GPU's cache."""
    return -(-size // 128) * 128


def _flat(x: Tensor) -> Tensor:
    """The kernels read rows of unit stride; anything else is copied."""
    return x if x.stride(-1) == 1 else x.contiguous()
