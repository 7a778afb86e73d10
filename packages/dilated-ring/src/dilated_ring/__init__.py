"""Sequence-parallel attention on torch.distributed: each rank holds a part of the sequence."""

from dilated_ring.__about__ import __version__
from dilated_ring._agreement import Validate
from dilated_ring._errors import RankMismatchError, RingError
from dilated_ring._functional import ring_attention
from dilated_ring._loss import shared_loss
from dilated_ring._modules import RingDilatedAttention, RingMultiheadDilatedAttention
from dilated_ring._planner import Memory, Plan, Seconds, Traffic, plan
from dilated_ring._sharding import Shard, local_positions, shard_sequence, unshard_sequence
from dilated_ring._strategy import Strategy
from dilated_ring._topology import ring_group

__all__ = [
    "Memory",
    "Plan",
    "RankMismatchError",
    "RingDilatedAttention",
    "RingError",
    "RingMultiheadDilatedAttention",
    "Seconds",
    "Shard",
    "Strategy",
    "Traffic",
    "Validate",
    "__version__",
    "local_positions",
    "plan",
    "ring_attention",
    "ring_group",
    "shard_sequence",
    "shared_loss",
    "unshard_sequence",
]
