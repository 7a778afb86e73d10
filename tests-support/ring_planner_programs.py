"""What ranks run in the tests of the planner."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dilated_core import DilatedPattern
from dilated_ring import Strategy, ring_attention
from process_ranks import device
from ring_programs import Members, group_of


@dataclass
class Counts:
    """What a forward and a backward moved and held.

    Attributes:
        received: bytes received from other ranks, in the forward and the backward.
        across: the part of them that comes from other nodes of a mesh.
        passed: bytes that went around inside a node of a mesh in the forward, as they were sent.
        leased: the most bytes on loan at once, in the same.
        saved: bytes that the graph kept between the two.
        shapes: of the output and the three gradients.
    """

    received: list[int] = field(default_factory=lambda: [0, 0])
    across: list[int] = field(default_factory=lambda: [0, 0])
    passed: int = 0
    leased: list[int] = field(default_factory=lambda: [0, 0])
    saved: int = 0
    shapes: list[tuple[int, ...]] = field(default_factory=list)


class Source:
    """A buffer source that knows how much is on loan."""

    def __init__(self) -> None:
        self.now = self.peak = 0

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
        lease = Lease(self, torch.empty(tuple(shape), dtype=dtype, device=device))
        self.now += lease.tensor.nbytes
        self.peak = max(self.peak, self.now)
        return lease


@dataclass
class Lease:
    """A tensor on loan."""

    source: Source
    tensor: Tensor
    released: bool = False

    def release(self) -> None:
        """Give it back."""
        if not self.released:
            self.source.now -= self.tensor.nbytes
        self.released = True


def count(
    pattern: DilatedPattern,
    shape: tuple[int, int, int, int],
    kv_heads: int,
    dtype: torch.dtype,
    options: dict[str, Any],
    mesh: tuple[int, ...] = (),
) -> Counts:
    """Run ring attention of this rank's (B, n, H, D), maybe in a mesh of nodes, and count."""
    counts, source, direction = Counts(), Source(), 0
    exact = dist.all_to_all_single
    group = group_of(Members(mesh=mesh)) if mesh else None
    node_size = mesh[1] if mesh else dist.get_world_size()
    here = dist.get_rank() // node_size

    def counting(
        output: Tensor, given: Tensor, received: list[int], sent: list[int], **more: Any
    ) -> Any:
        ranks = dist.get_process_group_ranks(more["group"])
        row = output.nbytes // max(1, len(output))
        for other, rows in zip(ranks, received, strict=True):
            counts.received[direction] += rows * row * (other != dist.get_rank())
            counts.across[direction] += rows * row * (other // node_size != here)
        if mesh and direction == 0 and len(ranks) < dist.get_world_size():
            counts.passed += given.nbytes * all(other // node_size == here for other in ranks)
        return exact(output, given, received, sent, **more)

    dist.all_to_all_single = counting  # type: ignore[assignment]  # it is called just so
    try:
        batch, n, heads, head_dim = shape
        tensors = [
            torch.zeros(batch, n, h, head_dim, dtype=dtype, device=device(), requires_grad=True)
            for h in (heads, kv_heads, kv_heads)
        ]
        saved: set[int] = set()

        def keep(x: Tensor) -> Tensor:
            if all(x is not given for given in tensors) and id(x) not in saved:
                saved.add(id(x))
                counts.saved += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            query, key, value = tensors
            out = ring_attention(
                query, key, value, pattern, group=group, buffers=source, enable_gqa=True, **options
            )
        assert isinstance(out, Tensor)
        counts.leased[0], source.peak, direction = source.peak, 0, 1
        out.sum().backward()
        counts.leased[1] = source.peak
        grads = [x.grad for x in tensors if x.grad is not None]
        counts.shapes = [tuple(x.shape) for x in (out, *grads)]
    finally:
        dist.all_to_all_single = exact
    return counts


def busy(
    pattern: DilatedPattern,
    shape: tuple[int, int, int, int],
    kv_heads: int,
    strategy: Strategy = "auto",
) -> float:
    """The least CPU time of a causal forward and backward of this rank, of several."""
    batch, n, heads, head_dim = shape
    query, key, value = (
        torch.randn(batch, n, h, head_dim, device=device(), requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    )
    least = float("inf")
    for _ in range(9):
        dist.barrier()
        began = time.process_time()
        out = ring_attention(
            query, key, value, pattern, is_causal=True, enable_gqa=True, strategy=strategy
        )
        assert isinstance(out, Tensor)
        out.sum().backward()
        least = min(least, time.process_time() - began)
    return least


def grads_where_one_rank_uses_lse(pattern: DilatedPattern, strategy: Strategy) -> list[Tensor]:
    """Gradients of this rank where the last one alone has a loss of log-sum-exps."""
    torch.manual_seed(dist.get_rank())
    tensors = [torch.randn(1, 8, 2, 4, dtype=torch.float64, device=device()) for _ in "qkv"]
    query, key, value = (x.requires_grad_() for x in tensors)
    out, lse = ring_attention(
        query, key, value, pattern, is_causal=True, strategy=strategy, return_lse=True
    )
    loss = out.square().sum()
    if dist.get_rank() == dist.get_world_size() - 1:
        loss = loss + lse.square().sum()
    return [x.cpu() for x in torch.autograd.grad(loss, tensors)]
