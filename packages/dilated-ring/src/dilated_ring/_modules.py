"""Modules: drop-ins for those of dilated-core where each rank has a shard of the sequence."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dilated_core import DilatedPattern, MultiheadDilatedAttention
from dilated_core.interfaces import AttentionPattern, BufferSource
from dilated_ring._agreement import Validate, check_validate
from dilated_ring._functional import ring_attention
from dilated_ring._sharding import local_positions
from dilated_ring._strategy import check_strategy
from dilated_ring._topology import ring_group


class RingDilatedAttention(nn.Module):
    """`ring_attention` as a module: this rank's heads in, (B, n, H, D), and its heads out.

    Args:
        pattern: which keys a query sees.
        group: the ranks that share a sequence, as in `ring_attention`.
        ring_size: in place of `group`: how many neighbouring ranks share a sequence; all ranks
            then make the module together.
        scale: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability of dropping an attention weight while training.
        strategy: as in `ring_attention`.
        validate: as in `ring_attention`.
        buffers: as in `ring_attention`.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
    """

    def __init__(
        self,
        pattern: AttentionPattern,
        *,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        ring_size: int | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        strategy: str = "auto",
        validate: Validate = "first",
        buffers: BufferSource | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(pattern, AttentionPattern):
            raise TypeError(f"pattern must be an AttentionPattern. Got {type(pattern).__name__}.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1). Got {dropout}.")
        check_strategy(strategy)
        check_validate(validate)
        if group is not None and ring_size is not None:
            raise ValueError(f"ring_size must be None when group is given. Got {ring_size}.")
        self.pattern = pattern
        self.ranks = _Ranks(group) if ring_size is None else _Ranks.of_size(ring_size)
        self.scale = scale
        self.dropout = dropout
        self.strategy = strategy
        self.validate = validate
        self.buffer_source = buffers  # nn.Module.buffers lists the tensors of a module

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend: query (B, n, H, D), key and value (B, n, H_kv, D), mask (B, n) True = ignore."""
        options: dict[str, Any] = {
            "is_causal": is_causal,
            "scale": self.scale,
            "key_padding_mask": key_padding_mask,
            "dropout_p": self.dropout if self.training else 0.0,
            "enable_gqa": query.ndim == 4 and key.ndim == 4 and query.shape[2] != key.shape[2],
        }
        if self.ranks.alone:
            return cast(Tensor, self.pattern.spans.attend_whole(query, key, value, **options))
        out = ring_attention(
            query, key, value, self.pattern, group=self.ranks.group, strategy=self.strategy,
            validate=self.validate, buffers=self.buffer_source, **options,
        )  # fmt: skip
        return cast(Tensor, out)

    def positions(self, length: int, like: Tensor) -> Tensor:
        """The positions of this rank's rows in the whole sequence, (n,) int64."""
        if self.ranks.alone:
            return torch.arange(length, device=like.device)
        return local_positions(length, group=self.ranks.group, device=like.device)

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        parts = [repr(self.pattern)]
        for name, default in (("scale", None), ("dropout", 0.0), ("strategy", "auto")):
            if (value := getattr(self, name)) != default:
                parts.append(f"{name}={value!r}")
        return ", ".join(parts)


class RingMultiheadDilatedAttention(MultiheadDilatedAttention):
    """`MultiheadDilatedAttention` of a sequence that is spread over ranks; the same state_dict.

    Queries, keys and values are this rank's rows, (B, n, embed_dim). Position embeddings get the
    positions in the whole sequence.

    Args:
        embed_dim: width of input and output, a multiple of num_heads.
        num_heads: query heads H.
        pattern: which keys a query sees.
        group: the ranks that share a sequence, as in `ring_attention`.
        ring_size: as in `RingDilatedAttention`.
        dropout: probability of dropping an attention weight while training.
        strategy: as in `ring_attention`.
        validate: as in `ring_attention`.
        buffers: as in `ring_attention`.
        options: the other arguments of `MultiheadDilatedAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: AttentionPattern,
        *,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        ring_size: int | None = None,
        dropout: float = 0.0,
        strategy: str = "auto",
        validate: Validate = "first",
        buffers: BufferSource | None = None,
        **options: Any,
    ) -> None:
        attention = RingDilatedAttention(
            pattern, group=group, ring_size=ring_size, dropout=dropout,
            strategy=strategy, validate=validate, buffers=buffers,
        )  # fmt: skip
        known = pattern if isinstance(pattern, DilatedPattern) else None
        super().__init__(embed_dim, num_heads, known, attention=attention, **options)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as `MultiheadDilatedAttention.forward`; `positions` default to this rank's."""
        if self.position_embedding is not None and positions is None:
            attention = cast(RingDilatedAttention, self.attention)
            positions = attention.positions(query.shape[1], query)
        return super().forward(query, key, value, positions=positions, **options)


class _Ranks:
    """A group that copies of a module share."""

    def __init__(
        self, group: dist.ProcessGroup | DeviceMesh | None, *, alone: bool = False
    ) -> None:
        self.group, self.alone = group, alone

    @classmethod
    def of_size(cls, ring_size: int) -> "_Ranks":
        return cls(ring_group(ring_size), alone=ring_size == 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Ranks":
        return self
