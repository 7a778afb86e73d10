"""What operators allocate, counted."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dilated_core import _torch_internals


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators make and that still live.

    Our own operators are entered: a mode would else see what they return, and nothing that they
    make meanwhile.

    Args:
        known: tensors that do not count.

    Attributes:
        now: how many bytes live.
        peak: the most at once.
        largest: the most in one storage.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.now, self.peak, self.largest = 0, 0, 0
        self._patch = pytest.MonkeyPatch()
        self._live = {x.untyped_storage().data_ptr() for x in known}

    def __enter__(self) -> "LiveBytes":
        self._patch.setattr(_torch_internals, "is_eager", lambda *_: True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def __torch_dispatch__(
        self, function: Any, _types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        """Call an operator, and count what it made."""
        result = function(*arguments, **(options or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        name, size = storage.data_ptr(), storage.nbytes()
        if size and name not in self._live:
            self._live.add(name)
            self.now += size
            self.largest = max(self.largest, size)
            weakref.finalize(storage, self._drop, name, size)

    def _drop(self, name: int, size: int) -> None:
        self._live.discard(name)
        self.now -= size
