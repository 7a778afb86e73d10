"""Backends as custom operators, so that torch.compile sees one node for a pass.

A backend is a forward and a backward over raw tensors; `define` turns the pair into a function with
exact gradients. Shapes: query (B, N, H, D), key and value (B, M, H_kv, D), lse (B, H, N).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_core.extending import Partial
from dilated_sparse import _torch_backend, _triton_backend
from dilated_sparse._layout import BlockLayout
from dilated_sparse._options import Options

Forward = Callable[[Options, Tensor, Tensor, Tensor], Partial]
# (options, grad_out, grad_lse, query, key, value, total) -> (dq, dk, dv)
Backward = Callable[
    [Options, Tensor, Tensor | None, Tensor, Tensor, Tensor, Partial],
    tuple[Tensor, Tensor, Tensor],
]
# The padding mask, the seed and the layout's tensors: what an operator keeps for its backward.
_TENSORS = 7


class Operators(NamedTuple):
    """A backend: `attend(options, query, key, value)`, and the operators behind it."""

    attend: Forward
    forward: Any
    backward: Any


def define(
    name: str, forward: Forward, backward: Backward, empty_lse: Callable[[Tensor], Tensor]
) -> Operators:
    """Register the operators `dilated_sparse::{name}_forward` and `_backward`.

    Args:
        name: the backend's name.
        forward: computes out in query's dtype and lse.
        backward: computes the gradients in query's dtype.
        empty_lse: makes an lse for a query, uninitialised, laid out as forward's.
    """

    @torch.library.custom_op(f"dilated_sparse::{name}_forward", mutates_args=())
    def forward_op(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        seed: Tensor | None,
        run_offsets: Tensor,
        run_columns: Tensor,
        run_counts: Tensor,
        run_masks: Tensor,
        table: Tensor,
        block_size: int,
        layout_heads: int,
        is_causal: bool,
        scale: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:
        layout = BlockLayout(
            query.shape[1], key.shape[1], block_size, layout_heads,
            run_offsets, run_columns, run_counts, run_masks, table,
        )  # fmt: skip
        options = Options(layout, is_causal, scale, key_padding_mask, dropout_p, seed)
        # Autocast stays on inside an operator and would lower the products of a wide accumulator.
        with torch.autocast(query.device.type, enabled=False):
            out, lse = forward(options, query, key, value)
        return out, lse

    @torch.library.custom_op(f"dilated_sparse::{name}_backward", mutates_args=())
    def backward_op(
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        key_padding_mask: Tensor | None,
        seed: Tensor | None,
        run_offsets: Tensor,
        run_columns: Tensor,
        run_counts: Tensor,
        run_masks: Tensor,
        table: Tensor,
        block_size: int,
        layout_heads: int,
        is_causal: bool,
        scale: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        layout = BlockLayout(
            query.shape[1], key.shape[1], block_size, layout_heads,
            run_offsets, run_columns, run_counts, run_masks, table,
        )  # fmt: skip
        options = Options(layout, is_causal, scale, key_padding_mask, dropout_p, seed)
        total = Partial(out, lse)
        with torch.autocast(query.device.type, enabled=False):
            return backward(options, grad_out, grad_lse, query, key, value, total)

    @forward_op.register_fake
    def _(query: Tensor, *_args: Any) -> tuple[Tensor, Tensor]:
        return _empty(query), empty_lse(query)

    @backward_op.register_fake
    def _(
        grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
        *_args: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return _empty(query), _empty(key), _empty(value)

    def gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        query, *saved = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(query)
        grads = backward_op(grad_out, grad_lse, query, *saved, *ctx.rest)
        return (*grads, *(None for _ in range(_TENSORS)), *(None for _ in ctx.rest))

    forward_op.register_autograd(gradients, setup_context=_save)

    def attend(options: Options, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        layout = options.layout
        out, lse = forward_op(
            query, key, value, options.key_padding_mask, options.seed, layout.run_offsets,
            layout.run_columns, layout.run_counts, layout.run_masks, layout.table,
            layout.block_size, layout.heads, options.is_causal, options.scale, options.dropout_p,
        )  # fmt: skip
        return Partial(out, lse)

    return Operators(attend, forward_op, backward_op)


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *rest = inputs
    ctx.save_for_backward(query, key, value, *output, *rest[:_TENSORS])
    ctx.rest = rest[_TENSORS:]
    ctx.set_materialize_grads(False)


TORCH = define("torch", _torch_backend.forward, _torch_backend.backward, _torch_backend.empty_lse)
TRITON = define(
    "triton", _triton_backend.forward, _triton_backend.backward, _torch_backend.empty_lse
)
