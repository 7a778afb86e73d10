"""Layer norm in 16 bits on CUDA, of rows, of their GELU, or of a sum: each row is read once.

The backward reads the rows again and keeps nothing else but two numbers of each.
"""

# Shapes: R rows, F features.

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dilated_core.extending import has_tangents, is_eager, is_transformed, on_device

# A row is held by one program.
MOST_FEATURES = 16384
_HAS_TRITON = find_spec("triton") is not None
NARROW = (torch.float16, torch.bfloat16)


def has_kernels(x: Tensor) -> bool:
    """Whether triton's kernels serve rows of such a tensor, one by a program."""
    return x.is_cuda and x.shape[-1] <= MOST_FEATURES and _HAS_TRITON


def can_serve(x: Tensor) -> bool:
    """Whether `gelu_norm` takes such an input."""
    # torch.func has no gradients of a torch.library.custom_op (2.13).
    return has_kernels(x) and x.dtype in NARROW and not is_transformed()


def narrow_dtype(x: Tensor, weight: Tensor, *others: Tensor) -> torch.dtype | None:
    """The dtype of a `narrow_norm` as autocast would cast it, or None where no kernel serves.

    Args:
        x: what is normed, or what something is added to.
        weight: of the norm; torch has the words for rows of another width.
        others: the bias, and what is added.
    """
    # torch.compile reads a row once, too, and these kernels would gain nothing there: measured.
    if not (has_kernels(x) and x.dtype in (*NARROW, torch.float32)):
        return None
    if x.shape[-1:] != weight.shape or not is_eager(x, weight, *others) or has_tangents():
        return None
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return dtype if dtype in NARROW else None


def gelu_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """layer_norm(gelu(x)) * weight + bias over the last dimension, in x's dtype.

    All that is between is float32.

    Args:
        x: (..., F).
        weight: (F,).
        bias: (F,).
        eps: added to the variance.
    """
    return _apply(x, None, weight, bias, eps, x.dtype, True)[1]


def narrow_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """layer_norm(x) * weight + bias in a 16-bit dtype, of a tensor of 16 or 32 bits.

    Arguments as in `gelu_norm`.
    """
    return _apply(x, None, weight, bias, eps, dtype, False)[1]


def sum_and_norm(
    x: Tensor, added: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + added, which is no wider and of the same shape, and `narrow_norm` of that."""
    total, normed, _ = _apply(x, added, weight, bias, eps, dtype, False)
    return total, normed


Outputs = tuple[Tensor, Tensor, Tensor]


def _apply(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    dtype: torch.dtype, gelu: bool,
) -> Outputs:  # fmt: skip
    given = (x, weight, bias) if added is None else (x, added, weight, bias)
    run: Callable[..., Outputs] = _forward
    if is_eager(*given):
        learns = torch.is_grad_enabled() and any(one.requires_grad for one in given)
        run = _Eager.apply if learns or has_tangents() else _run_forward
    return run(x, added, weight, bias, eps, dtype, gelu)


def _run_forward(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    dtype: torch.dtype, gelu: bool,
) -> Outputs:  # fmt: skip
    """The sum, which is empty without added; the norm; mean and reciprocal deviation of rows."""
    total, out, moments = _outputs(x, added, weight, bias, eps, dtype, gelu)
    if x.numel():
        parts = (None, None) if added is None else (added.contiguous(), total)
        with on_device(x):
            _kernels().forward(
                x.contiguous(), parts[0], weight, bias, parts[1], out, moments, eps, gelu
            )
    return total, out, moments


def _outputs(
    x: Tensor, added: Tensor | None, _weight: Tensor, _bias: Tensor, _eps: float,
    dtype: torch.dtype, _gelu: bool,
) -> Outputs:  # fmt: skip
    rows = x.numel() // x.shape[-1]
    return (
        x.new_empty(0 if added is None else x.shape),
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty((2, rows), dtype=torch.float32),
    )


Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def _run_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight: Tensor, moments: Tensor,
    added: torch.dtype, gelu: bool,
) -> Gradients:  # fmt: skip
    """Gradients of x, of what was added if that has another dtype, of weight and of bias."""
    grads = _gradients(grad, grad_total, x, weight, moments, added, gelu)
    if not x.numel():
        return *grads[:2], torch.zeros_like(weight), torch.zeros_like(weight)
    with on_device(x):
        parts = _kernels().backward(
            grad.contiguous(), None if grad_total is None else grad_total.contiguous(),
            x.contiguous(), weight, moments, grads[0], None if added == x.dtype else grads[1], gelu,
        )  # fmt: skip
    grad_weight, grad_bias = (part.sum(0).to(weight.dtype) for part in parts)
    return *grads[:2], grad_weight, grad_bias


def _gradients(
    _grad: Tensor, _grad_total: Tensor | None, x: Tensor, weight: Tensor, _moments: Tensor,
    added: torch.dtype, _gelu: bool,
) -> Gradients:  # fmt: skip
    return (
        x.new_empty(x.shape),
        x.new_empty(0 if added == x.dtype else x.shape, dtype=added),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )


_forward = torch.library.custom_op("dilated_factory::norm", _run_forward, mutates_args=())
_backward = torch.library.custom_op(
    "dilated_factory::norm_backward", _run_backward, mutates_args=()
)
_forward.register_fake(_outputs)
_backward.register_fake(_gradients)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, added, weight, _, _, _, ctx.gelu = inputs
    total, _, moments = output
    ctx.added = None if added is None else added.dtype
    ctx.save_for_backward(x if added is None else total, weight, moments)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_total: Tensor | None, grad: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    nothing = None, None, None
    if grad is None:
        of_added = None if grad_total is None else grad_total.to(ctx.added)
        return grad_total, of_added, None, None, *nothing
    x, weight, moments = ctx.saved_tensors
    # The operator refuses a second derivative.
    eager = is_eager(grad, x) and not torch.is_grad_enabled()
    run = _run_backward if eager else _backward
    dtype = x.dtype if ctx.added is None else ctx.added
    total = None if ctx.added is None else grad_total
    of_x, of_added, of_weight, of_bias = run(grad, total, x, weight, moments, dtype, ctx.gelu)
    if ctx.added is None:
        return of_x, None, of_weight, of_bias, *nothing
    return of_x, of_x if dtype == x.dtype else of_added, of_weight, of_bias, *nothing


_forward.register_autograd(_differentiate, setup_context=_keep)


class _Eager(torch.autograd.Function):
    """The same without torch's dispatcher.

    Of a forward with a setup_context torch inspects the signature at each call, which takes the
    host longer than all else (2.11, 2.13).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Outputs:
        """As the operator."""
        outputs = _run_forward(*inputs)
        _keep(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """As of the operator."""
        return _differentiate(ctx, *grads)


@cache
def _kernels() -> ModuleType:
    from dilated_factory.models import _norm_kernels

    return _norm_kernels
