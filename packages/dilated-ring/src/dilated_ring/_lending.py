"""The strategy "lend": ranks with little to do attend queries of others to their own keys.

Lent queries fly first. Beside them fly the keys that the other queries see, as in "gather". Partial
results come back and are merged; in the backward gradients go the same ways.
B batch, n rows of this rank, R lent rows, T rows of one loan, H query heads, D head_dim.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dilated_core import Partial
from dilated_core.extending import Upstream, accumulate_dtype, merge_, remembered
from dilated_core.interfaces import BufferSource, KeyRows, SpanAttention, SpanCall
from dilated_ring._attention import KeptRows
from dilated_ring._exchange import Index, Rows, Wire, open_wire, pack, unpack
from dilated_ring._loans import Ledger
from dilated_ring._topology import Ring


@dataclass(frozen=True, eq=False)
class LendJob:
    """What one call asks of this rank, by lending queries (as `Job`)."""

    spans: SpanAttention
    call: SpanCall
    ring: Ring
    ledger: Ledger
    buffers: BufferSource | None
    kind: tuple[str, str]
    agreed: int | None

    def forward(self, query: Tensor, keys: KeyRows) -> tuple[Partial, list[KeptRows]]:
        """The merged partial of all keys, and what arrived."""
        ledger, dtype = self.ledger, accumulate_dtype(query.dtype)
        rows, own_rows = _rows(ledger)
        with open_wire(self, query, keys, "forward") as wire:
            arrive = self._lend(wire, query, "exchange of queries", keep=True)
            flight = rows.start(wire, keys, keep=True)
            wire.call.step = "attention to this rank's keys"
            total = self.spans.attend_span(self.call, query, keys)
            queries = arrive()
            wire.call.step = "attention of lent queries"
            out = wire.leases.empty(tuple(queries.shape), queries.dtype)
            lse = wire.leases.empty(tuple(queries.shape[:3]), dtype)
            for (span, here, packed), index in zip(ledger.helped, own_rows, strict=True):
                q = queries[here].transpose(0, 1)
                part = Partial(
                    torch.zeros_like(q, dtype=dtype),
                    lse.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf),
                )
                call = replace(self.call, queries=span)
                with _packed(wire, keys, index) as own_keys:
                    self.spans.attend_packed_(call, part, q, own_keys, [packed])
                out[here], lse[here] = part.out.transpose(0, 1), part.lse.permute(2, 0, 1)
            returns = [self._return(wire, x, "return of results") for x in (out, lse)]
            arrived = flight.wait("exchange of keys and values")
            wire.call.step = "attention to keys of other ranks"
            for span, foreign, here in ledger.rests:
                own = slice(0, len(span))
                self.spans.attend_packed_(
                    replace(self.call, queries=span), _of(total, own), query[:, own],
                    _slice(arrived.keys(), here), foreign,
                )  # fmt: skip
            out, lse = (wait() for wait in returns)
            for own, here in ledger.lent:
                by_head = Partial(total.out[:, own].transpose(1, 2), total.lse[:, :, own])
                merge_(by_head, Partial(out[here].permute(1, 2, 0, 3), lse[here].permute(1, 2, 0)))
        return total, [KeptRows(arrived.rows, arrived.padding), KeptRows(queries, None)]

    def backward(
        self, upstream: Upstream, padding: Tensor | None, kept: Sequence[KeptRows]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients to this rank's query, key and value, wide."""
        grad_out, grad_lse, query, key, value, total = upstream
        ledger, keys, dtype = self.ledger, KeyRows(key, value, padding), total.lse.dtype
        (foreign, masks), (queries, _) = kept
        rows, own_rows = _rows(ledger)
        with open_wire(self, query, keys, "backward") as wire:
            # Some ranks may have a gradient of lse, and others none: all send one.
            shift = torch.zeros_like(total.lse) if grad_lse is None else grad_lse.to(dtype)
            numbers = torch.stack([total.lse.transpose(1, 2), shift.transpose(1, 2)], -1)
            step = "exchange of results and their gradients"
            arrive = [self._lend(wire, x, step) for x in (total.out, grad_out, numbers)]
            wire.call.step = "gradients of keys of other ranks"
            message = wire.leases.empty(tuple(foreign.shape), dtype)
            adds: list[tuple[slice, Callable[[Tensor], None]]] = []
            for span, packed, here in ledger.rests:
                own = slice(0, len(span))
                at_lse = None if grad_lse is None else grad_lse[:, :, own]
                adds.append((own, self.spans.attend_packed_backward(
                    replace(self.call, queries=span), grad_out[:, own], at_lse, query[:, own],
                    _slice(unpack(foreign, masks), here), packed, _of(total, own),
                    _slice(unpack(message), here),
                )))  # fmt: skip
            flight = rows.start_home(wire, message)
            wire.call.step = "gradients of this rank's keys"
            dq, dk, dv = self.spans.attend_span_backward(
                self.call, grad_out, grad_lse, query, keys, total
            )
            for own, add in adds:
                add(dq[:, own])
            results, grads, numbers = (wait() for wait in arrive)
            wire.call.step = "gradients of lent queries"
            to_owners = wire.leases.empty(tuple(queries.shape), dtype)
            for (span, here, helped), index in zip(ledger.helped, own_rows, strict=True):
                q, out, do = (x[here].transpose(0, 1) for x in (queries, results, grads))
                lse, shift = (x.permute(1, 2, 0) for x in numbers[here].unbind(-1))
                to_keys = wire.leases.empty((helped.count, len(do), 2, q.shape[3]), dtype)
                to_queries = torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format)
                with _packed(wire, keys, index) as own_keys:
                    self.spans.attend_packed_backward(
                        replace(self.call, queries=span), do, _any(shift), q, own_keys, [helped],
                        Partial(out, lse), unpack(to_keys),
                    )(to_queries)  # fmt: skip
                to_owners[here] = to_queries.transpose(0, 1)
                index.add(to_keys, dk, dv)
                wire.leases.release(to_keys)
            returned = self._return(wire, to_owners, "return of gradients of queries")
            landed = flight.wait("return of gradients")
            rows.land(landed.rows, dk, dv)
            landed.release()
            home = returned()
            for own, here in ledger.lent:
                dq[:, own] += home[here].transpose(0, 1)
        return dq, dk, dv

    def _lend(
        self, wire: Wire, each: Tensor, step: str, *, keep: bool = False
    ) -> Callable[[], Tensor]:
        """Send something of lent queries (B, n, ...); the function waits for (R, B, ...)."""
        ledger, (batch, _, *rest) = self.ledger, each.shape
        sent = wire.leases.empty((sum(ledger.sent), batch, *rest), each.dtype)
        for own, here in ledger.lent:
            sent[here] = each[:, own].transpose(0, 1)
        return _start(wire, sent, ledger.received, ledger.sent, step, keep=keep)

    def _return(self, wire: Wire, each: Tensor, step: str) -> Callable[[], Tensor]:
        """Send something of queries that arrived (R, B, ...) back to where they came from."""
        return _start(wire, each, self.ledger.sent, self.ledger.received, step)


def _start(
    wire: Wire, message: Tensor, received: list[int], sent: list[int], step: str,
    *, keep: bool = False,
) -> Callable[[], Tensor]:  # fmt: skip
    shape = sum(received), *message.shape[1:]
    arrived = message.new_empty(shape) if keep else wire.leases.empty(shape, message.dtype)
    work = wire.swap(arrived, message, received, sent)

    def wait() -> Tensor:
        wire.call.step = step
        wire.call.wait(work)
        return arrived

    return wait


@remembered(64)
def _rows(ledger: Ledger) -> tuple[Rows, tuple[Index, ...]]:
    """The keys that travel, and those of this rank that each loan sees."""
    own = tuple(Index([helped.packed]) for helped in ledger.helped)
    return Rows(ledger.route, len(ledger.sent)), own


@contextmanager
def _packed(wire: Wire, keys: KeyRows, index: Index) -> Iterator[KeyRows]:
    """Packed rows of keys and values (B, n, H_kv, D) of this rank."""
    row, head = index.on(keys.key)
    batch, _, _, width = keys.key.shape
    message = wire.leases.empty((len(row), batch, 2, width), keys.key.dtype)
    pack(message, keys, row, head)
    yield unpack(message, None if keys.padding is None else keys.padding[:, row].T)
    wire.leases.release(message)


def _any(grad_lse: Tensor) -> Tensor | None:
    """None where it is zero, on CPUs, whose fused attention has no such gradient."""
    known = grad_lse.device.type == "cpu" and not isinstance(grad_lse, FakeTensor)
    return None if known and not grad_lse.any() else grad_lse


def _slice(keys: KeyRows, here: slice) -> KeyRows:
    padding = None if keys.padding is None else keys.padding[:, here]
    return KeyRows(keys.key[:, here], keys.value[:, here], padding)


def _of(total: Partial, own: slice) -> Partial:
    return Partial(total.out[:, own], total.lse[:, :, own])
