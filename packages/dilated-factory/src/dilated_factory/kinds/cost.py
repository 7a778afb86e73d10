"""The cost model of `Selection`: operations and bytes of one forward, and about how long they take.

Operations and bytes are exact for the definition. The rates that turn them into seconds are orders
of magnitude, alike for all kinds: they are there to rank, not to predict. `dilated bench` measures.
"""

# Shapes: N length, H heads, D head_dim, P world, n = N / P.

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dilated_core import DilatedPattern
from dilated_factory.configs.attention import AutoConfig
from dilated_factory.configs.layouts import LayoutConfig, build_layout

if TYPE_CHECKING:
    from dilated_sparse import BlockLayout

# Operations per second, by device and backend.
_RATES = {
    ("cpu", "reference"): 2e10,
    ("cpu", "torch"): 1e11,
    ("cuda", "reference"): 1e13,
    ("cuda", "torch"): 1e14,
    ("cuda", "triton"): 4e14,
}
# Bytes per second between ranks of a node, and between nodes.
_WITHIN_NODE = 2e11
_ACROSS_NODES = 2e10
# Seconds to start anything, and to agree with other ranks.
_START = 1e-5
_AGREE = 1e-4


@dataclass(frozen=True)
class Cost:
    """The forward of one sequence, on the rank that has most to do.

    Attributes:
        flops: operations.
        bytes_within: bytes received from ranks of the same node.
        bytes_across: bytes received from other nodes.
        seconds: about how long it takes, if nothing overlaps.
    """

    flops: int
    bytes_within: int
    bytes_across: int
    seconds: float


def estimate(request: AutoConfig, backend: str, *, spread: bool, mesh: bool) -> Cost:
    """What the request costs with a backend.

    Args:
        request: what to compute.
        backend: the reference computes all N * N scores, the others what is visible.
        spread: whether ranks exchange rows.
        mesh: whether a node's ranks share what they fetch from other nodes.

    Raises:
        ValueError: the layout does not fit the length or the heads.
    """
    if backend == "reference":
        flops = 4 * request.head_dim * request.heads * request.length**2
    else:
        flops = _visible_flops(request)
    within, across = _exchange(request, mesh) if spread and request.world > 1 else (0, 0)
    flops = -(-flops // request.world)
    seconds = (
        flops / _RATES[request.device, backend]
        + within / _WITHIN_NODE
        + across / _ACROSS_NODES
        + _START
        + (_AGREE if spread else 0.0)
    )
    return Cost(flops, within, across, seconds)


def _visible_flops(request: AutoConfig) -> int:
    flops = 0
    if request.pattern is not None:
        flops += request.pattern.flops(
            request.length, request.heads, request.head_dim, is_causal=request.is_causal
        )
    if request.layout is not None:
        pairs = _visible_pairs(request.layout, request.length, request.heads, request.is_causal)
        flops += 4 * request.head_dim * pairs
    return flops


@lru_cache(maxsize=64)
def _visible_pairs(config: LayoutConfig, length: int, heads: int, is_causal: bool) -> int:
    layout = _fitting_layout(config, length, heads)
    pairs = (layout.causal() if is_causal else layout).visible_pairs()
    return pairs * (heads // layout.heads)


def _fitting_layout(config: LayoutConfig, length: int, heads: int) -> BlockLayout:
    layout = build_layout(config, length)
    if layout.heads not in (1, heads):
        raise ValueError(f"layout must have 1 head or the request's {heads}. Got {layout.heads}.")
    return layout


def _exchange(request: AutoConfig, mesh: bool) -> tuple[int, int]:
    """Bytes that the busiest rank receives from its node and from others."""
    kv_heads, dtype = request.kv_heads or request.heads, getattr(torch, request.dtype)
    world, nodes = request.world, request.nodes
    if request.layout is None:
        assert request.pattern is not None
        return _dilated_exchange(
            request.pattern, request.length, request.heads, kv_heads, request.head_dim, dtype,
            world, nodes, request.is_causal,
        )  # fmt: skip
    tokens = _layout_exchange(request.layout, request.length, request.heads, world, nodes, mesh)
    row = 2 * kv_heads * request.head_dim * dtype.itemsize
    return tokens[0] * row, tokens[1] * row


@lru_cache(maxsize=64)
def _dilated_exchange(
    pattern: DilatedPattern, length: int, heads: int, kv_heads: int, head_dim: int,
    dtype: torch.dtype, world: int, nodes: int, is_causal: bool,
) -> tuple[int, int]:  # fmt: skip
    """Bytes of keys and values from the node and from others, as dilated-ring plans them.

    For the last rank where it is causal, which has most to do; else for the first.
    """
    from dilated_ring import plan

    planned = plan(
        pattern, length=-(-length // world) * world, world_size=world, heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, is_causal=is_causal, strategy="ring",
        rank=world - 1 if is_causal else 0, ranks_per_node=world // nodes,
        bytes_per_second_across=_ACROSS_NODES,
    )  # fmt: skip
    across = planned.across.forward
    return planned.traffic.forward - across, across


@lru_cache(maxsize=64)
def _layout_exchange(
    config: LayoutConfig, length: int, heads: int, world: int, nodes: int, mesh: bool
) -> tuple[int, int]:
    """Rows of K and V from the node and from others, of the blocks that a rank's queries see.

    On a mesh a node fetches each block once, for all its ranks, which share all rows they have.
    """
    layout = _fitting_layout(config, length, heads)
    grid, on_node = layout.grid, world // nodes
    row, column, _ = layout.blocks
    reader = (row % max(1, grid.rows)) * world // max(1, grid.rows)
    owner = column * world // max(1, grid.columns)
    same_node = reader // on_node == owner // on_node
    if not mesh:
        near = _busiest(reader, column, same_node & (reader != owner), world)
        return near * layout.block_size, _busiest(reader, column, ~same_node, world) * (
            layout.block_size
        )
    fetched = _busiest(reader // on_node, column, ~same_node, nodes) * layout.block_size
    share = -(-fetched // on_node)
    return (on_node - 1) * (-(-length // world) + share), share


def _busiest(reader: Tensor, column: Tensor, wanted: Tensor, readers: int) -> int:
    """The most different columns that one reader wants."""
    if not wanted.any():
        return 0
    pairs = torch.unique(torch.stack([reader[wanted], column[wanted]]), dim=1)
    return int(torch.bincount(pairs[0], minlength=readers).max())
