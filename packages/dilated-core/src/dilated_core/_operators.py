"""Backends of dilated attention as custom operators.

Shapes: query (B, N, H, D), key and value (B, M, H_kv, D), lse (B, H, N).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from dilated_core import _custom_op
from dilated_core._inputs import Options
from dilated_core._partial import Partial
from dilated_core._pattern import DilatedPattern

Forward = Callable[[Options, Tensor, Tensor, Tensor, Tensor | None], Partial]
# (options, grad_out, grad_lse, query, key, value, total, cu_seqlens) -> (dq, dk, dv)
Backward = Callable[
    [Options, Tensor, Tensor | None, Tensor, Tensor, Tensor, Partial, Tensor | None],
    tuple[Tensor, Tensor, Tensor],
]


class _Call(NamedTuple):
    options: Options
    cu_seqlens: Tensor | None


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
    operators = _custom_op.define(
        f"dilated_core::{name}",
        _FORM,
        lambda call, q, k, v: forward(call.options, q, k, v, call.cu_seqlens),
        lambda call, do, dl, q, k, v, total: backward(
            call.options, do, dl, q, k, v, total, call.cu_seqlens
        ),
        empty_lse,
    )

    def attend(
        options: Options, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None
    ) -> Partial:
        return operators.attend(_Call(options, cu_seqlens), query, key, value)

    return Operators(attend, operators.forward, operators.backward)


def _pack(call: _Call) -> tuple[Any, ...]:
    options, cu_seqlens = call
    return (
        options.key_padding_mask, options.seed, cu_seqlens,
        options.pattern.code, options.is_causal, options.scale, options.dropout_p,
    )  # fmt: skip


def _unpack(
    _query: Tensor,
    _key: Tensor,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    cu_seqlens: Tensor | None,
    pattern: str,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> _Call:
    dilated = DilatedPattern.from_code(pattern)
    options = Options(dilated, is_causal, scale, key_padding_mask, dropout_p, seed)
    return _Call(options, cu_seqlens)


_FORM = _custom_op.Form(
    "Tensor? key_padding_mask, Tensor? seed, Tensor? cu_seqlens, str pattern, bool is_causal, "
    "float scale, float dropout_p",
    _pack,
    _unpack,
)
