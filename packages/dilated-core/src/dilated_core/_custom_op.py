"""An attention function as two custom operators, so that torch.compile sees one node each.

A backend is a forward and a backward over raw tensors and a call: all that is asked beside them.
Shapes: query (B, N, H, D), key and value (B, M, H_kv, D), lse (B, H, N).
"""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from dilated_core._partial import Partial

Call = TypeVar("Call")


class Form(NamedTuple, Generic[Call]):
    """How a call goes through an operator.

    Attributes:
        schema: its arguments there, as torch writes a schema; all tensors come first.
        pack: makes these arguments of a call.
        unpack: makes a call of query, key and these arguments.
    """

    schema: str
    pack: Callable[[Call], tuple[Any, ...]]
    unpack: Callable[..., Call]


class Operators(NamedTuple, Generic[Call]):
    """A backend: `attend(call, query, key, value)`, and the operators behind it."""

    attend: Callable[[Call, Tensor, Tensor, Tensor], Partial]
    forward: Any
    backward: Any


def define(
    name: str,
    form: Form[Call],
    forward: Callable[[Call, Tensor, Tensor, Tensor], Partial],
    backward: Callable[
        [Call, Tensor, Tensor | None, Tensor, Tensor, Tensor, Partial],
        tuple[Tensor, Tensor, Tensor],
    ],
    empty_lse: Callable[[Tensor], Tensor],
) -> Operators[Call]:
    """Register the operators `{name}_forward` and `{name}_backward`, with exact gradients.

    Args:
        name: with the namespace, "package::backend".
        form: how a call goes through.
        forward: computes out in query's dtype and lse.
        backward: from (call, grad_out, grad_lse, query, key, value, total), computes the
            gradients in query's dtype.
        empty_lse: makes an lse for a query, uninitialised, laid out as forward's.
    """
    tensors = form.schema.count("Tensor")
    inputs = "Tensor query, Tensor key, Tensor value"

    def run_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        # Autocast stays on inside an operator and would lower the products of a wide accumulator.
        with torch.autocast(query.device.type, enabled=False):
            out, lse = forward(form.unpack(query, key, *rest), query, key, value)
        return out, lse

    def run_backward(
        grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
        out: Tensor, lse: Tensor, *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        call, total = form.unpack(query, key, *rest), Partial(out, lse)
        with torch.autocast(query.device.type, enabled=False):
            return backward(call, grad_out, grad_lse, query, key, value, total)

    forward_op = torch.library.custom_op(
        f"{name}_forward", run_forward, mutates_args=(),
        schema=f"({inputs}, {form.schema}) -> (Tensor, Tensor)",
    )  # fmt: skip
    backward_op = torch.library.custom_op(
        f"{name}_backward", run_backward, mutates_args=(),
        schema=f"(Tensor grad_out, Tensor? grad_lse, {inputs}, Tensor out, Tensor lse, "
        f"{form.schema}) -> (Tensor, Tensor, Tensor)",
    )  # fmt: skip

    @forward_op.register_fake
    def _(query: Tensor, *_args: Any) -> tuple[Tensor, Tensor]:
        return _empty(query), empty_lse(query)

    @backward_op.register_fake
    def _(
        grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
        *_args: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return _empty(query), _empty(key), _empty(value)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:3], *output, *inputs[3 : 3 + tensors])
        ctx.rest = inputs[3 + tensors :]
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        query, *saved = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(query)
        grads = backward_op(grad_out, grad_lse, query, *saved, *ctx.rest)
        return (*grads, *(None for _ in range(tensors)), *(None for _ in ctx.rest))

    forward_op.register_autograd(gradients, setup_context=save)

    def attend(call: Call, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        return Partial(*forward_op(query, key, value, *form.pack(call)))

    return Operators(attend, forward_op, backward_op)


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
