"""What ranks run in the tests of agreement and faults."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dilated_core import DilatedPattern, dilated_attention
from dilated_core._spans import DilatedSpans
from dilated_core.interfaces import SpanAttention
from dilated_ring import (
    RingError,
    _exchange,
    _faults,
    ring_attention,
    shard_sequence,
    shared_loss,
    unshard_sequence,
)
from dilated_ring._agreement import Fact, Validate, agree
from dilated_ring._faults import Call, Work, line_of
from process_ranks import device


def compare(
    facts: Sequence[dict[str, Fact]], errors: Sequence[Exception | None], validate: Validate,
    rest: Sequence[dict[str, Fact]] | None = None,
) -> None:  # fmt: skip
    """Compare what each rank is given, as the first thing of a call."""
    rank = dist.get_rank()
    assert dist.group.WORLD is not None
    with Call(dist.group.WORLD, device(), "forward") as call:
        agree(call, facts[rank], errors[rank], validate, rest[rank] if rest else None)


def compare_but(skipping: int, validate: Validate = "always") -> list[float]:
    """Compare and exchange; one rank goes straight to the exchange."""
    assert dist.group.WORLD is not None
    with Call(dist.group.WORLD, device(), "forward") as call:
        if dist.get_rank() != skipping:
            agree(call, {}, None, validate)
        return exchange(call)


def exchange(call: Call) -> list[float]:
    """Send this rank's number to all."""
    call.step = "exchange"
    world = dist.get_world_size()
    sent = torch.full((world,), float(dist.get_rank()), device=device())
    received = torch.empty_like(sent)
    call.wait(cast(Work, dist.all_to_all_single(received, sent, async_op=True)))
    return cast(list[float], received.tolist())


class Source:
    """A buffer source that counts what is lent, and may fail at its `failing`-th lease."""

    def __init__(self, failing: int | None) -> None:
        self.leases: list[Lease] = []
        self._failing = failing

    @contextmanager
    def borrow(
        self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str
    ) -> Iterator[Tensor]:
        """Not used by ring attention."""
        raise NotImplementedError
        yield

    def lease(
        self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str
    ) -> "Lease":
        """Lend a tensor."""
        if len(self.leases) == self._failing:
            suffer("memory")
        self.leases.append(Lease(torch.empty(tuple(shape), dtype=dtype, device=device)))
        return self.leases[-1]


@dataclass
class Lease:
    """A tensor on loan."""

    tensor: Tensor
    released: bool = False

    def release(self) -> None:
        """Give it back."""
        self.released = True


class FaultyPattern:
    """A pattern to whose process something happens when a method of it is called."""

    def __init__(self, pattern: DilatedPattern, method: str, fault: str) -> None:
        self.code = pattern.code
        self.spans = FaultySpans(pattern.spans, method, fault)


class FaultySpans:
    """The attention of a `FaultyPattern`."""

    def __init__(self, spans: SpanAttention, method: str, fault: str) -> None:
        self._spans, self._method, self._fault = spans, method, fault

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            suffer(self._fault)
        return getattr(self._spans, name)


@dataclass(frozen=True)
class Report:
    """How a call ended on one rank, in words that can be sent.

    Attributes:
        error: the exception, or None.
        cause: the text of its cause.
        lent: how many buffers were lent.
        kept: how many were not given back.
        waited: the longest wait for one message, in seconds.
    """

    error: BaseException | None
    cause: str
    lent: int
    kept: int
    waited: float


def attend(faulty: int, place: str, fault: str, strategy: str, healthy: int = 0) -> Report:
    """Forward and backward of ring attention; something happens to one rank at a place of it.

    Before that come `healthy` steps in which nothing does: they load kernels.
    """
    pattern: Any = DilatedPattern([4, 1000], [1, 2])
    source = Source(None)
    torch.manual_seed(dist.get_rank())
    query, key, value = (torch.randn(2, 8, 4, 8, device=device()).requires_grad_() for _ in "qkv")
    # Only where queries see the keys before them do ranks have more and less to do.
    how: dict[str, Any] = {"strategy": strategy, "is_causal": strategy == "lend"}
    for _ in range(healthy):
        cast(Tensor, ring_attention(query, key, value, pattern, **how)).sum().backward()
    if dist.get_rank() == faulty:
        if place.startswith("lease"):
            source = Source(int(place.removeprefix("lease ")))
        else:
            pattern = FaultyPattern(pattern, place, fault)
    error: BaseException | None = None
    waits: list[float] = []
    try:
        with timed_waits(waits):
            for _ in range(2):  # a rank that needs nothing more in the first call knows in the next
                out = cast(
                    Tensor,
                    ring_attention(query, key, value, pattern, buffers=source, **how),
                )
                out.square().sum().backward()
    except RingError as caught:
        error = caught
    kept = sum(not lease.released for lease in source.leases)
    return Report(
        error, repr(error and error.__cause__), len(source.leases), kept, max(waits, default=0.0)
    )


@contextmanager
def timed_waits(seconds: list[float]) -> Iterator[None]:
    """Note how long each wait for a message takes, whether or not it arrives."""
    wait = Call.wait

    def timed(call: Call, work: Work) -> None:
        started = time.monotonic()
        try:
            wait(call, work)
        finally:
            seconds.append(time.monotonic() - started)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Call, "wait", timed)
        yield


def order_of_waits(strategy: str, at_first_launch: bool) -> list[list[str]]:
    """What calls do in turn: "wait" for a message, "attend" to this rank's own keys.

    Two calls with one pattern, and one with another.
    """
    pattern, other = DilatedPattern([4, 1000], [1, 2]), DilatedPattern([8, 1000], [1, 2])
    query = torch.randn(1, 8, 4, 8, device=device())
    done: list[str] = []

    def note(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            done.append(name)
            return function(*arguments)

        return call

    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_exchange, "loads_at_launch", lambda _: at_first_launch)
        patch.setattr(DilatedSpans, "attend_span", note("attend", DilatedSpans.attend_span))
        patch.setattr(Call, "wait", note("wait", Call.wait))
        for given in (pattern, pattern, other):
            causal = strategy == "lend"
            ring_attention(
                query, query, query, given, is_causal=causal, strategy=strategy, validate="off"
            )
            calls.append(done.copy())
            done.clear()
    return calls


def exchange_twice(faulty: int, fault: str) -> list[float]:
    """Exchange, compute, exchange again; between the two, something happens to one rank."""
    assert dist.group.WORLD is not None
    with Call(dist.group.WORLD, device(), "forward") as call:
        exchange(call)
        call.step = "local branches"
        if dist.get_rank() == faulty:
            suffer(fault)
        return exchange(call)


def lose_store_and(faulty: int, fault: str) -> list[float]:
    """As `exchange_twice`, where the store went down with the process that it lived in."""
    assert dist.group.WORLD is not None
    line_of(dist.group.WORLD).board._store = None  # type: ignore[assignment]  # nothing answers
    return exchange_twice(faulty, fault)


def wait_where_aborts_hang(timeout: float) -> None:
    """On rank 0, wait as on CUDA for what never comes."""
    assert dist.group.WORLD is not None
    if dist.get_rank() != 0:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_faults, "timeout_of", lambda *_: timeout)
        patch.setattr(_faults, "_done_on_cuda", lambda _, seconds: time.sleep(seconds))
        patch.setattr(Call, "_groups", [HangingGroup()])
        with Call(dist.group.WORLD, torch.device("cuda"), "forward") as call:
            call.wait(cast(Work, None))


class HangingGroup:
    """A process group whose aborts wait for ranks that are gone."""

    def _get_backend(self, _: torch.device) -> "HangingGroup":
        return self

    def abort(self) -> None:
        """Wait."""
        time.sleep(60)


def suffer(fault: str) -> None:
    """Let a fault happen to this process."""
    if fault == "exception":
        raise ArithmeticError("seven is not prime enough")
    if fault == "memory":
        raise torch.OutOfMemoryError("tried to allocate 7 PiB")
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "slow":
        time.sleep(3.5)


def once_more() -> Any:
    """One more call on the group."""
    assert dist.group.WORLD is not None
    with Call(dist.group.WORLD, device(), "forward") as call:
        return exchange(call)


def exchange_unless_refused(refusing: int) -> list[float]:
    """Exchange without any comparison; the arguments of one rank are wrong."""
    assert dist.group.WORLD is not None
    with Call(dist.group.WORLD, device(), "forward") as call:
        wrong = ValueError("w must be > 0. Got 0.") if dist.get_rank() == refusing else None
        agree(call, {}, wrong, "off")
        return exchange(call)


def attend_differently(what: str) -> torch.dtype:
    """One forward in which the last rank differs; return the dtype of the result."""
    differs = dist.get_rank() == dist.get_world_size() - 1
    different = what if differs else "nothing"
    query = torch.zeros(2, 7, 4, 8, device=device())
    given = {"length": query[:, 1:], "dtype": query.double()}.get(different, query)
    if what == "documents":
        given = query[:1]
    if different == "invalid":
        given = query[0]
    if different == "gradient":
        given = query.clone().requires_grad_()
    pattern = DilatedPattern([5, 1000] if different == "pattern" else [4, 1000], [1, 2])
    ends = torch.tensor([0, 5 if different == "documents" else 7])
    mask = torch.zeros(2, 7, dtype=torch.bool, device=device()) if different == "mask" else None
    with torch.autocast(device().type, torch.bfloat16, enabled=different == "autocast"):
        out = ring_attention(
            given, given, given, pattern, is_causal=different == "causal", validate="always",
            cu_seqlens=ends if what == "documents" else None, key_padding_mask=mask,
            strategy="ring" if different == "strategy" else "auto",
        )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.dtype


def err_around(what: str) -> None:
    """A call of what there is around attention, whose arguments on the last rank are wrong."""
    wrong = dist.get_rank() == dist.get_world_size() - 1
    rows = torch.ones(1, 8, device=device())
    if what == "cut":
        mask = torch.zeros(1, 8 - wrong, dtype=torch.bool, device=device())
        shard_sequence(rows, key_padding_mask=mask)
    elif what == "put together":
        unshard_sequence(rows, length=1000 if wrong else 3)
    elif what == "loss":
        shared_loss(torch.ones(3, device=device()) if wrong else None, rows)
    else:
        shared_loss(rows.sum(), rows, weight="x" if wrong else 1)  # type: ignore[arg-type]  # wrong


def steps_of_lengths(lengths: Sequence[int]) -> list[float]:
    """Steps of training on chunks of sequences; how far the output of each is off."""
    rank, world = dist.get_rank(), dist.get_world_size()
    pattern = DilatedPattern([8, 64], [1, 2])
    off = []
    for step, length in enumerate(lengths):
        torch.manual_seed(step)
        whole = torch.randn(1, length, 4, 8, dtype=torch.float64).to(device())
        rows = whole.tensor_split(world, 1)[rank].clone().requires_grad_()
        out = ring_attention(rows, rows, rows, pattern)
        assert isinstance(out, Tensor)
        out.square().sum().backward()
        true = dilated_attention(whole, whole, whole, pattern)
        assert isinstance(true, Tensor)
        off.append((out - true.tensor_split(world, 1)[rank]).abs().max().item())
    return off


def part_ways(what: str) -> None:
    """The last rank does something else than the others after two like steps."""
    last = dist.get_rank() == dist.get_world_size() - 1
    pattern = DilatedPattern([64], [1])
    torch.manual_seed(0)
    rows = torch.randn(1, 8, 4, 8, device=device(), requires_grad=True)

    def attend_once() -> Tensor:
        out = ring_attention(rows, rows, rows, pattern)
        assert isinstance(out, Tensor)
        return out

    for _ in range(2):
        attend_once().sum().backward()
    first, second = attend_once(), attend_once()
    if what == "no backward":
        if not last:
            second.sum().backward()
        attend_once()
    elif what == "another backward":
        (first if last else second).sum().backward()
    elif what == "uneven rows":
        unshard_sequence(rows[:, 1:] if last else rows)
    elif what == "another call":
        unshard_sequence(rows) if last else second.sum().backward()
