"""What this package uses of torch that has no public name."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import maybe_current_level
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.nn import Parameter

__all__ = [
    "below_autograd",
    "disable_dynamo",
    "flash",
    "flash_backward",
    "has_tangents",
    "is_eager",
    "unrelated_views",
]

# They compute whole rows on the CPU, and take and give the log-sum-exp.
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# torch.compile calls the function, and all that it calls, as it is.
disable_dynamo = _disable_dynamo
# A context in which nothing that autograd registers takes part.
below_autograd = torch._C._AutoDispatchBelowAutograd
_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def unrelated_views() -> AbstractContextManager[object]:
    """A context in which a view is a tensor like any other: a change is not one of its base."""
    return torch._C._ExcludeDispatchKeyGuard(_VIEWS)


def is_eager(*inputs: Tensor) -> bool:
    """Whether nothing but autograd takes part in a call, so that it need not be an operator.

    Through torch's dispatcher a forward takes the host longer by about a half.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or _len_torch_dispatch_stack()
        or maybe_current_level() is not None
    ):
        return False
    for x in inputs:
        kind = type(x)
        if (kind is not Tensor and kind is not Parameter) or x.is_meta or x.is_neg():
            return False
    return True


def has_tangents() -> bool:
    """Whether there may be tensors with tangents, of forward-mode differentiation."""
    return forward_ad._current_level >= 0
