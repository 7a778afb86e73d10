"""Attention of this rank's queries to the keys of all ranks, forward and backward.

The rows of other ranks fly while the keys of this one are attended; softmaxes are merged in
float32 or wider. The backward sends the gradients of foreign rows home while it computes those of
its own.
B batch, n rows of this rank, R packed rows, H query heads, H_kv key heads, D head_dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dilated_core import Partial
from dilated_core.extending import Upstream, accumulate_dtype
from dilated_core.interfaces import BufferSource, KeyRows, SpanAttention, SpanCall
from dilated_ring._exchange import Flight, Rows, Wire, open_wire, unpack
from dilated_ring._nodes import NodeRows
from dilated_ring._topology import Ring


class KeptRows(NamedTuple):
    """Packed rows that arrived in the forward and are kept for the backward.

    Attributes:
        rows: (R, B, 2, D).
        padding: (R, B) uint8, or None.
    """

    rows: Tensor
    padding: Tensor | None


@dataclass(frozen=True, eq=False)
class Job:
    """What one call asks of this rank.

    Attributes:
        spans: the attention of the pattern.
        call: the span of this rank, scale, dropout.
        ring: the ranks.
        rounds: the exchanges of packed rows, one after the other.
        keeps: whether rows that arrive are kept for the backward, rather than sent again.
        buffers: where messages live; torch when None.
        kind: the pattern, and how rows travel.
        agreed: the number of the forward among those that the ranks compared, or None.
    """

    spans: SpanAttention
    call: SpanCall
    ring: Ring
    rounds: Sequence[Rows | NodeRows]
    keeps: bool
    buffers: BufferSource | None
    kind: tuple[str, str]
    agreed: int | None

    def forward(self, query: Tensor, keys: KeyRows) -> tuple[Partial, list[KeptRows]]:
        """The merged partial of all keys, and the rows to keep."""
        kept: list[KeptRows] = []
        with open_wire(self, query, keys, "forward") as wire:
            flight = self._start(wire, 0, keys, keep=self.keeps)
            wire.call.step = "attention to this rank's keys"
            total = self.spans.attend_span(self.call, query, keys)
            for i, rows in enumerate(self.rounds):
                assert flight is not None
                arrived = flight.wait(f"exchange {i + 1} of keys and values")
                flight = self._start(wire, i + 1, keys, keep=self.keeps)
                wire.call.step = "attention to keys of other ranks"
                self.spans.attend_packed_(self.call, total, query, arrived.keys(), rows.packed)
                if self.keeps:
                    kept.append(KeptRows(arrived.rows, arrived.padding))
                else:
                    arrived.release()
        return total, kept

    def backward(
        self, upstream: Upstream, padding: Tensor | None, kept: Sequence[KeptRows]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients to this rank's query, key and value, wide."""
        grad_out, grad_lse, query, key, value, total = upstream
        keys = KeyRows(key, value, padding)
        with open_wire(self, query, keys, "backward") as wire:
            homeward = _Homeward()
            if kept:
                # Foreign rows first: their gradients travel while the rest is computed.
                for rows, (message, padding) in zip(self.rounds, kept, strict=True):
                    self._send_home(wire, homeward, rows, upstream, unpack(message, padding))
                flight = None
            else:
                flight = self._start(wire, 0, keys, keep=False)
            wire.call.step = "gradients of this rank's keys"
            dq, dk, dv = self.spans.attend_span_backward(
                self.call, grad_out, grad_lse, query, keys, total
            )
            for i, rows in enumerate(() if kept else self.rounds):
                assert flight is not None
                arrived = flight.wait(f"exchange {i + 1} of keys and values")
                flight = self._start(wire, i + 1, keys, keep=False)
                homeward.land(dq, dk, dv)
                self._send_home(wire, homeward, rows, upstream, arrived.keys())
                arrived.release()
            homeward.land(dq, dk, dv)
        return dq, dk, dv

    def _start(self, wire: Wire, number: int, keys: KeyRows, *, keep: bool) -> Flight | None:
        if number == len(self.rounds):
            return None
        wire.call.step = f"start of exchange {number + 1} of keys and values"
        return self.rounds[number].start(wire, keys, keep=keep)

    def _send_home(
        self,
        wire: Wire,
        homeward: "_Homeward",
        rows: Rows | NodeRows,
        upstream: Upstream,
        arrived: KeyRows,
    ) -> None:
        wire.call.step = "gradients of keys of other ranks"
        batch, count, width = arrived.key.shape
        dtype = accumulate_dtype(upstream.query.dtype)
        message = wire.leases.empty((count, batch, 2, width), dtype)
        grad_out, grad_lse, query, *_, total = upstream
        add = self.spans.attend_packed_backward(
            self.call, grad_out, grad_lse, query, arrived, rows.packed, total,
            unpack(message),
        )  # fmt: skip
        homeward.add(rows, rows.start_home(wire, message), add)


class _Homeward:
    """Gradients of foreign rows on their way home, and those of queries that wait to be added."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Rows | NodeRows, Flight, Callable[[Tensor], None]]] = []

    def add(self, rows: Rows | NodeRows, flight: Flight, add_to: Callable[[Tensor], None]) -> None:
        self._waiting.append((rows, flight, add_to))

    def land(self, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Wait for all of them and add them."""
        for rows, flight, add_to in self._waiting:
            add_to(dq)
            home = flight.wait("return of gradients")
            rows.land(home.rows, dk, dv)
            home.release()
        self._waiting.clear()


class Pass(Protocol):
    """A forward and its backward on this rank."""

    def forward(self, query: Tensor, keys: KeyRows) -> tuple[Partial, list[KeptRows]]:
        """The merged partial of all keys, and the rows to keep for the backward."""
        ...

    def backward(
        self, upstream: Upstream, padding: Tensor | None, kept: Sequence[KeptRows]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients to this rank's query, key and value, wide; `padding` is of its keys."""
        ...


def attend(
    job: Pass, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A job as a function with gradients: out (B, n, H, D) in query's dtype, lse (B, H, n)."""
    apply: Callable[..., tuple[Tensor, Tensor]] = _Attend.apply
    return apply(job, query, key, value, padding)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, job: Pass, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        total, kept = job.forward(query, KeyRows(key, value, padding))
        out, lse = total.out.to(query.dtype), total.lse
        ctx.job = job
        ctx.set_materialize_grads(False)
        arrived = [x for pair in kept for x in pair]
        ctx.save_for_backward(query, key, value, padding, out, lse, *arrived)
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # torch's once_differentiable lets it pass where grad_out needs no gradient.
        if torch.is_grad_enabled():
            raise RuntimeError("attention must be differentiated once only. Got create_graph=True.")
        query, key, value, padding, out, lse, *arrived = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(query)
        upstream = Upstream(grad_out, grad_lse, query, key, value, Partial(out, lse))
        kept = [KeptRows(*pair) for pair in zip(arrived[::2], arrived[1::2], strict=True)]
        grads = ctx.job.backward(upstream, padding, kept)
        return (None, *(grad.to(query.dtype) for grad in grads), None)
