"""The strategy "heads": the ranks of a segment trade rows for heads, and back.

A clique's rows go to the ranks that have their heads, with queries, keys and values in one
message; each rank attends whole segments for its heads and sends the results back. That is all-to-
all sequence parallelism (DeepSpeed Ulysses, arXiv 2309.14509) on the rows that a branch keeps.
B batch, n rows of this rank, H query heads, H_kv key heads, D head_dim.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_core import Partial
from dilated_core.extending import (
    RowAttention,
    Upstream,
    accumulate_dtype,
    attend_rows,
    attend_rows_backward,
    keep_mask,
    merge_,
)
from dilated_core.interfaces import BufferSource, KeyRows, SpanCall
from dilated_ring._attention import KeptRows
from dilated_ring._exchange import Wire, open_wire
from dilated_ring._topology import Ring
from dilated_ring._trade import HeadGroup, Indices, Trade


@dataclass(frozen=True, eq=False)
class HeadsJob:
    """What one call asks of this rank, by trading heads (as `Job`)."""

    call: SpanCall
    ring: Ring
    trade: Trade
    buffers: BufferSource | None
    kind: tuple[str, str]
    agreed: int | None

    def forward(self, query: Tensor, keys: KeyRows) -> tuple[Partial, list[KeptRows]]:
        """The merged partial of all keys, and what arrived."""
        index = self.trade.on(query.device)
        dtype = accumulate_dtype(query.dtype)
        with open_wire(self, query, keys, "forward") as wire:
            swap = _Swap(wire, self.trade, index)
            arrive = swap.start_rows(query, keys)
            total = self._attend_local(query, keys, dtype)
            rows, padding = arrive()
            out = query.new_empty(len(index.order_received[0]), *_sizes(rows))
            lse = out.new_empty(out.shape[:2], dtype=dtype)
            for group, (q, k, v), how in self._groups(index, rows, padding):
                part = attend_rows(how, q, k, v)
                out[group.queries] = _by_row(part.out.to(out.dtype))
                lse[group.queries] = _by_row(part.lse.unsqueeze(-1)).squeeze(-1)
            wire.call.step = "return of results"
            out, lse = swap.return_queries(out), swap.return_queries(lse)
            row, head = index.sent_queries
            for mine in index.cliques:
                at = (slice(None), row[mine], head[mine])
                there = (slice(None), head[mine], row[mine])
                merged = Partial(total.out[at], total.lse[there])
                merge_(merged, Partial(out[mine].transpose(0, 1), lse[mine].T))
                total.out[at], total.lse[there] = merged
        return total, [KeptRows(rows, padding)]

    def backward(
        self, upstream: Upstream, padding: Tensor | None, kept: Sequence[KeptRows]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients to this rank's query, key and value, wide."""
        grad_out, grad_lse, query, key, value, total = upstream
        keys = KeyRows(key, value, padding)
        dtype = accumulate_dtype(query.dtype)
        index = self.trade.on(query.device)
        ((rows, masks),) = kept
        # What the gradient of a score subtracts; its owner knows it without sending its output.
        delta = (grad_out.to(dtype) * total.out.to(dtype)).sum(-1).transpose(1, 2)
        if grad_lse is not None:
            delta = delta - grad_lse
        with open_wire(self, query, keys, "backward") as wire:
            swap = _Swap(wire, self.trade, index)
            row, head = index.sent_queries
            at = (slice(None), head, row)
            numbers = torch.stack([total.lse[at], delta[at]], -1).transpose(0, 1)
            arrive_grad = swap.start_queries(grad_out[:, row, head].transpose(0, 1))
            arrive_numbers = swap.start_queries(numbers)
            dq, dk, dv = self._local_backward(upstream, keys, dtype)
            grads, numbers = arrive_grad(), arrive_numbers()
            home = wire.leases.empty(tuple(rows.shape), dtype).zero_()
            order = index.order_received
            for group, (q, k, v), how in self._groups(index, rows, masks):
                do, lse, shift = (
                    _by_head(x[group.queries]) for x in (grads, numbers[..., :1], numbers[..., 1:])
                )
                parts = attend_rows_backward(
                    how, do, -shift.squeeze(-1), q, k, v,
                    Partial(torch.zeros_like(do, dtype=dtype), lse.squeeze(-1)),
                )  # fmt: skip
                home[order[0][group.queries]] = _by_row(parts[0]).to(dtype)
                for place, part in zip(order[1:], parts[1:], strict=True):
                    # Query heads of one key head may read the same rows.
                    for j in range(len(group.heads)):
                        home[place[group.keys[j]]] += part[:, j].transpose(0, 1).to(dtype)
            home = swap.return_rows(home)
            q_, k_, v_ = (home[place] for place in index.order_sent)
            for mine in index.cliques:
                dq[:, row[mine], head[mine]] += q_[mine].transpose(0, 1)
            row, head = index.sent_keys
            for mine in index.key_cliques:
                dk[:, row[mine], head[mine]] += k_[mine].transpose(0, 1)
                dv[:, row[mine], head[mine]] += v_[mine].transpose(0, 1)
        return dq, dk, dv

    def _attend_local(self, query: Tensor, keys: KeyRows, dtype: torch.dtype) -> Partial:
        if self.trade.local is not None:
            return self.trade.local.attend_span(self.call, query, keys)
        batch, length, heads, _ = query.shape
        lse = query.new_full((batch, heads, length), -torch.inf, dtype=dtype)
        return Partial(torch.zeros_like(query, dtype=dtype), lse)

    def _local_backward(
        self, upstream: Upstream, keys: KeyRows, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_out, grad_lse, query, key, value, total = upstream
        if self.trade.local is not None:
            return self.trade.local.attend_span_backward(
                self.call, grad_out, grad_lse, query, keys, total
            )
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (query, key, value))
        return dq, dk, dv

    def _groups(
        self, index: Indices, rows: Tensor, padding: Tensor | None
    ) -> Iterator[tuple[HeadGroup, tuple[Tensor, Tensor, Tensor], RowAttention]]:
        """Heads to attend at once: their query, key and value (B, h, m, D), and how."""
        for group in index.groups:
            places = group.queries, group.keys, group.keys
            q, k, v = (
                _by_head(rows[order[place]])
                for order, place in zip(index.order_received, places, strict=True)
            )
            mask = None
            if padding is not None:
                mask = padding[group.keys[0]].T.to(torch.bool)
            keep = self._keep(group, q.shape[0]) if self.call.dropout_p else None
            yield (
                group,
                (q, k, v),
                RowAttention(self.call.scale, self.call.is_causal, mask, keep, self.call.dropout_p),
            )

    def _keep(self, group: HeadGroup, batch: int) -> Callable[[range], Tensor]:
        assert self.call.seed is not None
        seed, at = int(self.call.seed), group.positions
        index = torch.arange(batch, device=at.device)[:, None, None, None]

        def keep(rows: range) -> Tensor:
            head = group.heads[:, None, None]
            queries = at[rows.start : rows.stop, None]
            return keep_mask(seed, self.call.dropout_p, index, head, queries, at)

        return keep


class _Swap:
    """The messages of one pass."""

    def __init__(self, wire: Wire, trade: Trade, index: Indices) -> None:
        self._wire, self._trade, self._index = wire, trade, index
        self._queries = trade.counts(trade.received, 0), trade.counts(trade.sent, 0)
        self._keys = trade.counts(trade.received, 1), trade.counts(trade.sent, 1)

    def start_rows(
        self, query: Tensor, keys: KeyRows
    ) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """Send queries, keys and values; the function waits for (R, B, D) and the mask of keys."""
        received, sent = self._trade.message_rows
        shape = sum(sent), query.shape[0], query.shape[3]
        message = self._wire.leases.empty(shape, query.dtype)
        row, head = self._index.sent_queries
        order = self._index.order_sent
        message[order[0]] = query[:, row, head].transpose(0, 1)
        row, head = self._index.sent_keys
        message[order[1]] = keys.key[:, row, head].transpose(0, 1)
        message[order[2]] = keys.value[:, row, head].transpose(0, 1)
        rows = self._start(message, received, sent, "trade of rows for heads")
        mask: Callable[[], Tensor | None] = lambda: None  # noqa: E731  # the other is a call
        if keys.padding is not None:
            packed = keys.padding[:, row].T.to(torch.uint8).contiguous()
            mask = self._start(packed, *self._keys, "trade of masks")
        return lambda: (rows(), mask())

    def start_queries(self, rows: Tensor) -> Callable[[], Tensor]:
        """Send something for each query (R, B, ...) to where its head is attended."""
        return self._start(rows.contiguous(), *self._queries, "trade of gradients")

    def return_queries(self, rows: Tensor) -> Tensor:
        """Send something for each query (R, B, ...) back to where it came from."""
        received, sent = self._queries
        return self._start(rows, sent, received, "return of results")()

    def return_rows(self, rows: Tensor) -> Tensor:
        """Send gradients (R, B, D) back to where the rows came from."""
        received, sent = self._trade.message_rows
        return self._start(rows, sent, received, "return of gradients")()

    def _start(
        self, message: Tensor, received: list[int], sent: list[int], step: str
    ) -> Callable[[], Tensor]:
        arrived = message.new_empty(sum(received), *message.shape[1:])
        work = self._wire.swap(arrived, message, received, sent)

        def wait() -> Tensor:
            self._wire.call.step = step
            self._wire.call.wait(work)
            return arrived

        return wait


def _sizes(rows: Tensor) -> tuple[int, int]:
    return rows.shape[1], rows.shape[2]


def _by_head(rows: Tensor) -> Tensor:
    """(h, m, B, D) to (B, h, m, D)."""
    return rows.permute(2, 0, 1, 3)


def _by_row(heads: Tensor) -> Tensor:
    """(B, h, m, D) to (h, m, B, D)."""
    return heads.permute(1, 2, 0, 3)
