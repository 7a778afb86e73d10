"""What the launches use of triton that has no public name, and a check that it is there.

A launch through triton's own front door takes the host 30 to 60 microseconds for as many arguments
as the kernels have: it finds the type of each anew, and the binary by all types. Here all that a
binary depends on is either fixed or checked, so that the binary of the first launch serves again.
"""

# triton has no types.
# mypy: disable-error-code="import-untyped,import-not-found"

import inspect
from collections.abc import Hashable, Sequence
from functools import cache, reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from triton import JITFunction, knobs

from dilated_core._triton._plan import TilePlan, raw_stream

OTHERS = 3
_MOST_BINARIES = 256

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


class Relaunch:
    """A kernel, launched by its known binaries: what is alike but for addresses has the same.

    Args:
        kernel: one that specializes none of its numbers.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._binaries: dict[Hashable, tuple[Any, ...]] = {}

    def __call__(
        self, facts: Hashable, grid: int, tensors: Sequence[Tensor | None], rest: Sequence[Any],
        **options: Any,
    ) -> None:  # fmt: skip
        """Launch on the current stream of the tensors' device, which is current.

        Args:
            facts: all that a binary depends on: device, dtypes, what is absent, constants, options.
            grid: how many programs.
            tensors: the first arguments.
            rest: the others, in order.
            options: how to compile.
        """
        addresses = [x if x is None else x.data_ptr() for x in tensors]
        aligned = not reduce(or_, filter(None, addresses)) % 16
        direct = aligned and isinstance(self._kernel, JITFunction) and can_relaunch()
        direct = direct and not _has_hooks(self._kernel)
        known = self._binaries.get(facts) if direct else None
        if known is None:
            binary = self._kernel[(grid,)](*tensors, *rest, **options)
            if direct:
                if len(self._binaries) >= _MOST_BINARIES:
                    self._binaries.clear()
                self._binaries[facts] = binary.run, binary.function, binary.packed_metadata
            return
        run, function, metadata = known
        stream = raw_stream(next(x.get_device() for x in tensors if x is not None))
        run(grid, 1, 1, stream, function, metadata, None, None, None, *addresses, *rest)


class Launch:
    """One kernel with all its arguments but its tensors, launched again and again.

    Args:
        kernel: the kernel.
        grid: how many programs.
        plan: the tables, between the tensors of a launch and its last ones.
        numbers: the arguments after the tensors.
        constants: the compile-time arguments by name.
        options: how to compile.
    """

    def __init__(
        self, kernel: Any, grid: int, plan: TilePlan, numbers: Sequence[float],
        constants: dict[str, Any], options: dict[str, Any],
    ) -> None:  # fmt: skip
        self.stream = plan.stream
        self._kernel, self._grid, self._tables = kernel, grid, plan.tensors()
        self._numbers, self._named = numbers, constants | options
        self._addresses = [x.data_ptr() for x in self._tables]
        self._rest: list[Any] = []
        known = isinstance(kernel, JITFunction) and can_relaunch()
        self._known = known and not reduce(or_, self._addresses) % 16
        if known:
            last = kernel.arg_names[-len(constants) :]
            self._rest = [*numbers, *(constants[name] for name in last)]
        self._absent = [*self._addresses, *self._addresses[:1] * OTHERS, *self._rest]
        self._binary: tuple[Any, ...] | None = None

    def __call__(
        self, stream: int, tensors: Sequence[Tensor], others: Sequence[Tensor | None]
    ) -> None:
        """Launch on the current stream, which is `stream`.

        Args:
            stream: as `current_stream` gives it.
            tensors: those before the tables.
            others: the `OTHERS` after them, of which some may be None, or none if all are.
        """
        addresses = [x.data_ptr() for x in tensors]
        tail = self._absent
        if others:
            given = [self._addresses[0] if x is None else x.data_ptr() for x in others]
            tail = [*self._addresses, *given, *self._rest]
            addresses += given
        # Binaries differ by which addresses are multiples of 16.
        direct = self._known and not reduce(or_, addresses) % 16 and not _has_hooks(self._kernel)
        if not direct or self._binary is None:
            binary = self._through_the_door(tensors, others)
            if direct:
                self._binary = binary.run, binary.function, binary.packed_metadata
            return
        run, function, metadata = self._binary
        del addresses[len(tensors) :]
        run(self._grid, 1, 1, stream, function, metadata, None, None, None, *addresses, *tail)

    def _through_the_door(self, tensors: Sequence[Tensor], others: Sequence[Tensor | None]) -> Any:
        # Absent ones are any pointer.
        given = [self._tables[0] if x is None else x for x in others or [None] * OTHERS]
        return self._kernel[(self._grid,)](
            *tensors, *self._tables, *given, *self._numbers, **self._named
        )
