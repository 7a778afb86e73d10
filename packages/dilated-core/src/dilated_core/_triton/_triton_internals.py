"""What the launches use of triton that has no public name, and a check that it is there.

A launch through triton's own front door takes the host 30 to 60 microseconds for as many arguments
as the kernels have: it finds the type of each anew, and the binary by all types. Here all that a
binary depends on is either fixed or checked, so that the binary of the first launch serves again.
"""

# triton has no types.
# mypy: disable-error-code="import-untyped,import-not-found"

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton import JITFunction, knobs

# How triton itself calls a binary, without spaces.
_CONVENTION = (
    "kernel.run(grid_0,grid_1,grid_2,stream,kernel.function,kernel.packed_metadata,launch_metadata,"
    "knobs.runtime.launch_enter_hook,knobs.runtime.launch_exit_hook,*bound_args.values())"
)


@cache
def can_relaunch() -> bool:
    """Whether this triton calls binaries as it is known to, and its hooks are as they were."""
    try:
        source = "".join(inspect.getsource(JITFunction.run).split())
        hooks = knobs.runtime.launch_enter_hook.calls, knobs.runtime.launch_exit_hook.calls
    except (AttributeError, OSError, TypeError):
        return False
    known = _CONVENTION in source and all(isinstance(calls, list) for calls in hooks)
    return known and torch.version.hip is None and torch.version.cuda is not None


def _has_hooks(kernel: Any) -> bool:
    """Whether someone wants to see each launch, as profilers do."""
    runtime = knobs.runtime
    watching = runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls
    return bool(watching or kernel.pre_run_hooks)


class Launch:
    """One kernel with all its arguments but its tensors, launched again and again.

    Args:
        kernel: the kernel.
        grid: how many programs.
        tables: the tensors between those of a launch and its last three.
        numbers: the arguments after the tensors.
        constants: the compile-time arguments by name.
        options: how to compile.
    """

    def __init__(
        self, kernel: Any, grid: int, tables: Sequence[Tensor], numbers: Sequence[float],
        constants: dict[str, Any], options: dict[str, Any],
    ) -> None:  # fmt: skip
        self._kernel, self._grid, self._tables = kernel, grid, tables
        self._addresses = [x.data_ptr() for x in tables]
        self._numbers, self._named = numbers, constants | options
        self._rest: list[Any] = []
        self._binary: Any = None
        if isinstance(kernel, JITFunction) and can_relaunch():
            last = kernel.arg_names[-len(constants) :]
            self._rest = [*numbers, *(constants[name] for name in last)]

    def __call__(self, tensors: Sequence[Tensor], *others: Tensor) -> None:
        """Launch on the current stream: with `tensors`, the tables, `others` and the numbers."""
        if not self._rest:
            self._through_the_door(tensors, others)
            return
        # Binaries differ by which addresses are multiples of 16.
        addresses = [x.data_ptr() for x in tensors]
        addresses += self._addresses
        addresses += [x.data_ptr() for x in others]
        low = 0
        for address in addresses:
            low |= address
        if low % 16 or _has_hooks(self._kernel):
            self._through_the_door(tensors, others)
            return
        if self._binary is None:
            self._binary = self._through_the_door(tensors, others)
            return
        binary = self._binary
        stream = torch._C._cuda_getCurrentRawStream(tensors[0].get_device())
        binary.run(
            self._grid, 1, 1, stream, binary.function, binary.packed_metadata, None, None, None,
            *addresses, *self._rest,
        )  # fmt: skip

    def _through_the_door(self, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Any:
        return self._kernel[(self._grid,)](
            *tensors, *self._tables, *others, *self._numbers, **self._named
        )
