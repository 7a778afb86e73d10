"""Functions that torch.compile leaves out of its graphs."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """torch.compiler.disable, without the import of torch's compiler, which takes seconds."""
    disabled = _disable_dynamo(function)

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        return (disabled if torch.compiler.is_compiling() else function)(*args, **options)

    return call
