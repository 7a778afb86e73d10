"""Tensors that live as long as a call, from a buffer source or from torch."""

from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor

from dilated_core.interfaces import BufferLease, BufferSource


class Leases:
    """Uninitialised tensors for the length of a `with` block; all are given back at its end.

    Args:
        source: where they come from; torch when None.
        device: where they are.
    """

    def __init__(self, source: BufferSource | None, device: torch.device) -> None:
        self._source, self._device = source, device
        self._leases: dict[int, BufferLease] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with ExitStack() as stack:  # one that cannot be given back does not keep the others
            for lease in self._leases.values():
                stack.callback(lease.release)
        self._leases.clear()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Lend a tensor."""
        if self._source is None:
            return torch.empty(shape, dtype=dtype, device=self._device)
        lease = self._source.lease(shape, dtype=dtype, device=self._device)
        tensor = lease.tensor
        self._leases[id(tensor)] = lease
        return tensor

    def release(self, *tensors: Tensor | None) -> None:
        """Give tensors of this call back before its end; any others are not touched."""
        for tensor in tensors:
            lease = self._leases.pop(id(tensor), None)
            if lease is not None:
                lease.release()
