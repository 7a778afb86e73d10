"""The cost model of `Selection`: operations and bytes of one forward, and about how long they take.

Operations and bytes are exact for the definition. The rates that turn them into seconds are orders
of magnitude, alike for all kinds: they are there to rank, not to predict. `dilated bench` measures.
"""

# Shapes: N length, H heads, D head_dim, P world, n = N / P.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dilated_core import DilatedPattern
from dilated_core.extending import remembered
from dilated_core.interfaces import AttentionPattern
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


@remembered(64)
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
    return _planned_exchange(
        request.pattern if request.layout is None else request.layout, request.length,
        request.heads, request.kv_heads or request.heads, request.head_dim,
        getattr(torch, request.dtype), request.world, request.nodes, request.is_causal, mesh,
    )  # fmt: skip


@remembered(64)
def _planned_exchange(
    sees: DilatedPattern | LayoutConfig | None, length: int, heads: int, kv_heads: int,
    head_dim: int, dtype: torch.dtype, world: int, nodes: int, is_causal: bool, mesh: bool,
) -> tuple[int, int]:  # fmt: skip
    """Bytes of keys and values from the node and from others, as dilated-ring plans them.

    Of a pattern for the last rank where it is causal, which has most to do; else for the first.
    Of a layout, where any rank may have most, the most of eight ranks from the first to the last.
    """
    from dilated_ring import plan

    assert sees is not None
    step = world * (1 if isinstance(sees, DilatedPattern) else sees.block_size)
    whole = -(-length // step) * step
    if isinstance(sees, DilatedPattern):
        pattern: AttentionPattern = sees
        ranks = {world - 1 if is_causal else 0}
    else:
        pattern, ranks = (
            _fitting_layout(sees, whole, heads),
            {k * (world - 1) // 7 for k in range(8)},
        )
    received = []
    for rank in ranks:
        planned = plan(
            pattern, length=whole, world_size=world, heads=heads, kv_heads=kv_heads,
            head_dim=head_dim, dtype=dtype, is_causal=is_causal, rank=rank,
            strategy="gather" if mesh else "ring", ranks_per_node=world // nodes,
            bytes_per_second_across=_ACROSS_NODES,
        )  # fmt: skip
        across = planned.across.forward
        received.append((planned.traffic.forward - across, across))
    return max(received, key=lambda got: got[0] / _WITHIN_NODE + got[1] / _ACROSS_NODES)
