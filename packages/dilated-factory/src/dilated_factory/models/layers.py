"""Transformer layers around any attention: feed-forward with sub-layer norm, encoder, decoder."""

# Shapes: B batch, N length, M memory length, E embed_dim, F ffn_dim.

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dilated_core import MultiheadDilatedAttention
from dilated_core.extending import autocast, has_hooks, is_eager, linear
from dilated_core.interfaces import AttentionModule, DecodingState, PositionEmbedding
from dilated_factory.models.norms import (
    can_serve,
    gelu_norm,
    narrow_dtype,
    narrow_norm,
    sum_and_norm,
)

# torchscale's names.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "swish": F.silu,
}

# Called once for each layer of a model, so that an attention with weights has its own in each.
AttentionFactory: TypeAlias = Callable[[], AttentionModule]

_ROWS = 1024  # at once in a feed-forward part without gradients, on the CPU

Recompute: TypeAlias = Literal["pointwise", "selective"]


def magneto_gain(num_layers: int) -> float:
    """Xavier gain of value, output and feed-forward weights: sqrt(log(2 * num_layers)).

    Source: MAGNETO (Wang et al., arXiv 2210.06423, table 2, encoder-only and decoder-only). With it
    the expected update of the model stays bounded as layers are added; query and key weights keep
    gain 1.
    """
    return math.sqrt(math.log(2 * num_layers))


def _call(part: Callable[[Tensor], Tensor], hidden: Tensor, *, again: bool) -> Tensor:
    """Call a part of a layer; backward calls it ``again`` instead of keeping what is inside."""
    again = again and torch.is_grad_enabled()
    output: Tensor = checkpoint(part, hidden, use_reentrant=False) if again else part(hidden)
    return output


class NarrowNorm(nn.LayerNorm):
    """Layer norm whose output is cast as autocast would for each product that takes it: once.

    With ``recompute``, backward in compiled code makes the output again; eagerly the product keeps
    it anyway.
    """

    recompute = False

    def forward(self, input: Tensor) -> Tensor:
        """As torch's."""
        return _call(self._narrow, input, again=self.recompute and torch.compiler.is_compiling())

    def of_sum(self, hidden: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """hidden + added, and the norm of that, which a kernel makes at once where it can."""
        again = self.recompute and torch.compiler.is_compiling()
        like = torch.promote_types(hidden.dtype, added.dtype) == hidden.dtype
        if not (again or has_hooks(self)) and like and added.shape == hidden.shape:
            dtype = self._dtype(hidden, added)
            if dtype is not None:
                return sum_and_norm(hidden, added, self.weight, self.bias, self.eps, dtype)
        total = hidden + added
        return total, self(total)

    def _narrow(self, wide: Tensor) -> Tensor:
        if (dtype := self._dtype(wide)) is not None:
            return narrow_norm(wide, self.weight, self.bias, self.eps, dtype)
        (narrow,) = autocast(super().forward(wide))
        return narrow

    def _dtype(self, wide: Tensor, *others: Tensor) -> torch.dtype | None:
        """Of what a kernel gives, if one serves."""
        if self.weight is None or self.bias is None:
            return None
        return narrow_dtype(wide, self.weight, self.bias, *others)


class FeedForward(nn.Module):
    """fc2(norm(gelu(fc1(x)))): feed-forward with MAGNETO's sub-layer norm before fc2.

    Args:
        embed_dim: width E of input and output.
        ffn_dim: width F inside.
        layer_norm_eps: epsilon of the norm.
        gain: Xavier gain of both weights.
        activation: "gelu", "relu" or "swish".
        float32_gelu: round the activation of float64 to float32, as torchscale does.
        device, dtype: of the parameters.

    Raises:
        ValueError: there is no such activation.
    """

    def __init__(
        self,
        embed_dim: int,
        ffn_dim: int,
        *,
        layer_norm_eps: float = 1e-5,
        gain: float = 1.0,
        activation: str = "gelu",
        float32_gelu: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            known = ", ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"activation must be one of {known}. Got {activation!r}.")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(embed_dim, ffn_dim, **factory)
        self.inner_norm = NarrowNorm(ffn_dim, eps=layer_norm_eps, **factory)
        self.fc2 = nn.Linear(ffn_dim, embed_dim, **factory)
        self.gain = gain
        self.activation = activation
        self.float32_gelu = float32_gelu
        self.recompute_inner = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew: Xavier normal with the gain, zero biases."""
        self.inner_norm.reset_parameters()
        for each in (self.fc1, self.fc2):
            nn.init.xavier_normal_(each.weight, gain=self.gain)
            nn.init.zeros_(each.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, E) to (B, N, E)."""
        if (
            hidden.is_cpu
            and not torch.is_grad_enabled()
            and is_eager(hidden)  # what is traced may have any length
            and hidden.shape[-2:-1] > (_ROWS,)
            and not any(map(has_hooks, self.children()))  # a hook sees all rows at once
        ):
            # What is wider than the model stays in the caches.
            return torch.cat([self._fed(part) for part in hidden.split(_ROWS, dim=-2)], -2)
        return self._fed(hidden)

    def _fed(self, hidden: Tensor) -> Tensor:
        inner = _call(self._inner, linear(self.fc1, hidden), again=self.recompute_inner)
        return linear(self.fc2, inner)

    def _inner(self, wide: Tensor) -> Tensor:
        norm = self.inner_norm
        if self.activation == "gelu" and can_serve(wide) and not has_hooks(norm):
            return gelu_norm(wide, norm.weight, norm.bias, norm.eps)
        normed: Tensor = norm(self.activated(wide))
        return normed

    def activated(self, wide: Tensor) -> Tensor:
        """The activation of what fc1 gives."""
        activate = ACTIVATIONS[self.activation]
        if self.float32_gelu and wide.dtype == torch.float64:
            return activate(wide.float()).double()
        return activate(wide)


class DropPath(nn.Module):
    """Stochastic depth: while training, what a part adds is 0 for a share of the batch's rows.

    Slides or documents that are packed into one row share its chance. What is left is scaled so
    that its mean stays (Huang et al., arXiv 1603.09382, with the scale in training).
    """

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance

    def extra_repr(self) -> str:
        """The chance to drop."""
        return f"{self.chance:g}"

    def forward(self, added: Tensor) -> Tensor:
        """(B, N, E) to (B, N, E)."""
        if not self.training:
            return added
        kept = torch.rand(len(added), 1, 1, device=added.device) >= self.chance
        return added * (kept / (1 - self.chance)).to(added.dtype)


def check_attention(name: str, attention: object) -> None:
    """Raise unless ``attention`` can be called as attention between heads."""
    if not callable(attention) or isinstance(attention, type):
        raise TypeError(
            f"{name} must be a module that satisfies dilated_core.interfaces.AttentionModule. "
            f"Got {attention!r}."
        )


class TransformerLayer(nn.Module):
    """Self-attention and feed-forward, each pre-norm with a residual connection."""

    _recompute: Recompute | None = None
    _compiled: Callable[..., Tensor] | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        attention: AttentionModule,
        *,
        num_kv_heads: int | None = None,
        ffn_dim: int | None = None,
        dropout: float = 0.0,
        layer_norm_eps: float = 1e-5,
        gain: float = 1.0,
        activation: str = "gelu",
        float32_gelu: bool = False,
        drop_path: float = 0.0,
        position_embedding: PositionEmbedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_attention("attention", attention)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention_norm = NarrowNorm(embed_dim, eps=layer_norm_eps, **factory)
        self.attention = MultiheadDilatedAttention(
            embed_dim,
            num_heads,
            None,
            num_kv_heads=num_kv_heads,
            layer_norm_eps=layer_norm_eps,
            gamma_init=gain,
            position_embedding=position_embedding,
            attention=attention,
            **factory,
        )
        self.attention.inner_norm = NarrowNorm(embed_dim, eps=layer_norm_eps, **factory)
        self.feed_forward_norm = NarrowNorm(embed_dim, eps=layer_norm_eps, **factory)
        self.feed_forward = FeedForward(
            embed_dim,
            4 * embed_dim if ffn_dim is None else ffn_dim,
            layer_norm_eps=layer_norm_eps,
            gain=gain,
            activation=activation,
            float32_gelu=float32_gelu,
            **factory,
        )
        drop = nn.Dropout(dropout)
        self.dropout = nn.Sequential(drop, DropPath(drop_path)) if drop_path else drop

    def reset_parameters(self) -> None:
        """Draw all weights of the layer anew."""
        for part in self.children():
            if isinstance(part, nn.LayerNorm | MultiheadDilatedAttention | FeedForward):
                part.reset_parameters()

    @property
    def recompute(self) -> Recompute | None:
        """What backward computes again instead of keeping it.

        Norms and GELU ("pointwise"), or all of the feed-forward part ("selective").
        """
        return self._recompute

    @recompute.setter
    def recompute(self, value: Recompute | None) -> None:
        self._recompute = value
        for norm in (self.attention_norm, self.attention.inner_norm):
            assert isinstance(norm, NarrowNorm)
            norm.recompute = value is not None
        self.feed_forward_norm.recompute = value == "pointwise"
        self.feed_forward.recompute_inner = value == "pointwise"

    def compile_forward(self) -> None:
        """Let torch.compile fuse the layer, but for calls with a cache; copies are not compiled.

        Layers that are alike share what is compiled, so a deep model takes no longer than one.
        """
        # Inductor writes a long chain of pointwise operations wide to memory, to read it again:
        # that of a norm's gradient through GELU, four times as wide as the layer.
        options: dict[str, Any] = {"realize_opcount_threshold": 200}
        self._compiled = torch.compile(type(self)._compute, options=options)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call] # torch's
        state.pop("_compiled", None)
        return state

    def _run(self, hidden: Tensor, **options: Any) -> Tensor:
        if self._compiled is None or options.get("cache") is not None:
            return self._compute(hidden, **options)
        return self._compiled(self, hidden, **options)

    def _compute(self, hidden: Tensor, **options: Any) -> Tensor:
        return self._feed(hidden, self._attended(hidden, **options))

    def _attended(self, hidden: Tensor, **options: Any) -> Tensor:
        """What attention adds."""
        attended, _ = self.attention(self.attention_norm(hidden), **options)
        added: Tensor = self.dropout(attended)
        return added

    def _feed(self, hidden: Tensor, added: Tensor) -> Tensor:
        """Add to hidden, and then what the feed-forward part makes of the sum."""
        if self.recompute == "selective" and torch.is_grad_enabled():
            hidden = hidden + added
            return hidden + _call(self._normed_and_fed, hidden, again=True)
        hidden, added = self.feed_forward_norm.of_sum(hidden, added)
        return hidden + self._fed(added)

    def _normed_and_fed(self, hidden: Tensor) -> Tensor:
        return self._fed(self.feed_forward_norm(hidden))

    def _fed(self, normed: Tensor) -> Tensor:
        fed: Tensor = self.dropout(self.feed_forward(normed))
        return fed


class TransformerEncoderLayer(TransformerLayer):
    """Pre-norm layer that sees both directions: x + attention(norm(x)), then x + ffn(norm(x)).

    With MAGNETO's sub-layer norms (Wang et al., arXiv 2210.06423).

    Shapes: batch B, positions N, width of the model E.

    Args:
        embed_dim: width E of input and output, a multiple of num_heads.
        num_heads: query heads.
        attention: attention between heads: dilated, block-sparse, ring or your own.
        num_kv_heads: key and value heads; num_heads when None.
        ffn_dim: width of the feed-forward part; 4 * embed_dim when None.
        dropout: of what each part adds; the attention brings its own for the weights.
        layer_norm_eps: epsilon of all norms.
        gain: Xavier gain of value, output and feed-forward weights; see `magneto_gain`.
        activation: of the feed-forward part: "gelu", "relu" or "swish".
        float32_gelu: round the activation of float64 to float32, as torchscale does.
        drop_path: chance to skip each part while training; see `DropPath`.
        position_embedding: applied to queries and keys, e.g. `RotaryEmbedding`.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.

    Examples:
        >>> from dilated_core import DilatedAttention, DilatedPattern
        >>> attention = DilatedAttention(DilatedPattern([16, 64], [1, 4]))
        >>> layer = TransformerEncoderLayer(32, 4, attention)
        >>> layer(torch.randn(1, 50, 32)).shape
        torch.Size([1, 50, 32])
    """

    def forward(
        self,
        hidden: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """(B, N, E) to (B, N, E).

        Args:
            hidden: (B, N, E).
            key_padding_mask: (B, N) bool, True = ignore.
            positions: (N,) int64 for the position embedding; 0 to N - 1 when None.
        """
        return self._run(hidden, key_padding_mask=key_padding_mask, positions=positions)


class TransformerDecoderLayer(TransformerLayer):
    """Causal pre-norm layer; cross attention to a memory stands between its parts if one is given.

    Shapes: batch B, positions N, positions of the memory M, width of the model E, packed
    sequences S.

    Args:
        embed_dim: width E of input, memory and output, a multiple of num_heads.
        num_heads: query heads.
        attention: causal self-attention between heads: dilated, block-sparse, ring or your own.
        cross_attention: attention to the memory; it has neither a causal mask nor positions.
        num_kv_heads, ffn_dim, dropout, layer_norm_eps, gain, activation, float32_gelu, drop_path,
        position_embedding, device, dtype: as in `TransformerEncoderLayer`.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.

    Examples:
        >>> from dilated_core import DilatedAttention, DilatedPattern
        >>> attention = DilatedAttention(DilatedPattern([16, 64], [1, 4]))
        >>> layer = TransformerDecoderLayer(32, 4, attention)
        >>> layer(torch.randn(1, 50, 32)).shape
        torch.Size([1, 50, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        attention: AttentionModule,
        *,
        cross_attention: AttentionModule | None = None,
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, attention, **options)
        self.cross_attention_norm: nn.LayerNorm | None = None
        self.cross_attention: MultiheadDilatedAttention | None = None
        if cross_attention is not None:
            check_attention("cross_attention", cross_attention)
            factory: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
            eps = self.attention_norm.eps
            self.cross_attention_norm = nn.LayerNorm(embed_dim, eps=eps, **factory)
            self.cross_attention = MultiheadDilatedAttention(
                embed_dim,
                num_heads,
                None,
                num_kv_heads=self.attention.num_kv_heads,
                layer_norm_eps=eps,
                gamma_init=self.attention.gamma_init,
                attention=cross_attention,
                **factory,
            )

    def forward(
        self,
        hidden: Tensor,
        memory: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: DecodingState | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """(B, N, E) to (B, N, E); position n sees only positions up to n, and the whole memory.

        Args:
            hidden: (B, N, E).
            memory: (B, M, E), exactly if the layer has cross attention.
            key_padding_mask: (B, N) bool, True = ignore.
            memory_key_padding_mask: (B, M) bool, True = ignore.
            positions: (N,) int64 for the position embedding; when None they count from 0, or from
                the cache's length.
            cache: decoding state that the rows of ``hidden`` follow.
            lengths: (B,) int64, of each batch row the cache is to keep so many; all when None.
            cu_seqlens: (S + 1,), documents that the rows are, as in `LongNetLM.forward`.

        Raises:
            ValueError: a memory without cross attention, or the other way round.
        """
        if (memory is None) != (self.cross_attention is None):
            raise ValueError(
                "memory must be given exactly if the layer has cross attention. "
                f"Got {'None with' if memory is None else 'a memory without'} cross attention."
            )
        if memory is None and memory_key_padding_mask is not None:
            raise ValueError("memory_key_padding_mask must be None without a memory. Got a Tensor.")
        return self._run(
            hidden,
            memory=memory,
            memory_key_padding_mask=memory_key_padding_mask,
            key_padding_mask=key_padding_mask,
            positions=positions,
            cache=cache,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
        )

    def _compute(
        self,
        hidden: Tensor,
        *,
        memory: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        if self.cross_attention is None or self.cross_attention_norm is None:
            return super()._compute(hidden, is_causal=True, **options)
        hidden = hidden + self._attended(hidden, is_causal=True, **options)
        attended, _ = self.cross_attention(
            self.cross_attention_norm(hidden), memory, key_padding_mask=memory_key_padding_mask
        )
        return self._feed(hidden, self.dropout(attended))
