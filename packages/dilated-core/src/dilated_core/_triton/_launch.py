"""Launching the kernels: block sizes, plans, outputs.

B batch, N queries, M keys, H query heads, H_kv key heads, D head_dim.
"""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_core import _dropout
from dilated_core._inputs import Options
from dilated_core._partial import Partial
from dilated_core._pattern import DilatedPattern
from dilated_core.triton_kernels import _kernels
from dilated_core.triton_kernels._driving import Config, Pair, Pass, Schedule, Scores, Sizes
from dilated_core.triton_kernels._plan import Blocks, Plan, Request, packed_plan, plan
from dilated_core.triton_kernels._strips import Shape, work


def _same(config: Config) -> Pair:
    """Tiles of one height for everything."""
    return Pair(config, config)


_FORWARD_64 = Pair(Config(128, 64, 4, 4, 32), Config(64, 64, 4, 3, 32, 128), 0.95)
_KEY_64 = Pair(Config(64, 64, 4, 3), Config(64, 64, 4, 2, 64), 0.95)
# By pass and the width of the blocks that hold head_dim, for 16-bit inputs; measured on an H200,
# see benchmarks/NOTES.md.
_HALF: dict[Pass, dict[int, Pair]] = {
    "forward": {
        64: _FORWARD_64,
        80: Pair(Config(128, 64, 4, 3, 64), Config(64, 64, 4, 3, 64), 0.92),
        96: _same(Config(128, 64, 4, 3, 64)),
        128: Pair(Config(128, 64, 4, 2, 64), Config(64, 64, 4, 3, 64), 0.975),
        192: _same(Config(128, 64, 8, 3)),
        256: _same(Config(128, 32, 8, 3)),
    },
    "query": {
        32: _same(Config(64, 64, 4, 3)),
        48: Pair(Config(128, 64, 8, 4), Config(64, 64, 4, 3), 0.99),
        64: Pair(Config(128, 64, 8, 3), Config(64, 64, 4, 3), 0.99),
        96: _same(Config(64, 64, 4, 2)),
        128: Pair(Config(128, 64, 8, 4), Config(64, 64, 4, 2, 64), 0.975),
        192: Pair(Config(128, 32, 8, 3), Config(64, 32, 4, 2)),
        256: _same(Config(128, 32, 8, 2)),
    },
    "key": {
        32: _KEY_64,
        48: Pair(Config(64, 64, 4, 3, 32, 168), Config(64, 64, 4, 2, 64, 168)),
        64: _KEY_64,
        96: _same(Config(64, 64, 4, 3)),
        128: _same(Config(64, 64, 4, 2)),
        192: _same(Config(64, 32, 4, 2)),
        256: _same(Config(64, 32, 8, 2, 16)),
    },
}
# float32 products are exact, so they run on the ordinary units and want small tiles.
_SINGLE: dict[int, Pair] = {
    32: _same(Config(64, 32, 8, 1)),
    64: _same(Config(32, 32, 8, 1)),
    128: _same(Config(32, 16, 8, 1)),
    256: _same(Config(16, 16, 8, 1)),
}
# Block sizes to use instead, for tests and measurements.
overrides: dict[Pass, Config] = {}


@lru_cache(maxsize=1024)
def head_dim_blocks(which: Pass, head_dim: int) -> tuple[int, int]:
    """The widths of one block, or two, that hold a head_dim.

    Two where they pad less, and in the forward always from 65 to 128, by measurement.
    """
    padded = _power_of_two(head_dim)
    width = padded // 2
    tail = _power_of_two(head_dim - width)
    two = width + tail < padded or (which == "forward" and padded == 128)
    return (width, tail) if two else (padded, 0)


def _value_blocks(head_dim: int) -> tuple[int, int]:
    """The same for the values in the forward: up to 64 one block is faster than to pad less."""
    padded = _power_of_two(head_dim)
    return (padded, 0) if padded <= 64 else head_dim_blocks("forward", head_dim)


def _power_of_two(head_dim: int) -> int:
    """The smallest width of a block that holds these dims."""
    return max(16, 1 << (head_dim - 1).bit_length())


def config(which: Pass, schedule: Schedule, sizes: Sizes, query: Tensor) -> Config:
    """The block sizes for these inputs; they do not depend on the length."""
    if which in overrides:
        return overrides[which]
    return schedule.choose(which, sizes, _pair(which, query.shape[-1], query.dtype))


@lru_cache(maxsize=1024)
def _pair(which: Pass, head_dim: int, dtype: torch.dtype) -> Pair:
    table = _SINGLE if dtype == torch.float32 else _HALF[which]
    width = sum(head_dim_blocks(which, head_dim))
    return table[min(size for size in table if size >= width)]


@lru_cache(maxsize=1024)
def _by_work(pair: Pair, pattern: DilatedPattern, heads: int) -> Config:
    tall, short = (
        work(pattern, heads, Shape(c.rows, c.columns, is_causal=False))
        for c in (pair.tall, pair.short)
    )
    return pair.short if short < pair.gain * tall else pair.tall


class PatternSchedule(NamedTuple):
    """The plans of a dilated pattern, for equal sequences or for packed ones."""

    pattern: DilatedPattern
    cu_seqlens: Tensor | None

    def choose(self, which: Pass, sizes: Sizes, pair: Pair) -> Config:
        """Short tiles where they are the quicker ones."""
        return pair.short if sizes.is_causal else _by_work(pair, self.pattern, sizes.heads)

    def plan(self, sizes: Sizes, by_key: bool, blocks: Blocks) -> Plan:
        """The plan over query tiles, or over key tiles."""
        queries = (sizes.first_query, sizes.first_query + sizes.length)
        keys = (sizes.first_key, sizes.first_key + sizes.key_length)
        request = Request(
            self.pattern, sizes.heads, sizes.kv_heads if by_key else sizes.heads, by_key,
            keys if by_key else queries, queries if by_key else keys, sizes.is_causal, blocks,
        )  # fmt: skip
        if self.cu_seqlens is None:
            return plan(_canonical(request), sizes.device)
        return packed_plan(request, self.cu_seqlens)


class Call:
    """What the passes of one call have in common."""

    def __init__(
        self, options: Scores, schedule: Schedule, query: Tensor, key: Tensor, value: Tensor,
        cu_seqlens: Tensor | None = None, first_key: int = 0,
    ) -> None:  # fmt: skip
        self.options, self.schedule, self.cu_seqlens = options, schedule, cu_seqlens
        self.padding = _flat(options.key_padding_mask)
        self.query, self.key, self.value = map(_unit_stride, (query, key, value))
        self.batch, length, self.heads, self.head_dim = query.shape
        key_length, self.kv_heads = key.shape[1], key.shape[2]
        last_rows = cu_seqlens is None and options.is_causal
        self.sizes = Sizes(
            length, key_length, self.heads, self.kv_heads,
            first_key + (key_length - length if last_rows else 0), first_key, options.is_causal,
            query.device,
        )  # fmt: skip

    def config(self, which: Pass) -> Config:
        """The block sizes of a pass."""
        return config(which, self.schedule, self.sizes, self.query)

    def plan(self, by_key: bool, chosen: Config) -> Plan:
        """The plan over query tiles, or over key tiles."""
        return self.schedule.plan(self.sizes, by_key, chosen.blocks)

    def grid(self, tables: Plan, heads: int) -> tuple[int]:
        """One program for each tile, head and batch row."""
        return (tables.tiles.shape[1] * heads * self.batch,)

    def tables(self, tables: Plan) -> list[Tensor]:
        """The arguments from `tiles` to `seed`; absent ones are any pointer."""
        mask, options = self.padding, self.options
        return [
            *tables.tensors(),
            tables.tiles if self.cu_seqlens is None else self.cu_seqlens,
            tables.tiles if mask is None else mask.view(torch.uint8),
            tables.tiles if options.seed is None else options.seed,
        ]

    def scalars(self, tables: Plan, *final: float) -> list[float]:
        """The arguments from `scale` to `first_key`."""
        options = self.options
        drop = min(_dropout.threshold(options.dropout_p), 2**32 - 1)
        return [
            abs(options.scale) * math.log2(math.e), *final, drop,
            1.0 / (1.0 - options.dropout_p), tables.tiles.shape[1], tables.early,
            self.sizes.first_query, self.sizes.first_key,
        ]  # fmt: skip

    def constants(
        self, which: Pass, tables: Plan, chosen: Config, heads: int, first: Tensor, second: Tensor
    ) -> dict[str, Any]:
        """Compile-time arguments and launch options; `first` and `second` hold the columns."""
        farthest = tables.largest_step * chosen.columns * max(first.stride(1), second.stride(1))
        width, tail = head_dim_blocks(which, self.head_dim)
        return {
            "HEADS": heads, "GROUP": self.heads // self.kv_heads, "MASK": tables.mask,
            "EARLY": tables.early > 0,
            "D": self.head_dim, "BLOCK_D": width, "TAIL": tail,
            "BLOCK_ROWS": chosen.rows, "FULL_COLUMNS": chosen.columns,
            "MASKED_COLUMNS": chosen.blocks.masked,
            "CAUSAL": self.options.is_causal, "PADDED": self.padding is not None,
            "DROPOUT": self.options.dropout_p > 0, "PACKED": self.cu_seqlens is not None,
            "NEGATIVE": self.options.scale < 0, "WIDE": farthest >= 2**31,
            "ALIKE": first.stride(1) == second.stride(1), "IEEE": self.query.dtype == torch.float32,
            "num_warps": chosen.warps, "num_stages": chosen.stages, "maxnreg": chosen.registers,
        }  # fmt: skip

    @property
    def mask_stride(self) -> int:
        """The stride of the padding mask's batch."""
        return 0 if self.padding is None else self.padding.stride(0)


def _canonical(request: Request) -> Request:
    """One request for plans that are alike, so that they share a cache entry."""
    alike = request.heads == request.kv_heads and not request.is_causal
    if request.by_key and alike and not request.pattern.count_padding:
        return request._replace(by_key=False)
    return request


def forward(
    options: Options, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None
) -> Partial:
    """Dilated attention: out (B, N, H, D) in query's dtype and lse (B, H, N) in float32."""
    return run_forward(pattern_call(options, query, key, value, cu_seqlens))


def backward(
    options: Options,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    total: Partial,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of dilated attention to query, key and value, in their dtype."""
    call = pattern_call(options, query, key, value, cu_seqlens)
    return run_backward(call, grad_out, grad_lse, total)


def pattern_call(
    options: Options,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor | None = None,
    first_key: int = 0,
) -> Call:
    """A call of dilated attention; the keys start at position `first_key` of their sequence."""
    schedule = PatternSchedule(options.pattern, cu_seqlens)
    return Call(options, schedule, query, key, value, cu_seqlens, first_key)


def rows_call(
    scale: float, is_causal: bool, key_mask: Tensor | None, query: Tensor, key: Tensor,
    value: Tensor,
) -> Call:  # fmt: skip
    """A call in which every query sees every key or, when causal, those at and before it."""
    pattern = DilatedPattern([max(query.shape[1], key.shape[1], 1)], [1])
    return pattern_call(Options(pattern, is_causal, scale, key_mask), query, key, value)


def run_forward(call: Call, *, wide: bool = False) -> Partial:
    """Compute out (B, N, H, D) in query's dtype or, if `wide`, in float32, like lse (B, H, N)."""
    query, key, value = call.query, call.key, call.value
    out, lse = (empty_wide if wide else empty_like)(query), empty_lse(query)
    if not query.numel():
        return Partial(out, lse)
    chosen = call.config("forward")
    tables = call.plan(False, chosen)
    value_width, value_tail = _value_blocks(query.shape[-1])
    # A padding mask may hide the keys that shifts are taken from, and weights that are relative to
    # any other score than the greatest do not fit in float16.
    optimistic = call.padding is None and query.dtype != torch.float16
    _kernels.forward_kernel[call.grid(tables, call.heads)](
        query, key, value, out, lse, *call.tables(tables),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        *lse.stride()[:2], call.mask_stride, *call.scalars(tables),
        **call.constants("forward", tables, chosen, call.heads, key, value),
        OPTIMISTIC=optimistic, VALUE_D=value_width, VALUE_TAIL=value_tail,
    )  # fmt: skip
    return Partial(out, lse)


def run_backward(
    call: Call, grad_out: Tensor, grad_lse: Tensor | None, total: Partial, *, wide: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value, in their dtype or, if `wide`, in float32."""
    make = empty_wide if wide else empty_like
    grads = make(call.query), make(call.key), make(call.value)
    if not call.query.numel() or not call.key.numel():
        for grad in grads:
            grad.zero_()
        return grads
    grad_out = _unit_stride(grad_out)
    terms = torch.empty_like(total.lse, dtype=torch.int64)
    query_gradient(call, grad_out, grad_lse, total, terms, grads[0])
    key_gradients(call, grad_out, terms, grads[1], grads[2])
    return grads


def query_gradient(
    call: Call,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    total: Partial,
    terms: Tensor,
    grad_query: Tensor,
) -> None:
    """Fill grad_query, and terms (B, H, N) int64, which the gradients to keys need."""
    query, key, value = call.query, call.key, call.value
    out, lse = total
    chosen = call.config("query")
    tables = call.plan(False, chosen)
    seen = lse if grad_lse is None else grad_lse
    _kernels.query_gradient_kernel[call.grid(tables, call.heads)](
        query, key, value, out, lse, grad_out, seen, grad_query, terms, *call.tables(tables),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        *grad_out.stride()[:3], *lse.stride()[:2], seen.stride(0), seen.stride(2), seen.stride(1),
        call.mask_stride, *call.scalars(tables, call.options.scale),
        **call.constants("query", tables, chosen, call.heads, key, value),
        GRAD_LSE=grad_lse is not None,
    )  # fmt: skip


def key_gradients(
    call: Call, grad_out: Tensor, terms: Tensor, grad_key: Tensor, grad_value: Tensor
) -> None:
    """Fill grad_key and grad_value."""
    query, key, value = call.query, call.key, call.value
    chosen = call.config("key")
    tables = call.plan(True, chosen)
    _kernels.key_gradient_kernel[call.grid(tables, call.kv_heads)](
        query, key, value, grad_out, grad_key, grad_value, terms, *call.tables(tables),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_key.stride()[:3],
        *grad_out.stride()[:3], *terms.stride()[:2], call.mask_stride,
        *call.scalars(tables, call.options.scale),
        **call.constants("key", tables, chosen, call.kv_heads, query, grad_out),
    )  # fmt: skip


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


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels read rows of unit stride; anything else is copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _flat(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.stride(-1) == 1 else mask.contiguous()
