"""A backend as two custom operators, so that torch.compile sees one node each.

A backend is a forward and a backward over raw tensors; `define` turns the pair into a function
with exact gradients. Shapes: query (B, N, H, D), key and value (B, M, H_kv, D), lse (B, H, N).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_core._inputs import Options
from dilated_core._partial import Partial
from dilated_core._pattern import DilatedPattern

Forward = Callable[[Options, Tensor, Tensor, Tensor, Tensor | None], Partial]
# (options, grad_out, grad_lse, query, key, value, total, cu_seqlens) -> (dq, dk, dv)
Backward = Callable[
    [Options, Tensor, Tensor | None, Tensor, Tensor, Tensor, Partial, Tensor | None],
    tuple[Tensor, Tensor, Tensor],
]


class Operators(NamedTuple):
    """A backend: `attend(options, query, key, value, cu_seqlens)`, and the operators behind it.

    With `cu_seqlens` (S + 1,) the batch is 1 and the rows are S sequences, one after the other.
    """

    attend: Forward
    forward: Any
    backward: Any


def define(
    name: str, forward: Forward, backward: Backward, empty_lse: Callable[[Tensor], Tensor]
) -> Operators:
    """Register the operators `dilated_core::{name}_forward` and `_backward`.

    Args:
        name: the backend's name.
        forward: computes out in query's dtype and lse.
        backward: computes the gradients in query's dtype.
        empty_lse: makes an lse for a query, uninitialised, laid out as forward's.
    """

    @torch.library.custom_op(f"dilated_core::{name}_forward", mutates_args=())
    def forward_op(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        seed: Tensor | None,
        cu_seqlens: Tensor | None,
        pattern: str,
        is_causal: bool,
        scale: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:
        options = Options(
            DilatedPattern.from_code(pattern), is_causal, scale, key_padding_mask, dropout_p, seed
        )
        # Autocast stays on inside an operator and would lower the products of a wide accumulator.
        with torch.autocast(query.device.type, enabled=False):
            out, lse = forward(options, query, key, value, cu_seqlens)
        return out, lse

    @torch.library.custom_op(f"dilated_core::{name}_backward", mutates_args=())
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
        cu_seqlens: Tensor | None,
        pattern: str,
        is_causal: bool,
        scale: float,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        options = Options(
            DilatedPattern.from_code(pattern), is_causal, scale, key_padding_mask, dropout_p, seed
        )
        total = Partial(out, lse)
        with torch.autocast(query.device.type, enabled=False):
            return backward(options, grad_out, grad_lse, query, key, value, total, cu_seqlens)

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
        query, key, value, *saved = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(query)
        grads = backward_op(grad_out, grad_lse, query, key, value, *saved, *ctx.rest)
        return (*grads, None, None, None, *(None for _ in ctx.rest))

    forward_op.register_autograd(gradients, setup_context=_save)

    def attend(
        options: Options, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None
    ) -> Partial:
        out, lse = forward_op(
            query, key, value, options.key_padding_mask, options.seed, cu_seqlens,
            options.pattern.code, options.is_causal, options.scale, options.dropout_p,
        )  # fmt: skip
        return Partial(out, lse)

    return Operators(attend, forward_op, backward_op)


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, seed, cu_seqlens, *ctx.rest = inputs
    ctx.save_for_backward(query, key, value, *output, mask, seed, cu_seqlens)
    ctx.set_materialize_grads(False)
