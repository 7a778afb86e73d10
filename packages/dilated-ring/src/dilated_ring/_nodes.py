"""Rows on their way through a mesh of nodes: once to each node that needs them, then inside it.

The rank of place l in a node sends to the ranks of place l in the other nodes what anyone there
needs, and each passes on inside its node what the others need. So between nodes, where links are
slow, a row travels once for each node instead of once for each rank.

Rows on this rank are kept as one tensor: those that leave the node, those that others in the node
need, those that arrived from other nodes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dilated_core.interfaces import KeyRows, PackedRows
from dilated_ring._exchange import Flight, Index, Wire, pack
from dilated_ring._faults import Work
from dilated_ring._routes import Problem
from dilated_ring._topology import Nodes


@dataclass(frozen=True)
class NodeRoutes:
    """Which rows go where in a mesh of nodes, as one rank takes part in it.

    Attributes:
        place: the number of this rank in its node.
        leaving: by node, what goes to the rank of this place there.
        arriving: by node, what comes from there.
        own: by place in this node, this rank's rows that go there.
        passed: by place, what of `arriving` goes on there, by node; the part that stays too.
        received: by place, what comes from there: its own rows, and those that it passes on.
    """

    place: int
    leaving: dict[int, PackedRows]
    arriving: dict[int, PackedRows]
    own: dict[int, PackedRows]
    passed: dict[int, dict[int, PackedRows]]
    received: dict[int, list[PackedRows]]

    @classmethod
    def of(cls, problem: Problem, rank: int, size: int) -> Self:
        """The routes of a rank where a node has `size` ranks."""
        here, place = divmod(rank, size)
        others = [node for node in range(problem.world_size // size) if node != here]
        places = range(size)

        def span(node: int) -> range:
            return problem.span(node * size, (node + 1) * size - 1)

        def foreign(to: int, through: int) -> dict[int, PackedRows]:
            """The rows of other nodes that a place needs, and another one gets for the node."""
            queries = problem.span(here * size + to)
            return {node: problem.rows(queries, node * size + through) for node in others}

        def near(to: int, source: int) -> PackedRows:
            return problem.rows(problem.span(here * size + to), here * size + source)

        return cls(
            place,
            {node: problem.rows(span(node), rank) for node in others},
            {node: problem.rows(span(here), node * size + place) for node in others},
            {to: near(to, place) for to in places if to != place},
            {to: foreign(to, place) for to in places},
            {
                source: [near(place, source)] * (source != place)
                + [*foreign(place, source).values()]
                for source in places
            },
        )

    @property
    def sent_inside(self) -> list[int]:
        """Rows that go to each place of this node; those that stay too."""
        return [
            (self.own[to].count if to in self.own else 0) + _count(passed.values())
            for to, passed in self.passed.items()
        ]

    @property
    def received_inside(self) -> list[int]:
        """Rows that come from each place of this node; those that stay too."""
        return [_count(rows) for rows in self.received.values()]

    @property
    def rows_leaving(self) -> int:
        """Rows that go to other nodes."""
        return _count(self.leaving.values())

    @property
    def rows_own(self) -> int:
        """Rows of this rank that go to others in the node."""
        return _count(self.own.values())

    @property
    def rows_arriving(self) -> int:
        """Rows that come from other nodes."""
        return _count(self.arriving.values())


class NodeRows:
    """The rows of a mesh as one rank takes part in their exchange (as `Rows`)."""

    def __init__(self, problem: Problem, rank: int, node_size: int) -> None:
        routes = NodeRoutes.of(problem, rank, node_size)
        self.packed = tuple(rows for source in routes.received.values() for rows in source)
        self._index = Index([*routes.leaving.values(), *routes.own.values()])
        self._leaving, self._own = routes.rows_leaving, routes.rows_own
        self._held = self._leaving + self._own + routes.rows_arriving
        count = len(routes.leaving) + 1
        self._across = _splits(routes.arriving, count), _splits(routes.leaving, count)
        self._within = routes.received_inside, routes.sent_inside

        # What is passed on to each neighbour, as places in the tensor after the rows that leave.
        places, parts, first_own = list[Tensor](), list[int](), 0
        for to, passed in routes.passed.items():
            if to in routes.own:
                own = routes.own[to]
                places.append(torch.arange(first_own, first_own + own.count))
                first_own += own.count
                parts += own.parts
            first = self._own
            for node, rows in passed.items():
                arrived = routes.arriving[node]
                places.append(first + _find(rows, arrived, problem.kv_heads))
                parts += rows.parts
                first += arrived.count
        self._passed, self._parts = torch.cat(places), parts

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
        works = [wire.swap(passed, grads, sent, received, _nodes(wire).inside)]

        def leave() -> list[Work]:
            table = held[self._leaving :].zero_()
            place, first = self._passed.to(grads.device), 0
            for size in self._parts:  # none has a place twice
                here = slice(first, first + size)
                table[place[here]] += passed[here]
                first += size
            arrived, left = self._across
            ours, theirs = held[: self._leaving], held[self._leaving + self._own :]
            return [wire.swap(ours, theirs, left, arrived, _nodes(wire).across)]

        return Flight(wire, works, held, (grads, passed), None, leave)

    def land(self, home: Tensor, grad_key: Tensor, grad_value: Tensor) -> None:
        """Add gradients that came home to those of the keys and values (B, n, H_kv, D)."""
        self._index.add(home, grad_key, grad_value)

    def _start_across(self, wire: Wire, held: Tensor) -> Work:
        arrived = held[self._leaving + self._own :]
        return wire.swap(arrived, held[: self._leaving], *self._across, _nodes(wire).across)

    def _start_inside(self, wire: Wire, held: Tensor, received: Tensor) -> Work:
        sent = held[self._leaving :][self._passed.to(held.device)]
        return wire.swap(received, sent, *self._within, _nodes(wire).inside)


def _nodes(wire: Wire) -> Nodes:
    assert wire.ring.nodes is not None
    return wire.ring.nodes


def _count(packed: Iterable[PackedRows]) -> int:
    return sum(rows.count for rows in packed)


def _splits(rows: dict[int, PackedRows], count: int) -> list[int]:
    return [rows[node].count if node in rows else 0 for node in range(count)]


def _find(rows: PackedRows, among: PackedRows, kv_heads: int) -> Tensor:
    """The place of each row among others that have them all."""
    wanted, held = (row * kv_heads + head for row, head in (rows.index(), among.index()))
    order = torch.argsort(held)
    return order[torch.searchsorted(held[order], wanted)]
