"""An attention function as two custom operators, so that torch.compile sees one node each.

A backend is a forward and a backward over raw tensors and a call: all that is asked beside them.
Shapes: query (B, N, H, D), key and value (B, M, H_kv, D), lse (B, H, N).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import maybe_current_level
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from dilated_core._partial import Partial

Call = TypeVar("Call")
_NOTHING = nullcontext()


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
    inputs = "Tensor query, Tensor key, Tensor value"

    def run_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        with _without_autocast(query):
            out, lse = forward(form.unpack(query, key, *rest), query, key, value)
        return out, lse

    def run_backward(
        grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
        out: Tensor, lse: Tensor, *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        call, total = form.unpack(query, key, *rest), Partial(out, lse)
        with _without_autocast(query):
            return backward(call, grad_out, grad_lse, query, key, value, total)

    def fake_forward(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return _empty(query), empty_lse(query)

    def fake_backward(
        _grad_out: Tensor, _grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
        *_: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        return _empty(query), _empty(key), _empty(value)

    forward_op = _register(
        f"{name}_forward", f"({inputs}, {form.schema}) -> (Tensor, Tensor)",
        run_forward, fake_forward,
    )  # fmt: skip
    backward_op = _register(
        f"{name}_backward",
        f"(Tensor grad_out, Tensor? grad_lse, {inputs}, Tensor out, Tensor lse, {form.schema})"
        " -> (Tensor, Tensor, Tensor)",
        run_backward, fake_backward,
    )  # fmt: skip
    tensors = 3 + form.schema.count("Tensor")
    namespace, short = forward_op.name().split("::")
    differentiable = _differentiable(forward_op, backward_op, tensors)
    _library(namespace).impl(short, _disable_dynamo(differentiable), "Autograd")

    def backward_of_direct(grad_out: Tensor, grad_lse: Tensor | None, *rest: Any) -> Any:
        given = (grad_out,) if grad_lse is None else (grad_out, grad_lse)
        return (run_backward if _is_eager(*given) else backward_op)(grad_out, grad_lse, *rest)

    direct = _differentiable(run_forward, backward_of_direct, tensors)

    def attend(call: Call, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        compute = direct if _is_eager(query, key, value) else forward_op
        return Partial(*compute(query, key, value, *form.pack(call)))

    return Operators(attend, forward_op, backward_op)


def _register(
    name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    """Make an operator of a function, for all devices."""
    namespace, short = name.split("::")
    library = _library(namespace)
    library.define(short + schema, tags=torch.Tag.pt2_compliant_tag)
    library.impl(short, _disable_dynamo(function), "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=library)
    return getattr(getattr(torch.ops, namespace), short).default


def _differentiable(forward: Any, backward: Any, tensors: int) -> Callable[..., Any]:
    """A forward with gradients by a backward; `tensors` of its arguments are or may be some.

    As `torch.library.register_autograd` would, without its conversions of a schema in each call,
    which take as long as all else on the host.
    """

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
            with torch._C._AutoDispatchBelowAutograd():
                out, lse = forward(*inputs)
            ctx.save_for_backward(*inputs[:3], out, lse, *inputs[3:tensors])
            ctx.rest = inputs[tensors:]
            ctx.set_materialize_grads(False)
            return out, lse

        @staticmethod
        @once_differentiable
        @_disable_dynamo  # which sees it where only a part of a step is compiled
        def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
            query, *saved = ctx.saved_tensors
            if grad_out is None:
                grad_out = torch.zeros_like(query)
            grads = backward(grad_out, grad_lse, query, *saved, *ctx.rest)
            return (*grads, *(None for _ in range(tensors - 3 + len(ctx.rest))))

    apply: Callable[..., tuple[Tensor, Tensor]] = Attend.apply

    def differentiable(*inputs: Any) -> tuple[Tensor, Tensor]:
        wants_grads = torch.is_grad_enabled() and any(x.requires_grad for x in inputs[:3])
        if wants_grads or forward_ad._current_level >= 0:  # where tangents are refused
            return apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = forward(*inputs)
        return out, lse

    return differentiable


def _is_eager(*inputs: Tensor) -> bool:
    """Whether nothing but autograd takes part in a call, so that it need not be an operator.

    Through torch's dispatcher a forward takes the host longer by about a half.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or _len_torch_dispatch_stack()
        or maybe_current_level() is not None
        or any(type(x) not in (Tensor, Parameter) or x.is_meta or x.is_neg() for x in inputs)
    )


@cache
def _library(namespace: str) -> torch.library.Library:
    """Where operators are registered; they live as long as it."""
    return torch.library.Library(namespace, "FRAGMENT")


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """It stays on inside an operator and would lower the products of a wide accumulator."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
