"""Packed rows on the wire: keys and values in one message, and their gradients on the way back.

A message is (R, B, 2, D): R packed rows, each with key and value. The rows of all ranks are one
tensor, so that one collective moves them, and one view shows all that arrived.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from dilated_core.interfaces import BufferSource, KeyRows, PackedRows, SpanCall
from dilated_ring._agreement import Fact, agree
from dilated_ring._faults import Call, Work
from dilated_ring._leases import Leases
from dilated_ring._routes import Route
from dilated_ring._topology import Ring


@dataclass(frozen=True)
class Wire:
    """How one call talks to the other ranks.

    Attributes:
        call: waits for collectives, and turns faults into errors on all ranks.
        leases: where messages that end with the call live.
        ring: the ranks.
        at_once: whether to wait for each message before anything else is done.
    """

    call: Call
    leases: Leases
    ring: Ring
    at_once: bool

    def swap(
        self,
        received: Tensor,
        sent: Tensor,
        rows_received: list[int],
        rows_sent: list[int],
        group: dist.ProcessGroup | None = None,
    ) -> Work:
        """Start to send rows (first dimension) of `sent` to each rank, and receive likewise.

        The ranks are those of `group`, a part of the ring, where that is given.
        """
        work: Work | None = dist.all_to_all_single(
            received, sent, rows_received, rows_sent, group=group or self.ring.group, async_op=True
        )
        assert work is not None
        if self.at_once:
            self.call.wait(work)
        return work


class Asked(Protocol):
    """What one call is asked, beside its tensors."""

    @property
    def call(self) -> SpanCall:
        """The span of this rank, scale, dropout."""

    @property
    def ring(self) -> Ring:
        """The ranks."""

    @property
    def buffers(self) -> BufferSource | None:
        """Where messages live; torch when None."""

    @property
    def kind(self) -> tuple[str, str]:
        """The pattern, and how rows travel: with other ones go other kernels."""

    @property
    def agreed(self) -> int | None:
        """The number of the forward among those that the ranks compared; None: they do not."""


@contextmanager
def open_wire(asked: Asked, query: Tensor, keys: KeyRows, name: str) -> Iterator[Wire]:
    """What a forward or backward computes in: faults end on all ranks, and leases with it."""
    ring, options, device = asked.ring, asked.call, query.device
    # Leases end last: what a fault leaves in flight is done with its memory by then.
    with (
        torch.autocast(device.type, enabled=False),
        Leases(asked.buffers, device) as leases,
        Call(ring.group, device, name, ring.parts) as call,
    ):
        if name == "backward" and asked.agreed is not None:
            # Some ranks may be in the next forward, or in the backward of another one.
            facts: dict[str, Fact] = {"of forward": asked.agreed}
            agree(call, facts | {"shape of query": tuple(query.shape)})
        kernels = (
            *(name, asked.kind, device, query.dtype, query.shape[2:], keys.key.shape[2]),
            *(keys.padding is None, options.is_causal, options.dropout_p > 0),
        )
        first = kernels not in call.line.launched
        yield Wire(call, leases, ring, first and loads_at_launch(device))
        call.line.launched.add(kernels)


def loads_at_launch(device: torch.device) -> bool:
    """Whether the first launch of a kernel loads it.

    CUDA may wait with that until running kernels end, and one of NCCL runs until all ranks have
    come: where one of them is gone, the launch would hang, and with it the rank that should tell.
    """
    return device.type == "cuda"


class Index:
    """Rows and key heads that are sent, as tensors on a device; made once for each device."""

    def __init__(self, packed: Sequence[PackedRows]) -> None:
        self.packed = packed
        self._made: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The row and the key head of each packed row."""
        if isinstance(like, FakeTensor):
            # A fake index belongs to a mode that ends; the real one is made once.
            with unset_fake_temporarily():
                row, head = self.on(torch.empty(0))
            convert = like.fake_mode.from_tensor
            return convert(row).to(like.device), convert(head).to(like.device)
        if like.device not in self._made:
            self._made[like.device] = self._make(like.device)
        return self._made[like.device]

    @cached_property
    def parts(self) -> list[int]:
        """Sizes of consecutive parts without a row twice."""
        return [size for rows in self.packed for size in rows.parts]

    def add(self, home: Tensor, grad_key: Tensor, grad_value: Tensor) -> None:
        """Add rows (R, B, 2, D) to the rows of (B, n, H_kv, D) that they are the gradients of."""
        row, head = self.on(grad_key)
        first = 0
        # A part has no row twice, so the order of sums, and each bit of them, is always the same.
        for size in self.parts:
            here = slice(first, first + size)
            for grad, part in ((grad_key, home[here, :, 0]), (grad_value, home[here, :, 1])):
                grad[:, row[here], head[here]] += part.transpose(0, 1)
            first += size

    def _make(self, device: torch.device) -> tuple[Tensor, Tensor]:
        pairs = [rows.index() for rows in self.packed]
        if not pairs:
            nothing = torch.empty(0, dtype=torch.int64, device=device)
            return nothing, nothing
        row, head = (torch.cat(column) for column in zip(*pairs, strict=True))
        return row.to(device), head.to(device)


def pack(message: Tensor, keys: KeyRows, row: Tensor, head: Tensor) -> None:
    """Write rows of keys and values (B, n, H_kv, D) into a message (R, B, 2, D)."""
    message[:, :, 0] = keys.key[:, row, head].transpose(0, 1)
    message[:, :, 1] = keys.value[:, row, head].transpose(0, 1)


class Rows:
    """The rows of one route: sent before the attention, their gradients sent home after it."""

    def __init__(self, route: Route, world_size: int) -> None:
        self.route = route
        self.packed = route.received
        self.index = Index(route.sent)
        self.received, self.sent = route.splits(world_size)

    def start(self, wire: Wire, keys: KeyRows, *, keep: bool) -> "Flight":
        """Pack rows of keys (B, n, H_kv, D) and send them; with `keep` they outlive the call."""
        batch, _, _, width = keys.key.shape
        sent = self._message(wire, self.route.rows_sent, batch, width, keys.key.dtype)
        row, head = self.index.on(keys.key)
        pack(sent, keys, row, head)
        shape = self.route.rows_received, batch, 2, width
        received = keys.key.new_empty(shape) if keep else wire.leases.empty(shape, keys.key.dtype)
        works = [wire.swap(received, sent, self.received, self.sent)]
        padding = mask = None
        if keys.padding is not None:
            mask = wire.leases.empty((self.route.rows_sent, batch), torch.uint8)
            mask.copy_(keys.padding[:, row].T)
            padding = wire.leases.empty((self.route.rows_received, batch), torch.uint8)
            works.append(wire.swap(padding, mask, self.received, self.sent))
        return Flight(wire, works, received, (sent, mask), padding)

    def start_home(self, wire: Wire, grads: Tensor) -> "Flight":
        """Send gradients of rows that arrived back to where these came from."""
        _, batch, _, width = grads.shape
        home = self._message(wire, self.route.rows_sent, batch, width, grads.dtype)
        return Flight(wire, [wire.swap(home, grads, self.sent, self.received)], home, (grads,))

    def land(self, home: Tensor, grad_key: Tensor, grad_value: Tensor) -> None:
        """Add gradients that came home to those of the keys and values (B, n, H_kv, D)."""
        self.index.add(home, grad_key, grad_value)

    def _message(self, wire: Wire, rows: int, batch: int, width: int, dtype: torch.dtype) -> Tensor:
        return wire.leases.empty((rows, batch, 2, width), dtype)


@dataclass
class Flight:
    """A message on its way.

    Attributes:
        wire: how it travels.
        works: the collectives that carry it.
        rows: what arrives, (R, B, 2, D).
        sent: what was sent, needed until all of it has left.
        padding: the mask that comes with it, (R, B) uint8.
        then: starts what carries it on, when `works` are done.
    """

    wire: Wire
    works: list[Work]
    rows: Tensor
    sent: tuple[Tensor | None, ...]
    padding: Tensor | None = None
    then: Callable[[], list[Work]] | None = None

    def wait(self, step: str) -> Self:
        """Wait until all has arrived."""
        self.wire.call.step = step
        for work in self.works:
            self.wire.call.wait(work)
        for work in self.then() if self.then else ():
            self.wire.call.wait(work)
        self.wire.leases.release(*self.sent)
        return self

    def keys(self) -> KeyRows:
        """The packed rows, as views."""
        return unpack(self.rows, self.padding)

    def release(self) -> None:
        """Give back what arrived."""
        self.wire.leases.release(self.rows, self.padding)


def unpack(rows: Tensor, padding: Tensor | None = None) -> KeyRows:
    """Keys and values (B, R, D) of a message, and the mask (B, R)."""
    mask = None if padding is None else padding.T.to(torch.bool)
    return KeyRows(rows[:, :, 0].transpose(0, 1), rows[:, :, 1].transpose(0, 1), mask)
