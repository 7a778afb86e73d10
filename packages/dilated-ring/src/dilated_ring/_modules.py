"""Modules: drop-ins for those of dilated-core where each rank has a shard of the sequence."""

from functools import partial
from typing import Any, TypedDict, Unpack, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dilated_core import DilatedPattern, MultiheadDilatedAttention
from dilated_core.extending import HeadAttention
from dilated_core.interfaces import AttentionPattern, BufferSource, DecodingState, PositionEmbedding
from dilated_ring._agreement import Validate, check_validate
from dilated_ring._documents import whole_pattern
from dilated_ring._functional import ring_attention
from dilated_ring._sharding import local_positions, positions_of
from dilated_ring._strategy import Strategy, check_strategy
from dilated_ring._topology import ring_group


class RingDilatedAttention(HeadAttention):
    """`ring_attention` as a module: this rank's heads in, (B, n, H, D), and its heads out.

    Shapes: batch B, rows of this rank n, heads H, key and value heads H_kv, width of a head D.

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
        TypeError: pattern is no AttentionPattern, or dropout or scale no number.
        ValueError: dropout is not in [0, 1), scale is not finite, strategy or validate names none,
            ring_size does not fit the world, or stands beside a group.

    Examples:
        >>> from dilated_core import DilatedPattern
        >>> attention = RingDilatedAttention(DilatedPattern([16, 64], [1, 4]))
        >>> q, k, v = torch.randn(3, 1, 64, 4, 16)  # one process is a ring too
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 64, 4, 16])
    """

    _shown = (*HeadAttention._shown, ("strategy", "auto"), ("validate", "first"))

    def __init__(
        self,
        pattern: AttentionPattern,
        *,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        ring_size: int | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        strategy: Strategy = "auto",
        validate: Validate = "first",
        buffers: BufferSource | None = None,
    ) -> None:
        super().__init__(scale=scale, dropout=dropout)
        if not isinstance(pattern, AttentionPattern):
            raise TypeError(f"pattern must be an AttentionPattern. Got {type(pattern).__name__}.")
        check_strategy(strategy)
        check_validate(validate)
        if group is not None and ring_size is not None:
            raise ValueError(f"ring_size must be None when group is given. Got {ring_size}.")
        self.pattern = pattern
        self.ranks = _Ranks(group) if ring_size is None else _Ranks.of_size(ring_size)
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
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attend: query (B, n, H, D), key and value (B, n, H_kv, D), mask (B, n) True = ignore.

        `cu_seqlens`, as in `ring_attention`, are the documents of the whole sequence.
        """
        options = self.options(query, key)
        options |= {"is_causal": is_causal, "key_padding_mask": key_padding_mask}
        if self.ranks.alone:
            whole = whole_pattern(self.pattern, query, cu_seqlens, query.shape[1])
            return cast(Tensor, whole.spans.attend_whole(query, key, value, **options))
        out = ring_attention(
            query, key, value, self.pattern, group=self.ranks.group, strategy=self.strategy,
            validate=self.validate, buffers=self.buffer_source, cu_seqlens=cu_seqlens, **options,
        )  # fmt: skip
        return cast(Tensor, out)

    def positions(
        self,
        length: int,
        *,
        device: torch.device | str | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The positions of this rank's rows in the whole sequence, (n,) int64.

        With `cu_seqlens` they begin anew in each document.
        """
        if self.ranks.alone:
            return positions_of(0, 1, length, device, cu_seqlens)
        group = self.ranks.group
        return local_positions(length, group=group, device=device, cu_seqlens=cu_seqlens)

    def use_group(self, group: dist.ProcessGroup | DeviceMesh | None) -> None:
        """Attend over other ranks from now on; for a module from a file, whose group it lacks."""
        self.ranks = _Ranks(group)

    def shown(self) -> str:
        """The pattern."""
        return repr(self.pattern)


class LayerOptions(TypedDict, total=False):
    """The arguments of `MultiheadDilatedAttention` that ring does not choose."""

    num_kv_heads: int | None
    bias: bool
    layer_norm: bool
    layer_norm_eps: float
    gamma_init: float
    position_embedding: PositionEmbedding | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class LayerCall(TypedDict, total=False):
    """The arguments of `MultiheadDilatedAttention.forward` beside tensors and positions."""

    is_causal: bool
    key_padding_mask: Tensor | None
    need_weights: bool
    cache: DecodingState | None
    lengths: Tensor | None
    cu_seqlens: Tensor | None


class RingMultiheadDilatedAttention(MultiheadDilatedAttention):
    """`MultiheadDilatedAttention` of a sequence that is spread over ranks; the same state_dict.

    Queries, keys and values are this rank's rows, (B, n, embed_dim). Position embeddings get the
    positions in the whole sequence.

    Shapes: batch B, rows of this rank n.

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
        options: num_kv_heads, bias, layer_norm, layer_norm_eps, gamma_init, position_embedding,
            device and dtype, as in `MultiheadDilatedAttention`.

    Examples:
        >>> from dilated_core import DilatedPattern
        >>> layer = RingMultiheadDilatedAttention(64, 4, DilatedPattern([16, 64], [1, 4]))
        >>> rows, padding = shard_sequence(torch.randn(2, 50, 64), multiple_of=16)
        >>> output, _ = layer(rows, key_padding_mask=padding)
        >>> unshard_sequence(output, length=50).shape
        torch.Size([2, 50, 64])
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
        strategy: Strategy = "auto",
        validate: Validate = "first",
        buffers: BufferSource | None = None,
        **options: Unpack[LayerOptions],
    ) -> None:
        attention = RingDilatedAttention(
            pattern, group=group, ring_size=ring_size, dropout=dropout,
            strategy=strategy, validate=validate, buffers=buffers,
        )  # fmt: skip
        super().__init__(embed_dim, num_heads, None, attention=attention, **options)
        if isinstance(pattern, DilatedPattern):
            pattern.branch_heads(num_heads)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        **options: Unpack[LayerCall],
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as `MultiheadDilatedAttention.forward`; `positions` default to this rank's.

        The options are is_causal, key_padding_mask (B, n), need_weights (False), cache and lengths
        (None), and cu_seqlens, the documents of the whole sequence.
        """
        if self.position_embedding is not None and positions is None:
            attention = cast(RingDilatedAttention, self.attention)
            positions = attention.positions(
                query.shape[1], device=query.device, cu_seqlens=options.get("cu_seqlens")
            )
        return super().forward(query, key, value, positions=positions, **options)


class _Ranks:
    """A group that copies of a module share.

    A file holds of it what a process can find again: all ranks, or how many form a ring. Another
    group is to be given anew.
    """

    def __init__(
        self, group: dist.ProcessGroup | DeviceMesh | None, *, ring_size: int | None = None
    ) -> None:
        self._group, self._ring_size, self._lost = group, ring_size, False

    @classmethod
    def of_size(cls, ring_size: int) -> "_Ranks":
        return cls(ring_group(ring_size), ring_size=ring_size)

    @classmethod
    def of_file(cls, ring_size: int | None, *, lost: bool) -> "_Ranks":
        ranks = cls(None) if ring_size is None else cls.of_size(ring_size)
        ranks._lost = lost
        return ranks

    @property
    def alone(self) -> bool:
        return self._ring_size == 1

    @property
    def group(self) -> dist.ProcessGroup | DeviceMesh | None:
        if self._lost:
            raise RuntimeError(
                "the module comes from a file, which cannot hold its group of ranks. "
                "Give one with use_group(group)."
            )
        return self._group

    def __reduce__(self) -> tuple[object, ...]:
        world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        lost = self._ring_size is None and self._group is not None and self._group is not world
        return partial(_Ranks.of_file, lost=lost or self._lost), (self._ring_size,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Ranks":
        return self
