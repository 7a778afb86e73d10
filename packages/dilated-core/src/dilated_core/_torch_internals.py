"""What this package uses of torch that has no public name."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import maybe_current_level
from torch._compile import _disable_dynamo
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.nn import Module, Parameter
from torch.nn.modules.module import _has_any_global_hook

__all__ = [
    "applied",
    "below_autograd",
    "flash",
    "flash_backward",
    "has_hooks",
    "has_tangents",
    "is_eager",
    "is_transformed",
    "outer_gradients",
    "uncompiled",
    "unrelated_views",
]

_P = ParamSpec("_P")
_T = TypeVar("_T")

# They compute whole rows on the CPU, and take and give the log-sum-exp.
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# A context in which nothing that autograd registers takes part.
below_autograd = torch._C._AutoDispatchBelowAutograd
_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def uncompiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Have torch.compile call the function, and all that it calls, as it is.

    As torch.compiler.disable, which imports torch's compiler: seconds in a process that never
    compiles, and where a process group exists already, torch.distributed.nn's default arguments
    keep it for ever (torch 2.13).
    """
    disabled = _disable_dynamo(function)

    @wraps(function)
    def call(*args: _P.args, **options: _P.kwargs) -> _T:
        seen = torch.compiler.is_compiling() or "torch._dynamo" in sys.modules
        return (disabled if seen else function)(*args, **options)

    return call


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


def is_transformed() -> bool:
    """Whether a call is one of torch.func's transforms, such as grad or vmap, not compiled."""
    return not torch.compiler.is_compiling() and maybe_current_level() is not None


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The `apply` of a function that is an operator's autograd kernel, under torch.func too.

    There the dispatcher has taken one level of torch.func away, which is all that the function is
    to see. Its own `apply` would take it away again, and asks for a setup_context for that (as it
    does of every torch.library.custom_op).
    """
    at_one_level = super(torch.autograd.Function, function).apply  # type: ignore[misc] # in C

    def apply(*arguments: Any) -> Any:
        if maybe_current_level() is None:
            return function.apply(*arguments)
        with enable_single_level_autograd_function():
            return at_one_level(*arguments)

    return apply


@contextmanager
def outer_gradients() -> Iterator[None]:
    """A context in the forward of an `applied` function in which torch.func's outer levels record.

    A function's forward is without gradients and tangents, which is meant for its own level only.
    """
    if maybe_current_level() is None:
        yield
    else:
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            yield


def has_hooks(module: Module) -> bool:
    """Whether a call of a module is more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or _has_any_global_hook()
    )


def has_tangents() -> bool:
    """Whether there may be tensors with tangents, of forward-mode differentiation."""
    return forward_ad._current_level >= 0
