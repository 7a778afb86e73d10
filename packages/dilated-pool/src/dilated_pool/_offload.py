"""Park the tensors that autograd saves in host memory."""

import contextlib
import threading
import weakref
from collections.abc import Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dilated_pool._errors import PoolLimitError, PoolLockedError
from dilated_pool._pool import UnifiedMemoryPool
from dilated_pool._requests import check_count

_Identity = tuple[int, int, tuple[int, ...], tuple[int, ...], torch.dtype, int]


@contextlib.contextmanager
def offload_activations(
    pool: UnifiedMemoryPool, *, min_bytes: int = 1 << 20, prefetch: int = 1
) -> Iterator[None]:
    """Keep what the forward pass saves for the backward pass in the pool's host memory.

    Tensors of a CUDA device go to pinned memory and are copied on a stream of their own, others to
    pageable memory. The pool's `limit_bytes` is the budget: what it cannot serve stays where it
    is, as do parameters and their views. Each parked tensor returns before the backward pass uses
    it, together with the `prefetch` ones parked before it. Forward must run inside the context,
    backward may run outside.

    Args:
        pool: where host memory comes from.
        min_bytes: smaller tensors stay where they are.
        prefetch: how many parked tensors to bring back ahead; each costs its memory on the device.

    Raises:
        TypeError: min_bytes or prefetch is not an int.
        ValueError: min_bytes or prefetch is negative.
    """
    check_count("min_bytes", min_bytes)
    check_count("prefetch", prefetch)
    parking = _Parking(pool, min_bytes, prefetch)
    with torch.autograd.graph.saved_tensors_hooks(parking.pack, parking.unpack):
        yield


class _Parked:
    """A tensor in host memory, and on the device again once it was brought back ahead."""

    def __init__(self, tensor: torch.Tensor, pool: UnifiedMemoryPool, index: int) -> None:
        self.device = tensor.device
        self.index = index
        # While this weak reference lives, no other storage can appear at the same address.
        self.storage = StorageWeakRef(tensor.untyped_storage())
        on_device = self.device.type == "cuda"
        # Never released by hand: autograd drops this object when it needs the tensor no more.
        self.lease = pool.lease(tensor.shape, dtype=tensor.dtype, pin_memory=on_device)
        self.fetched: torch.Tensor | None = None
        self.stream = _copy_stream(self.device) if on_device else None
        if self.stream is None:
            self.lease.tensor.copy_(tensor)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.lease.tensor.copy_(tensor, non_blocking=True)
        self.lease.record_stream(self.stream)
        tensor.record_stream(self.stream)

    def fetch(self) -> None:
        """Start to bring the tensor back, unless that was done."""
        if self.fetched is not None:
            return
        if self.stream is None:
            self.fetched = self.lease.tensor.clone()
            return
        # Allocated on the stream that computes, whose freed memory it can reuse.
        host = self.lease.tensor
        self.fetched = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.fetched.copy_(host, non_blocking=True)
        self.fetched.record_stream(self.stream)

    def take(self) -> torch.Tensor:
        """Return the tensor for the current stream; a second backward pass fetches it anew."""
        self.fetch()
        tensor, self.fetched = self.fetched, None
        assert tensor is not None
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            tensor.record_stream(current)
        return tensor


class _Parking:
    """The saved-tensor hooks of one context."""

    def __init__(self, pool: UnifiedMemoryPool, min_bytes: int, prefetch: int) -> None:
        self._pool = pool
        self._min_bytes = min_bytes
        self._prefetch = prefetch
        self._lock = threading.Lock()
        self._count = 0
        # Autograd owns what is parked; here it is only found again, by order and by identity.
        self._by_index: weakref.WeakValueDictionary[int, _Parked] = weakref.WeakValueDictionary()
        self._by_identity: weakref.WeakValueDictionary[_Identity, _Parked] = (
            weakref.WeakValueDictionary()
        )

    def pack(self, tensor: torch.Tensor) -> "torch.Tensor | _Parked":
        if tensor.nbytes < self._min_bytes or not _worth_parking(tensor):
            return tensor
        identity = _identity(tensor)
        with self._lock:
            parked = self._by_identity.get(identity)
            if parked is not None:
                return parked
            try:
                parked = _Parked(tensor, self._pool, self._count)
            except (PoolLimitError, PoolLockedError):
                return tensor
            self._by_identity[identity] = self._by_index[self._count] = parked
            self._count += 1
            return parked

    def unpack(self, packed: "torch.Tensor | _Parked") -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        with self._lock:
            packed.fetch()
            # Backward goes the other way through what forward parked.
            for index in range(packed.index - 1, packed.index - 1 - self._prefetch, -1):
                ahead = self._by_index.get(index)
                if ahead is not None:
                    ahead.fetch()
            return packed.take()


def _worth_parking(tensor: torch.Tensor) -> bool:
    """Whether parking the tensor could free its memory: a parameter stays alive anyway."""
    origin = tensor if tensor._base is None else tensor._base
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not (origin.is_leaf and origin.requires_grad)
    )


def _identity(tensor: torch.Tensor) -> _Identity:
    return (
        tensor.untyped_storage()._cdata,
        int(tensor.storage_offset()),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.dtype,
        tensor._version,
    )


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return _streams.get(device) or _streams.setdefault(device, torch.cuda.Stream(device))
