"""Attention modules: dilated attention of heads, and multihead attention around it."""

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from dilated_core import _checks, _reference
from dilated_core._attend import BACKENDS, Backend, attend
from dilated_core._cache import DilatedKVCache
from dilated_core._call import DilatedCall, check_call
from dilated_core._head_attention import HeadAttention
from dilated_core._linear import linear
from dilated_core._pattern import DilatedPattern
from dilated_core.interfaces import AttentionModule, DecodingState, PositionEmbedding

# need_weights materialises (B, H, N, M); beyond this many entries that is surely a mistake.
_MAX_WEIGHTS = 1 << 26


class DilatedAttention(HeadAttention):
    """`dilated_attention` as a module: (B, N, H, D) heads in, (B, N, H, D) out.

    Shapes: batch B, query positions N, key positions M, heads H, key and value heads H_kv, width of
    a head D, packed sequences S.

    Args:
        pattern: which keys a query sees.
        scale: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability of dropping an attention weight while training.
        backend: "triton", "torch" or "reference" to force one; None picks.

    Raises:
        TypeError: pattern is no DilatedPattern, or dropout or scale no number.
        ValueError: dropout is not in [0, 1), scale is not finite, or backend names none.

    Examples:
        >>> attention = DilatedAttention(DilatedPattern([8, 32], [1, 4]))
        >>> q, k, v = torch.randn(3, 2, 30, 4, 16)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([2, 30, 4, 16])
    """

    def __init__(
        self,
        pattern: DilatedPattern,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(scale=scale, dropout=dropout, backend=backend, backends=BACKENDS)
        self.backend: Backend | None
        if not isinstance(pattern, DilatedPattern):
            raise TypeError(f"pattern must be a DilatedPattern. Got {type(pattern).__name__}.")
        self.pattern = pattern

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
        """Attend, as `dilated_attention` does; H may be a multiple of H_kv.

        Args:
            query: (B, N, H, D).
            key: (B, M, H_kv, D).
            value: (B, M, H_kv, D).
            is_causal: hide the keys after each query.
            key_padding_mask: (B, M) bool, True = ignore.
            cu_seqlens: (S + 1,), as in `dilated_attention_varlen`: the rows are S documents, each
                attended alone; B is 1 then, and M is N.

        Returns:
            (B, N, H, D) in query's dtype.

        Raises:
            TypeError, ValueError: as `dilated_attention`, or `dilated_attention_varlen`.
        """
        options = self.options(query, key)
        rows = query, key, value
        if cu_seqlens is not None:
            if query.shape[0] != 1:
                raise ValueError(
                    f"query must have batch size 1 with cu_seqlens. Got shape {tuple(query.shape)}."
                )
            query, key, value = (x[0] for x in rows)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[0]
        out = attend(
            self.pattern, query, key, value, is_causal=is_causal, cu_seqlens=cu_seqlens,
            key_padding_mask=key_padding_mask, backend=self.backend, **options,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out if cu_seqlens is None else out.unsqueeze(0)

    def effective_weights(
        self,
        query: Tensor,
        key: Tensor,
        *,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """The attention weights (B, H, N, M) before dropout, multiplicities included.

        Raises:
            TypeError, ValueError: as `dilated_attention`; also for more than 2**26 weights.
        """
        scores = check_call(
            query, key, key, is_causal=is_causal, scale=self.scale,
            key_padding_mask=key_padding_mask, enable_gqa=True,
        )  # fmt: skip
        size = query.shape[0] * query.shape[2] * query.shape[1] * key.shape[1]
        if size > _MAX_WEIGHTS:
            raise ValueError(
                f"query and key must have at most {_MAX_WEIGHTS} weights "
                f"(batch * heads * length * key length). Got {size}."
            )
        call = DilatedCall(self.pattern, scores)
        return _reference.weights_and_lse(call, query, key)[0].to(query.dtype)

    @property
    def keeps_state(self) -> bool:
        """Always: a `DilatedKVCache`."""
        return True

    def new_cache(self, length: int | None = None) -> DilatedKVCache:
        """Empty decoding state, for any number of positions."""
        return DilatedKVCache(self.pattern)

    def check_cache(self, cache: object) -> None:
        """As `HeadAttention.check_cache`."""
        if not isinstance(cache, DilatedKVCache):
            raise TypeError(f"cache must be a DilatedKVCache. Got {type(cache).__name__}.")
        if cache.pattern != self.pattern:
            raise ValueError(
                f"cache must have the attention's pattern {self.pattern}. Got {cache.pattern}."
            )

    def shown(self) -> str:
        """The pattern."""
        return repr(self.pattern)


class MultiheadDilatedAttention(nn.Module):
    """Multihead attention over a dilated pattern; batch first, (B, N, embed_dim) in and out.

    Projections as in torch.nn.MultiheadAttention; `layer_norm` is MAGNETO's sub-layer norm on the
    concatenated heads (arXiv 2210.06423), which LongNet uses.

    Shapes: batch B, query positions N, key positions M, heads H, packed sequences S.

    Args:
        embed_dim: width of input and output, a multiple of num_heads.
        num_heads: query heads H.
        pattern: which keys a query sees; None with an injected `attention`, which knows.
        num_kv_heads: key and value heads, a divisor of num_heads; num_heads when None.
        bias: biases in the projections.
        dropout: probability of dropping an attention weight while training.
        layer_norm: normalise the concatenated heads before the output projection.
        layer_norm_eps: its epsilon.
        gamma_init: Xavier gain of the value and output projections (MAGNETO's gamma).
        position_embedding: applied to projected queries and keys, e.g. rotary.
        attention: attention to use in place of `DilatedAttention(pattern)`, e.g. ring or sparse.
        device, dtype: of the parameters.

    Raises:
        TypeError: a number is none, or pattern no DilatedPattern where attention is None.
        ValueError: a number is out of range, embed_dim no multiple of num_heads or num_heads none
            of num_kv_heads, pattern or dropout is given beside attention, or the pattern splits
            more groups than there are heads.

    Examples:
        >>> layer = MultiheadDilatedAttention(64, 4, DilatedPattern([8, 32], [1, 4]))
        >>> padding = torch.arange(30) >= torch.tensor([[30], [20]])  # the second row is shorter
        >>> output, _ = layer(torch.randn(2, 30, 64), is_causal=True, key_padding_mask=padding)
        >>> output.shape
        torch.Size([2, 30, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: DilatedPattern | None,
        *,
        num_kv_heads: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        layer_norm: bool = True,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        position_embedding: PositionEmbedding | None = None,
        attention: AttentionModule | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.positive_int("embed_dim", embed_dim)
        _checks.positive_int("num_heads", num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _checks.positive_int("num_kv_heads", num_kv_heads)
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be divisible by num_heads. Got {embed_dim} and {num_heads}."
            )
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must be divisible by num_kv_heads. Got {num_heads} and {num_kv_heads}."
            )
        if not gamma_init > 0:
            raise ValueError(f"gamma_init must be positive. Got {gamma_init}.")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.gamma_init = gamma_init
        if self.head_dim % 8 or self.head_dim > 128:
            warnings.warn(
                f"head_dim (embed_dim / num_heads) is {self.head_dim}: GPU kernels are fast for "
                "multiples of 8 up to 128.",
                UserWarning,
                stacklevel=2,
            )
        kv_dim = self.head_dim * num_kv_heads
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(embed_dim, kv_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(embed_dim, kv_dim, bias=bias, **factory)
        self.inner_norm = (
            nn.LayerNorm(embed_dim, eps=layer_norm_eps, **factory) if layer_norm else None
        )
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.attention = _attention(attention, pattern, num_heads, dropout)
        self.position_embedding = position_embedding
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier weights, with gain gamma_init for value and output; zero biases."""
        for layer, gain in (
            (self.q_proj, 1.0),
            (self.k_proj, 1.0),
            (self.v_proj, self.gamma_init),
            (self.out_proj, self.gamma_init),
        ):
            nn.init.xavier_normal_(layer.weight, gain=gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if self.inner_norm is not None:
            self.inner_norm.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        cache: DecodingState | None = None,
        positions: Tensor | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: (B, N, embed_dim).
            key: (B, M, embed_dim); query when None.
            value: (B, M, embed_dim); key when None.
            is_causal: hide the keys after each query; the queries are the last N positions.
            key_padding_mask: (B, M) bool, True = ignore.
            need_weights: also return the effective weights (B, H, N, M), for short inputs.
            cache: decoding state that the new rows are appended to; causal self-attention of
                rows that follow those in the cache.
            positions: (M,) int64 positions of the keys for the position embedding, or what it made
                of them (M, ...) in floating point; (B, M) where batch rows differ. When None they
                count from 0, or from where the cache is. The queries take the last N when causal,
                otherwise the first N.
            lengths: (B,) int64, how many rows of each batch row are real, as in the cache's attend.
            cu_seqlens: (S + 1,), documents that the rows are, for an attention that takes them, as
                `DilatedAttention` does. Positions do not begin anew by that: give them.

        Returns:
            (output (B, N, embed_dim), weights or None).

        Raises:
            TypeError: an input is no Tensor, or cache none of the attention's.
            ValueError: an input has another shape, positions come without a position_embedding or
                not one for each key, need_weights with an injected attention, cache with one that
                keeps no state, or with
                anything but causal self-attention of its own pattern in eval mode or without
                dropout, or as `dilated_attention`.
        """
        self._check_input("query", query)
        if cache is None and lengths is not None:
            raise ValueError("lengths must be None without a cache. Got a Tensor.")
        if cache is not None:
            self._check_cached(cache, key, value, is_causal, need_weights)
        if cu_seqlens is not None and (cache is not None or need_weights):
            raise ValueError("cu_seqlens must be None with a cache or need_weights. Got a Tensor.")
        key = query if key is None else key
        value = key if value is None else value
        self._check_input("key", key)
        self._check_input("value", value)
        q = linear(self.q_proj, query).unflatten(-1, (self.num_heads, self.head_dim))
        k = linear(self.k_proj, key).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = linear(self.v_proj, value).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.position_embedding is not None:
            if cache is not None and positions is None:
                positions = cache.next_positions(q.shape[1], q.device)
            q, k = self.position_embedding(q, k, *_positions(positions, q, k, is_causal))
        elif positions is not None:
            raise ValueError("positions must be None without a position_embedding. Got a Tensor.")
        if cache is not None:
            scale = cast(HeadAttention, self.attention).scale
            out = cache.attend(
                q, k, v, scale=scale, key_padding_mask=key_padding_mask, lengths=lengths
            )
        else:
            options = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
            out = self.attention(
                q, k, v, is_causal=is_causal, key_padding_mask=key_padding_mask, **options
            )
        out = out.flatten(-2)
        if self.inner_norm is not None:
            out = self.inner_norm(out)
        weights = self._weights(q, k, is_causal, key_padding_mask) if need_weights else None
        return linear(self.out_proj, out), weights

    def _check_input(self, name: str, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor. Got {type(x).__name__}.")
        if x.ndim != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"{name} must have shape (batch, length, embed_dim={self.embed_dim}). "
                f"Got {tuple(x.shape)}."
            )

    def _check_cached(
        self,
        cache: DecodingState,
        key: Tensor | None,
        value: Tensor | None,
        is_causal: bool,
        need_weights: bool,
    ) -> None:
        if not isinstance(self.attention, HeadAttention):
            raise ValueError(
                "cache must be None with an injected attention that keeps no state. "
                f"Got a cache with {type(self.attention).__name__}."
            )
        self.attention.check_cache(cache)
        if not is_causal or need_weights or key is not None or value is not None:
            raise ValueError(
                "cache must be None except in causal self-attention without need_weights. "
                f"Got is_causal={is_causal}, need_weights={need_weights}, "
                f"key {'None' if key is None else 'given'}."
            )
        if self.training and self.attention.dropout > 0:
            raise ValueError(
                f"cache must be None while training with dropout={self.attention.dropout}: "
                "call eval() first."
            )

    def _weights(
        self, q: Tensor, k: Tensor, is_causal: bool, key_padding_mask: Tensor | None
    ) -> Tensor:
        if not isinstance(self.attention, DilatedAttention):
            raise ValueError(
                "need_weights must be False with an injected attention. "
                f"Got True with {type(self.attention).__name__}."
            )
        return self.attention.effective_weights(
            q, k, is_causal=is_causal, key_padding_mask=key_padding_mask
        )


def _attention(
    given: AttentionModule | None, pattern: DilatedPattern | None, heads: int, dropout: float
) -> AttentionModule:
    """The given attention between heads, or that of the pattern."""
    if given is None:
        own = DilatedAttention(cast(DilatedPattern, pattern), dropout=dropout)
        own.pattern.branch_heads(heads)
        return own
    if dropout:
        raise ValueError(f"dropout must be 0 when attention is given: set it there. Got {dropout}.")
    if pattern is not None:
        raise ValueError(
            f"pattern must be None when attention is given, which knows. Got {pattern!r}."
        )
    return given


def _positions(
    positions: Tensor | None, q: Tensor, k: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """The positions of queries and keys."""
    length, key_length = q.shape[1], k.shape[1]
    if positions is None:
        count = key_length if is_causal else max(length, key_length)
        positions = torch.arange(count, device=q.device)
    else:
        # What an embedding made of positions has more dimensions after theirs.
        shape = positions.shape[: 2 if positions.is_floating_point() else None]
        if shape == (q.shape[0], key_length) and length == key_length:
            return positions, positions
        if shape[:1] != (key_length,) or (len(shape) > 1 and not positions.is_floating_point()):
            raise ValueError(
                f"positions must have shape (key length,)={(key_length,)}. "
                f"Got {tuple(positions.shape)}."
            )
    first = key_length - length if is_causal else 0
    return positions[first : first + length], positions[:key_length]
