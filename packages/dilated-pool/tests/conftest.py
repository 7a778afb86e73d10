"""Backends for the conformance suite, among them fake devices whose work ends when told to."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dilated_pool import UnifiedMemoryPool
from dilated_pool._memory import PageableMemory


class FakeFence:
    """Ends when all work that was submitted before it has ended."""

    def __init__(self, fences: "FakeFences", queues: Any) -> None:
        self._fences = fences
        self._marks = {queue: fences.submitted[queue] for queue in queues}

    def done(self) -> bool:
        return all(self._fences.ended[queue] >= mark for queue, mark in self._marks.items())

    def wait(self) -> None:
        for queue in self._marks:
            self._fences.finish(queue)
        self._fences.waits += 1


class FakeFences:
    """Queues of a device that does not exist: work on them ends when `finish` says so."""

    def __init__(self, *, stream_ordered: bool) -> None:
        self.stream_ordered = stream_ordered
        self.queue = "first"
        self.graph = False
        self.submitted: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.waits = 0

    def capturing(self) -> bool:
        return self.graph

    def current(self) -> str:
        return self.queue

    def record(self, queues: Any) -> FakeFence:
        assert not self.graph, "an event was recorded during a capture"
        return FakeFence(self, queues)

    def submit(self) -> None:
        """Queue one piece of work."""
        self.submitted[self.queue] += 1

    def finish(self, queue: str) -> None:
        """Let all work of a queue end."""
        self.ended[queue] = self.submitted[queue]


class FakeDeviceMemory(PageableMemory):
    """Host memory that is reused like the memory of a device."""

    name = "fake"

    def __init__(self, *, stream_ordered: bool) -> None:
        super().__init__()
        self.fences = FakeFences(stream_ordered=stream_ordered)


@dataclasses.dataclass
class Backend:
    """How to make a pool of one backend and what to ask it for."""

    name: str
    place: dict[str, Any]
    fences: FakeFences | None = None
    memory: FakeDeviceMemory | None = None

    def pool(self, *args: Any, **settings: Any) -> UnifiedMemoryPool:
        pool = UnifiedMemoryPool(*args, **settings)
        if self.memory is not None:
            pool._stock.memories[torch.device("cpu"), False] = self.memory
        return pool

    def finish(self) -> None:
        """Wait until all work of the device has ended."""
        if self.fences is not None:
            for queue in list(self.fences.submitted):
                self.fences.finish(queue)
        elif self.name in ("pinned", "cuda"):
            torch.cuda.synchronize()

    @property
    def granule(self) -> int:
        return {"pinned": 4096, "cuda": 512}.get(self.name, 64)


def make_backend(name: str) -> Backend:
    if name in ("device", "host of a device"):
        memory = FakeDeviceMemory(stream_ordered=name == "device")
        return Backend(name, {"device": "cpu"}, memory.fences, memory)
    if name == "pinned":
        return Backend(name, {"device": "cpu", "pin_memory": True})
    return Backend(name, {"device": "cuda" if name == "cuda" else "cpu"})


BACKENDS = [
    "pageable",
    "device",
    "host of a device",
    pytest.param("pinned", marks=pytest.mark.gpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param)


@pytest.fixture(params=["device", "host of a device"])
def fake(request: pytest.FixtureRequest) -> Backend:
    return make_backend(request.param)


@pytest.fixture
def backend_by_name() -> Callable[[str], Backend]:
    return make_backend
