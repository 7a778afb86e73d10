"""Park the tensors that autograd saves in host memory."""

import contextlib
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from dilated_pool._errors import PoolLimitError, PoolLockedError
from dilated_pool._pool import UnifiedMemoryPool
from dilated_pool._requests import check_count
from dilated_pool._torch_internals import live_storage, uncompiled

# Of a storage that is larger than this times what a tensor spans, only that is parked.
_WHOLE_UP_TO = 4
_ALIGNMENT = 64


@contextlib.contextmanager
def offload_activations(
    pool: UnifiedMemoryPool,
    *,
    min_bytes: int = 1 << 20,
    prefetch: int = 1,
    modules: Iterable[nn.Module] | None = None,
) -> Iterator[None]:
    """Keep what the forward pass saves for the backward pass in the pool's host memory.

    What is parked are storages: tensors that share one are parked once, an expanded tensor costs
    what it is expanded from, and strides come back as they were. Storages of a CUDA device go to
    pinned memory and are copied on a stream of their own, others to pageable memory. The pool's
    `limit_bytes` is the budget: what it cannot serve stays where it is, as do parameters and their
    views. Each parked storage returns before the backward pass uses it, together with the
    `prefetch` ones parked before it. Forward must run inside the context, backward may run outside.

    A change in place after saving is found as torch finds it, whether or not the tensor was parked.

    Inside a function that torch.compile compiles, the function that opens the context runs as it
    is, and what it calls is compiled. Around a compiled model, the whole model is.

    Args:
        pool: where host memory comes from.
        min_bytes: smaller storages stay where they are.
        prefetch: how many parked storages to bring back ahead; each costs its memory on the device.
        modules: park only what is saved in the forward of one of these; all when None.

    Raises:
        TypeError: min_bytes or prefetch is not an int, or modules holds something else.
        ValueError: min_bytes or prefetch is negative.
        RuntimeError: in the backward, where a saved tensor was modified in place.

    Examples:
        >>> pool = UnifiedMemoryPool(limit_bytes=16 << 20)
        >>> layer = torch.nn.Linear(64, 64)
        >>> with offload_activations(pool, min_bytes=1):
        ...     loss = layer(torch.randn(128, 64)).square().mean()
        >>> loss.backward()
        >>> layer.weight.grad.shape
        torch.Size([64, 64])
    """
    check_count("min_bytes", min_bytes)
    check_count("prefetch", prefetch)
    chosen = None if modules is None else list(modules)
    for module in chosen or ():
        if not isinstance(module, nn.Module):
            raise TypeError(f"modules must hold torch modules. Got {type(module).__name__}.")
    parking = _Parking(pool, min_bytes, prefetch)
    with contextlib.ExitStack() as stack:
        if chosen is None:
            stack.enter_context(parking.hooks())
        else:
            stack.enter_context(_only_within(chosen, parking))
        yield


# torch.compile cannot trace hooks that keep track of storages.
offload_activations = uncompiled(offload_activations)


@contextlib.contextmanager
def _only_within(modules: list[nn.Module], parking: "_Parking") -> Iterator[None]:
    """Park what the forwards of some modules save, in the thread of each."""
    entered = threading.local()

    def enter(*_: Any) -> None:
        entered.stack = [*getattr(entered, "stack", ()), parking.hooks()]
        entered.stack[-1].__enter__()

    def leave(*_: Any) -> None:
        *entered.stack, hooks = entered.stack
        hooks.__exit__(None, None, None)

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


class _Region(NamedTuple):
    """Bytes of a storage, as they were at one version.

    Attributes:
        storage: its address, which no other storage has while a weak reference lives.
        version: how often it was changed in place.
        start, stop: the bytes.
    """

    storage: int
    version: int
    start: int
    stop: int


class _Parked:
    """A region in host memory, and on the device again once it was brought back ahead."""

    def __init__(
        self, region: _Region, tensor: torch.Tensor, pool: UnifiedMemoryPool, index: int
    ) -> None:
        self.region, self.device, self.index = region, tensor.device, index
        storage = tensor.untyped_storage()
        self.storage = StorageWeakRef(storage)
        on_device = self.device.type == "cuda"
        size = region.stop - region.start
        # Never released by hand: autograd drops this object when it needs the region no more.
        self.lease = pool.lease((size,), dtype=torch.uint8, pin_memory=on_device)
        self.fetched: torch.Tensor | None = None
        self.taken: StorageWeakRef | None = None
        self.stream = _copy_stream(self.device) if on_device else None
        data = _bytes(storage, region.start, size, self.device)
        if self.stream is None:
            self.lease.tensor.copy_(data)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.lease.tensor.copy_(data, non_blocking=True)
        self.lease.record_stream(self.stream)
        data.record_stream(self.stream)

    def fetch(self) -> None:
        """Start to bring the region back, unless that was done."""
        if self.fetched is not None or (self.taken is not None and not self.taken.expired()):
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

    def take(self) -> torch.UntypedStorage:
        """Return the region for the current stream; when nobody has it any more, it comes anew."""
        storage = None if self.taken is None else live_storage(self.taken)
        if storage is None:
            self.fetch()
            assert self.fetched is not None
            storage, self.fetched = self.fetched.untyped_storage(), None
            self.taken = StorageWeakRef(storage)
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            _bytes(storage, 0, 1, self.device).record_stream(current)
        return storage


class _View(NamedTuple):
    """A tensor in a parked region; `witness` counts its changes in place."""

    witness: torch.Tensor
    parked: _Parked
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    is_conj: bool

    def on(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The tensor, where its region is back."""
        tensor = torch.empty(0, dtype=self.dtype, device=self.parked.device)
        tensor.set_(storage, self.offset, self.shape, self.stride)
        return tensor.conj() if self.is_conj else tensor


class _Saved(NamedTuple):
    """What was saved: the tensor itself where it stays, and its version at that time."""

    what: torch.Tensor | _View
    version: int

    def require_unchanged(self) -> None:
        """RuntimeError if it was modified since, as torch says it."""
        what = self.what
        shape, version = what.shape, (what.witness if isinstance(what, _View) else what)._version
        if version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {tuple(shape)} is at version "
                f"{version}; expected version {self.version} instead"
            )


class _Parking:
    """The saved-tensor hooks of one context."""

    def __init__(self, pool: UnifiedMemoryPool, min_bytes: int, prefetch: int) -> None:
        self._pool = pool
        self._min_bytes = min_bytes
        self._prefetch = prefetch
        self._lock = threading.Lock()
        self._count = 0
        # Autograd owns what is parked; here it is only found again, by order and by region.
        self._by_index: weakref.WeakValueDictionary[int, _Parked] = weakref.WeakValueDictionary()
        self._by_region: weakref.WeakValueDictionary[_Region, _Parked] = (
            weakref.WeakValueDictionary()
        )

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context in which what is saved is parked."""
        pack, unpack = self.pack, self.unpack
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and its import takes seconds
            pack, unpack = torch.compiler.disable(pack), torch.compiler.disable(unpack)
        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def pack(self, tensor: torch.Tensor) -> _Saved:
        # Detached, for an output that holds its own node would never be freed.
        same = tensor.detach()
        return _Saved(self._park(tensor, same) or same, tensor._version)

    def _park(self, tensor: torch.Tensor, same: torch.Tensor) -> _View | None:
        """The tensor in a parked region, if it is worth it and fits."""
        if not _worth_parking(tensor):
            return None
        regions = _regions(tensor)
        with self._lock:
            found = (self._by_region.get(region) for region in regions)
            parked = next((one for one in found if one is not None), None)
            region = regions[-1]
            if parked is None:
                if region.stop - region.start < max(1, self._min_bytes):
                    return None
                try:
                    parked = _Parked(region, tensor, self._pool, self._count)
                except (PoolLimitError, PoolLockedError):
                    return None
                self._by_region[region] = self._by_index[self._count] = parked
                self._count += 1
        offset = int(tensor.storage_offset()) - parked.region.start // tensor.itemsize
        like = tensor.dtype, offset, tensor.shape, tensor.stride(), tensor.is_conj()
        same.data = same.new_empty(0)  # it counts changes still, and holds no storage
        return _View(same, parked, *like)

    def unpack(self, saved: _Saved) -> torch.Tensor:
        saved.require_unchanged()
        if not isinstance(saved.what, _View):
            return saved.what
        parked = saved.what.parked
        with self._lock:
            parked.fetch()
            # Backward goes the other way through what forward parked.
            for index in range(parked.index - 1, parked.index - 1 - self._prefetch, -1):
                ahead = self._by_index.get(index)
                if ahead is not None:
                    ahead.fetch()
            return saved.what.on(parked.take())


def _worth_parking(tensor: torch.Tensor) -> bool:
    """Whether parking the tensor could free its memory: a parameter stays alive anyway."""
    origin = tensor if tensor._base is None else tensor._base
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "cuda")
        and not isinstance(origin, nn.Parameter)
        and not (origin.is_leaf and origin.requires_grad)
        and not tensor.is_neg()
        and tensor.numel() > 0
    )


def _regions(tensor: torch.Tensor) -> list[_Region]:
    """The regions that would hold the tensor, the last of them to be parked."""
    storage = tensor.untyped_storage()
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset())
    start = first * tensor.itemsize // _ALIGNMENT * _ALIGNMENT
    stop = (first + last + 1) * tensor.itemsize
    at = storage._cdata, tensor._version
    whole, span = _Region(*at, 0, storage.nbytes()), _Region(*at, start, stop)
    return [whole] if whole.stop <= _WHOLE_UP_TO * (stop - start) else [whole, span]


def _bytes(
    storage: torch.UntypedStorage, start: int, size: int, device: torch.device
) -> torch.Tensor:
    """Bytes of a storage as a tensor."""
    found = torch.empty(0, dtype=torch.uint8, device=device)
    return found.set_(storage, start, (size,), (1,))


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return _streams.get(device) or _streams.setdefault(device, torch.cuda.Stream(device))
