"""What ranks run in the tests of ring attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor

from dilated_core import DilatedPattern, Partial, dilated_attention_varlen
from dilated_core._torch import engine
from dilated_ring import _exchange, _functional, _routes, ring_attention
from dilated_ring._topology import find_ring
from dilated_ring._trade import obstacle
from dilated_testing import Problem, problems, stretch
from process_ranks import device

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Members:
    """Who shares a sequence: all ranks, or the ranks of one of several groups, or of a mesh.

    Attributes:
        groups: the global ranks of each group, or nothing for all in one.
        mesh: the shape of a mesh of all ranks, or nothing.
    """

    groups: tuple[tuple[int, ...], ...] = ()
    mesh: tuple[int, ...] = ()

    def of_rank(self, rank: int, world_size: int) -> tuple[int, ...]:
        """The ranks that share the sequence of a rank."""
        found = [group for group in self.groups if rank in group]
        return found[0] if self.groups else tuple(range(world_size))


@dataclass
class RingProblem:
    """A call of ring attention: the problem of one rank, and how the ranks share it.

    `ends` are those of documents, where the sequence holds several.
    """

    whole: Problem
    members: Members = field(default_factory=Members)
    options: dict[str, Any] = field(default_factory=dict)

    ends: list[int] | None = None

    def shard(self, rank: int, size: int) -> slice:
        """The rows of the rank of that number."""
        n = self.whole.length // size
        return slice(rank * n, rank * n + n)


@st.composite
def ring_problems(draw: st.DrawFn, world_size: int, max_shard: int = 13) -> RingProblem:
    """Any small problem that divides among ranks."""
    whole = draw(problems(cross=False))
    length = world_size * draw(st.integers(0, max_shard))
    whole = replace(whole, length=length, key_length=length)
    if draw(st.integers(0, 2)) == 0:
        whole = draw(_traded(whole, world_size))
    can_trade = world_size == 1 or obstacle(routes_of(whole, world_size)) is None
    strategies = ["gather", "lend", "ring", "auto", *["heads"] * can_trade]
    return RingProblem(whole, options={"strategy": draw(st.sampled_from(strategies))})


@st.composite
def document_problems(draw: st.DrawFn, world_size: int) -> RingProblem:
    """Any small problem whose sequence holds documents, some of them empty, and a padded end."""
    problem = draw(ring_problems(world_size))
    problem.whole = replace(problem.whole, batch=1)
    if problem.options["strategy"] == "heads":
        problem.options["strategy"] = "gather"
    ends = st.lists(st.integers(0, problem.whole.length), min_size=1, max_size=7).map(sorted)
    problem.ends = [0, *draw(ends)]
    return problem


def varlen(
    query: Tensor, key: Tensor, value: Tensor, pattern: DilatedPattern, *, ends: list[int],
    key_padding_mask: Tensor | None, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dilated_attention_varlen` of a batch of one; behind the last end is one more document."""
    filled = torch.tensor([*ends, query.shape[1]], device=query.device)
    mask = None if key_padding_mask is None else key_padding_mask[0]
    out, lse = dilated_attention_varlen(
        query[0], key[0], value[0], filled, pattern, key_padding_mask=mask, **options
    )
    return out.unsqueeze(0), lse.unsqueeze(0)


@st.composite
def _traded(draw: st.DrawFn, whole: Problem, world_size: int) -> Problem:
    """A problem like the given one whose ranks can trade heads."""
    shard = draw(st.integers(1, 12))
    inside = [w for w in range(1, shard + 1) if shard % w == 0]
    spanned = [g for g in range(1, world_size + 1) if world_size % g == 0]
    lengths = [draw(st.sampled_from(inside)), shard * draw(st.sampled_from(spanned)), 1000]
    count = draw(st.integers(1, 3))
    pattern = DilatedPattern(
        lengths[-count:],
        draw(st.lists(st.integers(1, 7), min_size=count, max_size=count)),
        head_offsets=draw(st.sampled_from(["interleaved", "blocked"])),
    )
    heads = world_size * draw(st.integers(1, 2))
    return replace(
        whole, pattern=pattern, length=shard * world_size, key_length=shard * world_size,
        heads=heads, kv_heads=world_size,
    )  # fmt: skip


def routes_of(whole: Problem, world_size: int) -> _routes.Problem:
    """What the routes of a problem depend on."""
    return _routes.Problem(
        whole.pattern, whole.length // world_size, world_size, whole.heads, whole.kv_heads,
        whole.is_causal,
    )  # fmt: skip


_groups: dict[Members, Any] = {}


def group_of(members: Members) -> Any:
    """This rank's group; made once, by all ranks in the same order."""
    if members not in _groups:
        if members.mesh:
            names = ("nodes", "ranks")[-len(members.mesh) :]
            _groups[members] = dist.device_mesh.init_device_mesh(
                device().type, members.mesh, mesh_dim_names=names
            )
        else:
            made = [dist.new_group(list(ranks)) for ranks in members.groups]
            mine = [
                g for g, ranks in zip(made, members.groups, strict=True) if dist.get_rank() in ranks
            ]
            _groups[members] = mine[0] if mine else None
    return _groups[members]


def attend(problem: RingProblem, dtype: torch.dtype = torch.float64) -> Results:
    """This rank's rows of out, lse, dq, dk and dv."""
    ranks = problem.members.of_rank(dist.get_rank(), dist.get_world_size())
    group = group_of(problem.members)
    whole, here = problem.whole, device()
    rows = problem.shard(ranks.index(dist.get_rank()), len(ranks))
    tensors = [x.detach()[:, rows].to(here).requires_grad_() for x in whole.tensors(dtype)]
    mask = whole.mask()
    torch.manual_seed(whole.seed)
    out, lse = ring_attention(
        *tensors,
        whole.pattern,
        group=group,
        is_causal=whole.is_causal,
        scale=whole.scale,
        key_padding_mask=None if mask is None else mask[:, rows].to(here),
        dropout_p=whole.dropout_p,
        enable_gqa=True,
        return_lse=True,
        cu_seqlens=None if problem.ends is None else torch.tensor(problem.ends),
        **problem.options,
    )
    grad_out, grad_lse = upstream(whole)
    grad_lse = grad_lse[:, :, rows].to(here, lse.dtype).masked_fill(lse == -torch.inf, 0.0)
    dq, *grads = torch.autograd.grad(
        [out, lse], tensors, [grad_out[:, rows].to(here, out.dtype), grad_lse]
    )
    dq = dq * stretch(whole.scale, whole.head_dim)
    names = ("out", "lse", "dq", "dk", "dv")
    found = zip(names, (out, lse, dq, *grads), strict=True)
    return {name: x.detach().cpu() for name, x in found}


def twice() -> str:
    """What is said to a second derivative that torch's once_differentiable would let pass."""
    query = torch.randn(1, 8, 2, 4, dtype=torch.float64, device=device(), requires_grad=True)
    out = ring_attention(query, query, query, DilatedPattern([8], [1]))
    try:
        torch.autograd.grad(out.sum(), query, create_graph=True)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def upstream(whole: Problem) -> tuple[Tensor, Tensor]:
    """The gradients of out and lse that `Problem.run` draws."""
    generator = torch.Generator().manual_seed(whole.seed + 2)
    return (
        torch.randn(
            whole.batch, whole.length, whole.heads, whole.head_dim,
            dtype=torch.float64, generator=generator,
        ),
        torch.randn(
            whole.batch, whole.heads, whole.length, dtype=torch.float64, generator=generator
        ),
    )  # fmt: skip


def joined(parts: list[Results]) -> Results:
    """The whole from the rows of each rank."""
    return {
        name: torch.cat([part[name] for part in parts], 2 if name == "lse" else 1)
        for name in parts[0]
    }


def count_rows(problem: RingProblem) -> dict[str, int]:
    """Bytes that this rank receives from others, in all payload exchanges of forward, backward.

    In a mesh of nodes only those that come from other nodes are counted.
    """
    counted = {"forward": 0, "backward": 0}
    direction = ["forward"]
    exact = dist.all_to_all_single
    group = group_of(problem.members)
    ring = find_ring(group)
    inside = ring.nodes.inside if ring and ring.nodes else None

    def counting(
        output: Tensor, given: Tensor, received: list[int], sent: list[int], **options: Any
    ) -> Any:
        others = sum(received) - received[dist.get_rank(options["group"])]
        others = 0 if options["group"] is inside else others
        counted[direction[0]] += others * output[:1].nbytes if others else 0
        return exact(output, given, received, sent, **options)

    dist.all_to_all_single = counting
    try:
        whole = problem.whole
        rows = problem.shard(dist.get_rank(), dist.get_world_size())
        tensors = [x.detach()[:, rows].to(device()).requires_grad_() for x in whole.tensors()]
        out = ring_attention(
            *tensors, whole.pattern, group=group, is_causal=whole.is_causal, enable_gqa=True,
            **problem.options,
        )  # fmt: skip
        direction[0] = "backward"
        out.sum().backward()
    finally:
        dist.all_to_all_single = exact
    return counted


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """A fault that peers have, planted in this process."""
    place, name, wrong = _FAULTS[fault]
    exact = getattr(place, name)
    setattr(place, name, wrong(exact))
    # Routes that were made with the fault, or without it, must not be found later.
    _functional._rounds.cache_clear()
    _routes.gather_routes.cache_clear()
    _routes.ring_routes.cache_clear()
    try:
        yield
    finally:
        setattr(place, name, exact)
        _functional._rounds.cache_clear()
        _routes.gather_routes.cache_clear()
        _routes.ring_routes.cache_clear()


def attend_with(fault: str, problem: RingProblem) -> Results:
    """As `attend`, with a fault planted."""
    with planted(fault):
        return attend(problem)


def _unguarded_merge(total: Partial, part: Partial) -> None:
    total.out.sub_(torch.sigmoid(part.lse - total.lse).unsqueeze(-1) * (total.out - part.out))
    total.lse.sub_(torch.nn.functional.logsigmoid(total.lse - part.lse))


def _local_span(exact: Any) -> Any:
    def call(queries: range, *rest: Any) -> Any:
        return exact(range(len(queries)), *rest)

    return call


def _one_buffer(exact: Any) -> Any:
    def unpack(rows: Tensor, padding: Tensor | None = None) -> Any:
        keys = exact(rows, padding)
        return keys._replace(value=keys.key)

    return unpack


_FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "gradients not sent home": (_exchange.Rows, "land", lambda exact: lambda *_: None),
    "causal on local positions": (_functional, "SpanCall", _local_span),
    "later ranks are seen": (
        _functional, "Problem", lambda exact: lambda *sizes: exact(*sizes[:-1], False)
    ),
    "merge without a guard": (engine, "merge_", lambda exact: _unguarded_merge),
    "keys and values share a buffer": (_exchange, "unpack", _one_buffer),
}  # fmt: skip
