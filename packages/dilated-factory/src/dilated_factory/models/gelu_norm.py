"""Layer norm of GELU in 16 bits on CUDA, where each row is read once; torch.compile reads it twice.

The backward reads the input of the GELU again and keeps nothing else but two numbers a row.
"""

# Shapes: R rows, F features.

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

# A row is held by one program.
MOST_FEATURES = 16384
_HAS_TRITON = find_spec("triton") is not None


def has_kernels(x: Tensor) -> bool:
    """Whether triton's kernels serve rows of such a tensor, one by a program."""
    return x.is_cuda and x.shape[-1] <= MOST_FEATURES and _HAS_TRITON


def can_serve(x: Tensor) -> bool:
    """Whether `gelu_norm` takes such an input."""
    return has_kernels(x) and x.dtype in (torch.float16, torch.bfloat16)


def gelu_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """layer_norm(gelu(x)) * weight + bias over the last dimension, in x's dtype.

    All that is between is float32.

    Args:
        x: (..., F), contiguous.
        weight: (F,).
        bias: (F,).
        eps: added to the variance.
    """
    out: Tensor = _forward(x, weight, bias, eps)[0]
    return out


@torch.library.custom_op("dilated_factory::gelu_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    rows = x.numel() // x.shape[-1]
    out = torch.empty_like(x)
    moments = torch.empty((2, rows), dtype=torch.float32, device=x.device)
    if rows:
        with torch.cuda.device(x.device):
            _kernels().forward(x, weight, bias, out, moments, eps)
    return out, moments


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    out = x.new_empty(x.shape)
    return out, x.new_empty((2, rows), dtype=torch.float32)


@torch.library.custom_op("dilated_factory::gelu_norm_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, moments: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x, grad = x.contiguous(), grad.contiguous()
    grad_x = torch.empty_like(x)
    if not x.numel():
        return grad_x, torch.zeros_like(weight), torch.zeros_like(weight)
    with torch.cuda.device(x.device):
        parts = _kernels().backward(grad, x, weight, moments, grad_x)
    grad_weight, grad_bias = parts.sum(1).to(weight.dtype).unbind()
    return grad_x, grad_weight.clone(), grad_bias.clone()


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(weight)


def _keep(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, float],
    output: tuple[Tensor, Tensor],
) -> None:
    x, weight, *_ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _differentiate(
    ctx: torch.autograd.function.BackwardCFunction, grad: Tensor, _: Tensor
) -> tuple[Tensor, Tensor, Tensor, None]:
    grad_x, grad_weight, grad_bias = _backward(grad, *ctx.saved_tensors)
    return grad_x, grad_weight, grad_bias, None


_forward.register_autograd(_differentiate, setup_context=_keep)


@cache
def _kernels() -> ModuleType:
    from dilated_factory.models import _gelu_norm_kernels

    return _gelu_norm_kernels
