"""What the pool uses of torch that has no public name, and a check of what it means.

A tensor's use count is the number of owners of the C++ tensor: the Python object is one, a graph
that saved it or a view made from it are others. A storage's use count is the number of C++ tensors
that share it; its Python object, of which there is one, has Python's own count.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._compile import _disable_dynamo
from torch.multiprocessing.reductions import StorageWeakRef

P = ParamSpec("P")
T = TypeVar("T")


def tensor_use_count(tensor: torch.Tensor) -> int:
    """Count the owners of the C++ tensor, of which the Python object is one."""
    return tensor._use_count()  # type: ignore[no-any-return, attr-defined]


# What torch.autograd.graph.increment_version calls, which takes twice as long.
increment_version = torch._C._increment_version

# By the address of the storage, which stays while the storage lives.
storage_use_count = torch._C._storage_Use_Count


def live_storage(reference: StorageWeakRef) -> torch.UntypedStorage | None:
    """The storage of a weak reference, or None once it is gone."""
    return torch.UntypedStorage._new_with_weak_ptr(reference.cdata)


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """torch.compiler.disable, without the import of torch's compiler, which takes seconds.

    dilated-core has one as well: this package needs torch alone.
    """
    disabled = _disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        return (disabled if torch.compiler.is_compiling() else function)(*args, **options)

    return call


@functools.cache
def check_use_counts() -> None:
    """Raise RuntimeError if this torch counts references in another way than the pool relies on."""
    with torch.inference_mode(False), torch.no_grad():
        owner = torch.empty(8, dtype=torch.uint8)
        storage = owner.untyped_storage()._cdata
        alone = storage_use_count(storage)
        tensor = owner.detach()
        shared = storage_use_count(storage)
        single = tensor_use_count(tensor)
        view = tensor.view(2, 4)
        seen = (shared - alone, single, tensor_use_count(tensor), storage_use_count(storage))
        del view
        back = (tensor_use_count(tensor), storage_use_count(storage))
    if seen != (1, 1, 2, shared + 1) or back != (1, shared):
        raise RuntimeError(
            f"dilated-pool does not know how torch {torch.__version__} counts references to "
            "tensors, so it could not tell when memory is free"
        )
