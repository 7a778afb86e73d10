"""An attention function as two custom operators, so that torch.compile sees one node each.

A backend is a forward and a backward over raw tensors and a call: all that is asked beside them.
An eager call goes to it as it is; only one that is traced goes through the operators, for which it
is taken apart into tensors and plain values.
Shapes: query (B, N, H, D), key and value (B, M, H_kv, D), lse (B, H, N).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from dilated_core import _torch_internals
from dilated_core._branches import Branches
from dilated_core._call import DilatedCall, Scores, Upstream
from dilated_core._partial import Partial

Call = TypeVar("Call")
Gradients = tuple[Tensor, Tensor, Tensor]
_NOTHING = nullcontext()


class OperatorForm(NamedTuple, Generic[Call]):
    """How a call goes through an operator.

    Attributes:
        schema: its arguments there, as torch writes a schema; all tensors come first.
        tensors: the tensors, or None, of a call, which must not change before its backward.
        values: the other arguments.
        unpack: makes a call of query, key and all of these.
    """

    schema: str
    tensors: Callable[[Call], tuple[Tensor | None, ...]]
    values: Callable[[Call], tuple[Any, ...]]
    unpack: Callable[..., Call]


class Operators(NamedTuple, Generic[Call]):
    """A backend: `attend(call, query, key, value)`, and the operators behind it."""

    attend: Callable[[Call, Tensor, Tensor, Tensor], Partial]
    forward: Any
    backward: Any


def define(
    name: str,
    form: OperatorForm[Call],
    forward: Callable[[Call, Tensor, Tensor, Tensor], Partial],
    backward: Callable[[Call, Upstream], Gradients],
    empty_lse: Callable[[Tensor], Tensor],
) -> Operators[Call]:
    """Register the operators `{name}_forward` and `{name}_backward`, with exact gradients.

    Args:
        name: with the namespace, "package::backend".
        form: how a call goes through.
        forward: computes out in query's dtype and lse.
        backward: computes the gradients in query's dtype.
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
    ) -> Gradients:  # fmt: skip
        upstream = Upstream(grad_out, grad_lse, query, key, value, Partial(out, lse))
        with _without_autocast(query):
            dq, dk, dv = backward(form.unpack(query, key, *rest), upstream)
        return _alone(dq), _alone(dk), _alone(dv)

    def fake_forward(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return _empty(query), empty_lse(query)

    def fake_backward(
        _grad_out: Tensor, _grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
        *_: Any,
    ) -> Gradients:  # fmt: skip
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
    traced = _torch_internals.uncompiled(_traced(form, forward_op, backward_op))
    once = _torch_internals.uncompiled(_once(backward_op))
    for operator, kernel in ((forward_op, traced), (backward_op, once)):
        namespace, short = operator.name().split("::")
        _library(namespace).impl(short, kernel, "Autograd")

    def run(call: Call, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        with _torch_internals.below_autograd(), _without_autocast(query):
            return forward(call, query, key, value)

    eager = _eager(form, run, backward, backward_op)

    def attend(call: Call, query: Tensor, key: Tensor, value: Tensor) -> Partial:
        if not _torch_internals.is_eager(query, key, value):
            packed = *form.tensors(call), *form.values(call)
            return Partial(*forward_op(query, key, value, *packed))
        if _wants_grads(query, key, value):
            return Partial(*eager(call, query, key, value))
        return run(call, query, key, value)

    return Operators(attend, forward_op, backward_op)


def _traced(
    form: OperatorForm[Call], forward_op: Any, backward_op: Any
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward's operator with gradients by the backward's.

    As `torch.library.register_autograd` would make it, without its conversions of a schema.
    """
    count = form.schema.count("Tensor")

    class Traced(torch.autograd.Function):
        """The operators, with gradients."""

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
            with _torch_internals.outer_gradients():
                out, lse = below(*arguments)
            ctx.save_for_backward(*arguments[:3], out, lse, *arguments[3 : 3 + count])
            ctx.rest = arguments[3 + count :]
            ctx.set_materialize_grads(False)
            return out, lse

        @staticmethod
        @_torch_internals.uncompiled  # which sees it where a part of a step is compiled
        def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
            query, *saved = ctx.saved_tensors
            if grad_out is None:
                grad_out = torch.zeros_like(query)
            grads = backward_op(grad_out, grad_lse, query, *saved, *ctx.rest)
            return (*grads, *(None for _ in range(count + len(ctx.rest))))

    def below(*arguments: Any) -> tuple[Tensor, Tensor]:
        with _torch_internals.below_autograd():
            out, lse = forward_op(*arguments)
        return out, lse

    with_gradients: Callable[..., tuple[Tensor, Tensor]] = _torch_internals.applied(Traced)

    def differentiable(*arguments: Any) -> tuple[Tensor, Tensor]:
        return (with_gradients if _wants_grads(*arguments[:3]) else below)(*arguments)

    return differentiable


def _once(backward_op: Any) -> Callable[..., Gradients]:
    """The backward's operator, whose own gradients are an error once they are asked for.

    Not torch's once_differentiable, of which torch.func takes no notice (2.13), and which has no
    gradients, silently, where those of the results need none.
    """

    class Once(torch.autograd.Function):
        """The operator, without gradients."""

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Gradients:
            with _torch_internals.outer_gradients():
                return below(*arguments)

        @staticmethod
        def backward(ctx: Any, *_: Tensor | None) -> Any:
            raise RuntimeError(
                "attention must be differentiated once only, as once_differentiable. Got a second "
                "derivative."
            )

    def below(*arguments: Any) -> Gradients:
        with _torch_internals.below_autograd():
            dq, dk, dv = backward_op(*arguments)
        return dq, dk, dv

    refuse_second: Callable[..., Gradients] = _torch_internals.applied(Once)

    def once(*arguments: Any) -> Gradients:
        tensors = (x for x in arguments if isinstance(x, Tensor))
        wanted = _torch_internals.has_tangents() or (
            torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        )
        return (refuse_second if wanted else below)(*arguments)

    return once


def _eager(
    form: OperatorForm[Call],
    run: Callable[[Call, Tensor, Tensor, Tensor], Partial],
    backward: Callable[[Call, Upstream], Gradients],
    backward_op: Any,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The backend itself with gradients.

    A backward that is traced, or whose own gradients may be asked for, goes through the operator.
    """

    def compute(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        # Reading them tells whether a tensor was changed since the forward.
        query, key, value, out, lse, *tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(query)
        given = (grad_out,) if grad_lse is None else (grad_out, grad_lse)
        if _torch_internals.is_eager(*given, query) and not torch.is_grad_enabled():
            total = Partial(out, lse)
            with _without_autocast(query):
                grads = backward(ctx.call, Upstream(grad_out, grad_lse, query, key, value, total))
        else:
            grads = backward_op(
                grad_out, grad_lse, query, key, value, out, lse, *tensors, *form.values(ctx.call)
            )
        return (None, *grads)

    compute = _torch_internals.uncompiled(compute)

    class Eager(torch.autograd.Function):
        """The backend itself, with gradients."""

        @staticmethod
        def forward(
            ctx: Any, call: Call, query: Tensor, key: Tensor, value: Tensor
        ) -> tuple[Tensor, Tensor]:
            out, lse = run(call, query, key, value)
            ctx.save_for_backward(query, key, value, out, lse, *form.tensors(call))
            ctx.call = call
            ctx.set_materialize_grads(False)
            return out, lse

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
            return compute(ctx, grad_out, grad_lse)

    eager: Callable[..., tuple[Tensor, Tensor]] = Eager.apply
    return eager


def _wants_grads(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a call goes through autograd, which refuses tangents."""
    if _torch_internals.has_tangents():
        return True
    wanted = query.requires_grad or key.requires_grad or value.requires_grad
    return wanted and torch.is_grad_enabled()


def _register(
    name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    """Make an operator of a function, for all devices."""
    namespace, short = name.split("::")
    library = _library(namespace)
    library.define(short + schema, tags=torch.Tag.pt2_compliant_tag)
    library.impl(short, _torch_internals.uncompiled(function), "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=library)
    return getattr(getattr(torch.ops, namespace), short).default


@cache
def _library(namespace: str) -> torch.library.Library:
    """Where operators are registered; they live as long as it."""
    return torch.library.Library(namespace, "FRAGMENT")


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """It stays on inside an operator and would lower the products of a wide accumulator."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


def _alone(x: Tensor) -> Tensor:
    """With memory of its own, which what operators return must have."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


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
) -> DilatedCall:
    scores = Scores(is_causal, scale, key_padding_mask, dropout_p, seed)
    return DilatedCall(Branches.from_code(pattern), scores, cu_seqlens)


DILATED = OperatorForm(
    "Tensor? key_padding_mask, Tensor? seed, Tensor? cu_seqlens, str pattern, bool is_causal, "
    "float scale, float dropout_p",
    lambda call: (call.scores.key_padding_mask, call.scores.seed, call.cu_seqlens),
    lambda call: (
        call.pattern.code, call.scores.is_causal, call.scores.scale, call.scores.dropout_p,
    ),
    _unpack,
)  # fmt: skip
