"""Launching the kernels: block sizes, plans, outputs.

B batch, N queries, M keys, H query heads, H_kv key heads, D head_dim.
"""

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dilated_core import _dropout
from dilated_core._inputs import Options
from dilated_core._partial import Partial
from dilated_core._pattern import DilatedPattern
from dilated_core.triton_kernels import _kernels
from dilated_core.triton_kernels._plan import Blocks, Plan, Request, packed_plan, plan
from dilated_core.triton_kernels._strips import work

Pass = Literal["forward", "query", "key"]


class Config(NamedTuple):
    """Rows of a tile, columns of a step, warps of a program and stages of its pipeline.

    Masked steps take fewer columns, `masked`, because masks need registers.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    masked: int = 32

    @property
    def blocks(self) -> Blocks:
        """What a plan needs of it."""
        return Blocks(self.rows, self.columns, min(self.columns, self.masked))


class Pair(NamedTuple):
    """Tall tiles are faster; short ones waste less on diagonals and on short segments.

    Short tiles are chosen when causal, and where they have less than `gain` of the work.
    """

    tall: Config
    short: Config
    gain: float = 1.0


_FORWARD_64 = Pair(Config(128, 128, 4, 3, 64), Config(64, 64, 4, 3, 64), 0.92)
_QUERY_64 = Pair(Config(64, 64, 4, 2), Config(64, 64, 4, 2))
_KEY_64 = Pair(Config(64, 64, 4, 3), Config(64, 64, 4, 2, 64), 0.95)
# By pass and padded head_dim, for 16-bit inputs; measured on an H200, see benchmarks/NOTES.md.
_HALF: dict[Pass, dict[int, Pair]] = {
    "forward": {
        16: _FORWARD_64,
        32: _FORWARD_64,
        64: _FORWARD_64,
        128: Pair(Config(128, 128, 8, 3, 64), Config(64, 64, 4, 3, 64), 0.99),
        256: Pair(Config(128, 64, 8, 2), Config(128, 32, 8, 3)),
    },
    "query": {
        16: _QUERY_64,
        32: _QUERY_64,
        64: _QUERY_64,
        128: Pair(Config(128, 64, 8, 3), Config(64, 64, 4, 2, 64), 0.93),
        256: Pair(Config(128, 32, 8, 2), Config(128, 32, 8, 2)),
    },
    "key": {
        16: _KEY_64,
        32: _KEY_64,
        64: _KEY_64,
        128: Pair(Config(64, 32, 4, 3), Config(64, 32, 4, 3)),
        256: Pair(Config(64, 32, 8, 2, 16), Config(64, 32, 8, 2, 16)),
    },
}
# float32 products are exact, so they run on the ordinary units and want small tiles.
_SINGLE: dict[int, Config] = {
    16: Config(64, 32, 8, 1),
    32: Config(64, 32, 8, 1),
    64: Config(32, 32, 8, 1),
    128: Config(32, 16, 8, 1),
    256: Config(16, 16, 8, 1),
}
# Block sizes to use instead, for tests and measurements.
overrides: dict[Pass, Config] = {}


def padded_head_dim(head_dim: int) -> int:
    """The power of two that blocks of this head_dim have."""
    return max(16, 1 << (head_dim - 1).bit_length())


def config(which: Pass, options: Options, query: Tensor) -> Config:
    """The block sizes for these inputs; they do not depend on the length."""
    if which in overrides:
        return overrides[which]
    size = padded_head_dim(query.shape[-1])
    if query.dtype == torch.float32:
        return _SINGLE[size]
    pair = _HALF[which][size]
    if options.is_causal:
        return pair.short
    return _by_work(pair, options.pattern, query.shape[2])


@lru_cache(maxsize=1024)
def _by_work(pair: Pair, pattern: DilatedPattern, heads: int) -> Config:
    tall, short = (work(pattern, heads, c.rows, c.columns) for c in (pair.tall, pair.short))
    return pair.short if short < pair.gain * tall else pair.tall


class Call:
    """What the passes of one call have in common."""

    def __init__(
        self, options: Options, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None
    ) -> None:
        self.options, self.cu_seqlens = options, cu_seqlens
        self.query, self.key, self.value = query, key, value
        self.batch, self.length, self.heads, self.head_dim = query.shape
        self.key_length, self.kv_heads = key.shape[1], key.shape[2]
        packed_or_plain = cu_seqlens is None and options.is_causal
        self.first_query = self.key_length - self.length if packed_or_plain else 0

    def plan(self, by_key: bool, chosen: Config) -> Plan:
        """The plan over query tiles, or over key tiles."""
        queries = (self.first_query, self.first_query + self.length)
        keys = (0, self.key_length)
        request = Request(
            self.options.pattern, self.heads, self.kv_heads if by_key else self.heads, by_key,
            keys if by_key else queries, queries if by_key else keys, self.options.is_causal,
            chosen.blocks,
        )  # fmt: skip
        if self.cu_seqlens is None:
            return plan(_canonical(request), self.query.device)
        return packed_plan(request, self.cu_seqlens)

    def grid(self, tables: Plan, heads: int) -> tuple[int]:
        """One program for each tile, head and batch row."""
        return (tables.tiles.shape[1] * heads * self.batch,)

    def tables(self, tables: Plan) -> list[Tensor]:
        """The arguments from `tiles` to `seed`; absent ones are any pointer."""
        mask, options = self.options.key_padding_mask, self.options
        return [
            *tables.tensors(),
            tables.tiles if self.cu_seqlens is None else self.cu_seqlens,
            tables.tiles if mask is None else mask.view(torch.uint8),
            tables.tiles if options.seed is None else options.seed,
        ]

    def scalars(self, tables: Plan, *final: float) -> list[float]:
        """The arguments from `scale` to `first_query`."""
        options = self.options
        drop = min(_dropout.threshold(options.dropout_p), 2**32 - 1)
        return [
            abs(options.scale) * math.log2(math.e), *final, drop,
            1.0 / (1.0 - options.dropout_p), tables.tiles.shape[1],
            self.first_query,
        ]  # fmt: skip

    def constants(
        self, tables: Plan, chosen: Config, heads: int, first: Tensor, second: Tensor
    ) -> dict[str, Any]:
        """Compile-time arguments and launch options; `first` and `second` hold the columns."""
        farthest = tables.largest_step * chosen.columns * max(first.stride(1), second.stride(1))
        return {
            "HEADS": heads, "GROUP": self.heads // self.kv_heads, "MASK": tables.mask,
            "D": self.head_dim,
            "BLOCK_D": padded_head_dim(self.head_dim),
            "BLOCK_ROWS": chosen.rows, "FULL_COLUMNS": chosen.columns,
            "MASKED_COLUMNS": chosen.blocks.masked,
            "CAUSAL": self.options.is_causal, "PADDED": self.options.key_padding_mask is not None,
            "DROPOUT": self.options.dropout_p > 0, "PACKED": self.cu_seqlens is not None,
            "NEGATIVE": self.options.scale < 0, "WIDE": farthest >= 2**31,
            "ALIKE": first.stride(1) == second.stride(1), "IEEE": self.query.dtype == torch.float32,
            "num_warps": chosen.warps, "num_stages": chosen.stages,
        }  # fmt: skip

    @property
    def mask_stride(self) -> int:
        """The stride of the padding mask's batch."""
        mask = self.options.key_padding_mask
        return 0 if mask is None else mask.stride(0)


def _canonical(request: Request) -> Request:
    """One request for plans that are alike, so that they share a cache entry."""
    alike = request.heads == request.kv_heads and not request.is_causal
    if request.by_key and alike and not request.pattern.count_padding:
        return request._replace(by_key=False)
    return request


def forward(
    options: Options, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None
) -> Partial:
    """Compute out (B, N, H, D) in query's dtype and lse (B, H, N) in float32."""
    out, lse = empty_like(query), empty_lse(query)
    if not query.numel():
        return Partial(out, lse)
    query, key, value = map(_unit_stride, (query, key, value))
    call = Call(_with_flat_mask(options), query, key, value, cu_seqlens)
    chosen = config("forward", options, query)
    tables = call.plan(False, chosen)
    _kernels.forward_kernel[call.grid(tables, call.heads)](
        query, key, value, out, lse, *call.tables(tables),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        *lse.stride()[:2], call.mask_stride, *call.scalars(tables),
        **call.constants(tables, chosen, call.heads, key, value),
    )  # fmt: skip
    return Partial(out, lse)


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
    """Gradients to query, key and value, in their dtype."""
    grads = empty_like(query), empty_like(key), empty_like(value)
    if not query.numel() or not key.numel():
        for grad in grads:
            grad.zero_()
        return grads
    query, key, value, grad_out = map(_unit_stride, (query, key, value, grad_out))
    call = Call(_with_flat_mask(options), query, key, value, cu_seqlens)
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
    chosen = config("query", call.options, query)
    tables = call.plan(False, chosen)
    seen = lse if grad_lse is None else grad_lse
    _kernels.query_gradient_kernel[call.grid(tables, call.heads)](
        query, key, value, out, lse, grad_out, seen, grad_query, terms, *call.tables(tables),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        *grad_out.stride()[:3], *lse.stride()[:2], seen.stride(0), seen.stride(2), seen.stride(1),
        call.mask_stride, *call.scalars(tables, call.options.scale),
        **call.constants(tables, chosen, call.heads, key, value), GRAD_LSE=grad_lse is not None,
    )  # fmt: skip


def key_gradients(
    call: Call, grad_out: Tensor, terms: Tensor, grad_key: Tensor, grad_value: Tensor
) -> None:
    """Fill grad_key and grad_value."""
    query, key, value = call.query, call.key, call.value
    chosen = config("key", call.options, query)
    tables = call.plan(True, chosen)
    _kernels.key_gradient_kernel[call.grid(tables, call.kv_heads)](
        query, key, value, grad_out, grad_key, grad_value, terms, *call.tables(tables),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_key.stride()[:3],
        *grad_out.stride()[:3], *terms.stride()[:2], call.mask_stride,
        *call.scalars(tables, call.options.scale),
        **call.constants(tables, chosen, call.kv_heads, query, grad_out),
    )  # fmt: skip


def empty_like(x: Tensor) -> Tensor:
    """Uninitialized and contiguous."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def empty_lse(query: Tensor) -> Tensor:
    """An uninitialized lse (B, H, N)."""
    batch, length, heads, _ = query.shape
    return torch.empty((batch, heads, length), dtype=torch.float32, device=query.device)


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels read rows of unit stride; anything else is copied."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _with_flat_mask(options: Options) -> Options:
    mask = options.key_padding_mask
    if mask is None or mask.stride(-1) == 1:
        return options
    return replace(options, key_padding_mask=mask.contiguous())
