"""Rows on their way through a mesh of nodes: once to each node that needs them, then inside it.

The rank of place l in a node sends to the ranks of place l in the other nodes what anyone there
needs, and each passes on inside its node what the others need. So between nodes, where links are
slow, a row travels once for each node instead of once for each rank.

Rows on this rank are kept as one tensor: those that leave the node, those that others in the node
need, those that arrived from other nodes.
"""

import torch
from torch import Tensor

from dilated_core.interfaces import KeyRows, PackedRows
from dilated_ring._exchange import Flight, Index, Wire, pack
from dilated_ring._faults import Work
from dilated_ring._routes import Problem
from dilated_ring._topology import Nodes


class NodeRows:
    """The rows of a mesh as one rank takes part in their exchange (as `Rows`)."""

    def __init__(self, problem: Problem, rank: int, nodes: Nodes) -> None:
        self.nodes = nodes
        here, place = divmod(rank, nodes.size)
        others = [node for node in range(problem.world_size // nodes.size) if node != here]
        neighbours = range(here * nodes.size, (here + 1) * nodes.size)

        def span(node: int) -> range:
            return problem.span(node * nodes.size, (node + 1) * nodes.size - 1)

        leaving = {node: problem.rows(span(node), rank) for node in others}
        arriving = {node: problem.rows(span(here), node * nodes.size + place) for node in others}
        own = {other: problem.rows(problem.span(other), rank) for other in neighbours
               if other != rank}  # fmt: skip
        self.packed = tuple(_inside(problem, rank, neighbours, others, nodes.size))
        self._index = Index([*leaving.values(), *own.values()])
        self._leaving = sum(rows.count for rows in leaving.values())
        self._own = sum(rows.count for rows in own.values())
        self._arriving = sum(rows.count for rows in arriving.values())
        count = len(others) + 1
        self._across = _splits(arriving, count), _splits(leaving, count)

        # What is passed on to each neighbour, as places in the tensor after the rows that leave.
        places, parts, sent = list[Tensor](), list[int](), dict[int, int]()
        first_own = 0
        for other in neighbours:
            before = len(parts)
            if other != rank:
                places.append(torch.arange(first_own, first_own + own[other].count))
                first_own += own[other].count
                parts += own[other].parts
            first = self._own
            for node, arrived in arriving.items():
                rows = problem.rows(problem.span(other), node * nodes.size + place)
                places.append(first + _find(rows, arrived, problem.kv_heads))
                parts += rows.parts
                first += arrived.count
            sent[other - neighbours.start] = sum(parts[before:])
        self._passed, self._parts = torch.cat(places), parts
        received = {
            other - neighbours.start: sum(
                rows.count for rows in _from(problem, rank, other, others, nodes.size)
            )
            for other in neighbours
        }
        self._within = list(received.values()), list(sent.values())

    def start(self, wire: Wire, keys: KeyRows, *, keep: bool) -> Flight:
        """Send rows of keys (B, n, H_kv, D) to where they are needed."""
        batch, _, _, width = keys.key.shape
        tail, dtype = (batch, 2, width), keys.key.dtype
        row, head = self._index.on(keys.key)
        held = wire.leases.empty((self._held, *tail), dtype)
        pack(held[: len(row)], keys, row, head)
        shape = sum(self._within[0]), *tail
        received = keys.key.new_empty(shape) if keep else wire.leases.empty(shape, dtype)
        works = [self._start_across(wire, held)]
        masks = padding = None
        if keys.padding is not None:
            masks = wire.leases.empty((self._held, batch), torch.uint8)
            masks[: len(row)] = keys.padding[:, row].T
            padding = wire.leases.empty((shape[0], batch), torch.uint8)
            works.append(self._start_across(wire, masks))

        def pass_on() -> list[Work]:
            found = [self._start_inside(wire, held, received)]
            if masks is not None and padding is not None:
                found.append(self._start_inside(wire, masks, padding))
            return found

        return Flight(wire, works, received, (held, masks), padding, pass_on)

    def start_home(self, wire: Wire, grads: Tensor) -> Flight:
        """Send gradients of rows that arrived back to where these came from."""
        tail = tuple(grads.shape[1:])
        passed = wire.leases.empty((len(self._passed), *tail), grads.dtype)
        held = wire.leases.empty((self._held, *tail), grads.dtype)
        received, sent = self._within
        works = [wire.swap(passed, grads, sent, received, self.nodes.inside)]

        def leave() -> list[Work]:
            table = held[self._leaving :].zero_()
            place, first = self._passed.to(grads.device), 0
            for size in self._parts:  # none has a place twice
                here = slice(first, first + size)
                table[place[here]] += passed[here]
                first += size
            arrived, left = self._across
            ours, theirs = held[: self._leaving], held[self._leaving + self._own :]
            return [wire.swap(ours, theirs, left, arrived, self.nodes.across)]

        return Flight(wire, works, held, (grads, passed), None, leave)

    def land(self, home: Tensor, grad_key: Tensor, grad_value: Tensor) -> None:
        """Add gradients that came home to those of the keys and values (B, n, H_kv, D)."""
        self._index.add(home, grad_key, grad_value)

    @property
    def _held(self) -> int:
        return self._leaving + self._own + self._arriving

    def _start_across(self, wire: Wire, held: Tensor) -> Work:
        arrived = held[self._leaving + self._own :]
        return wire.swap(arrived, held[: self._leaving], *self._across, self.nodes.across)

    def _start_inside(self, wire: Wire, held: Tensor, received: Tensor) -> Work:
        sent = held[self._leaving :][self._passed.to(held.device)]
        return wire.swap(received, sent, *self._within, self.nodes.inside)


def _inside(
    problem: Problem, rank: int, neighbours: range, others: list[int], size: int
) -> list[PackedRows]:
    """What a rank gets from each of its node, itself included."""
    return [rows for source in neighbours for rows in _from(problem, rank, source, others, size)]


def _from(
    problem: Problem, rank: int, source: int, others: list[int], size: int
) -> list[PackedRows]:
    """What a rank gets from one of its node: that one's own rows, and those it passes on."""
    queries, place = problem.span(rank), source % size
    own = [problem.rows(queries, source)] if source != rank else []
    return own + [problem.rows(queries, node * size + place) for node in others]


def _splits(rows: dict[int, PackedRows], count: int) -> list[int]:
    return [rows[node].count if node in rows else 0 for node in range(count)]


def _find(rows: PackedRows, among: PackedRows, kv_heads: int) -> Tensor:
    """The place of each row among others that have them all."""
    wanted, held = (row * kv_heads + head for row, head in (rows.index(), among.index()))
    order = torch.argsort(held)
    return order[torch.searchsorted(held[order], wanted)]
