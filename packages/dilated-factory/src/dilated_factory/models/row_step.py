"""A new row of each sequence through a `LongNetLM`, without a module's call.

On the CPU a call costs as much as what a module computes, so the weights are taken out of them
once. On a GPU what counts is the number of kernels: there are eleven for a layer.
"""

# Shapes: B batch, E embed_dim, H query heads, H_kv key heads, D head_dim.

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_core import DilatedAttention, MultiheadDilatedAttention
from dilated_core.interfaces import DecodingState
from dilated_factory.models.layers import (
    DropPath,
    FeedForward,
    NarrowNorm,
    TransformerDecoderLayer,
    TransformerLayer,
)
from dilated_factory.models.longnet import LongNetLM
from dilated_factory.models.norms import can_serve, gelu_norm, has_kernels
from dilated_factory.models.positions import RotaryEmbedding, XPosEmbedding

Part: TypeAlias = Callable[[Tensor], Tensor]
# Of what there is and what is added, if anything: their sum, and its norm.
AddNorm: TypeAlias = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]

_KNOWN = {
    LongNetLM, TransformerDecoderLayer, MultiheadDilatedAttention, DilatedAttention, FeedForward,
    NarrowNorm, RotaryEmbedding, XPosEmbedding, DropPath, nn.Dropout, nn.Embedding, nn.Identity,
    nn.LayerNorm, nn.Linear, nn.ModuleList, nn.Sequential,
}  # fmt: skip


class RowStep:
    """Computes what `LongNetLM.hidden_states` of one token does in eval mode, with caches.

    The weights are those that the model has when this is made, which copies those of queries, keys
    and values.
    """

    def __init__(self, model: LongNetLM) -> None:
        self.model, self.norm = model, _add_norm(model.norm)
        self.layers = [_layer(block) for block in model.layers()]

    @staticmethod
    def can_serve(model: LongNetLM) -> bool:
        """Whether the model is of modules that do what they are known to do, and needs no casts."""
        device = next(model.parameters()).device.type
        return (
            device in ("cpu", "cuda")
            and not torch.is_autocast_enabled(device)
            and all(
                type(part) in _KNOWN
                and not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))
                for part in model.modules()
            )
        )

    def __call__(
        self, tokens: Tensor, caches: Sequence[DecodingState], lengths: Tensor | None
    ) -> Tensor:
        """States after the last norm (B, E) of tokens (B, 1) that follow those in the caches."""
        hidden, turn = self._entrance(tokens, caches)
        added = None
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden, normed = layer.attention_norm(hidden, added)
            query, key, value = turn(layer.to_heads(normed))
            out = cache.attend(query, key, value, scale=layer.scale, lengths=lengths)
            added = layer.out_proj(layer.inner_norm(out.flatten(1)))
            hidden, normed = layer.feed_forward_norm(hidden, added)
            added = layer.fc2(layer.inner(layer.fc1(normed)))
        return self.norm(hidden, added)[1]

    def _entrance(
        self, tokens: Tensor, caches: Sequence[DecodingState]
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        """What enters the first layer (B, E), and what divides and turns rows of all of them."""
        heads, kv_heads = self.layers[0].heads
        embedding = next(self.model.layers()).attention.position_embedding
        if type(embedding) is not RotaryEmbedding or not _fits_kernels(self.model.head.weight):
            hidden, table = self.model.entrance(tokens, None, caches)
            return hidden[:, 0], _turner(table, heads, kv_heads)
        from dilated_factory.models import _row_kernels

        hidden, _ = self.model.embedded(tokens, None, caches)
        positions = caches[0].next_positions(1, hidden.device)
        turns, split = embedding.turns(hidden.device), _turner(None, heads, kv_heads)

        def turn(rows: Tensor) -> tuple[Tensor, ...]:
            _row_kernels.turn(rows, positions, turns, heads, kv_heads)
            return split(rows)

        return hidden[:, 0], turn


class _Layer(NamedTuple):
    """What a layer computes, part by part."""

    heads: tuple[int, int]
    scale: float | None
    attention_norm: AddNorm
    to_heads: Part
    inner_norm: Part
    out_proj: Part
    feed_forward_norm: AddNorm
    fc1: Part
    inner: Part
    fc2: Part


def _layer(layer: TransformerLayer) -> _Layer:
    attention, feed_forward = layer.attention, layer.feed_forward
    assert isinstance(attention.attention, DilatedAttention)
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    weights: list[Tensor] = [x.weight for x in projections]
    biases: list[Tensor] = [x.bias for x in projections if x.bias is not None]
    return _Layer(
        (attention.num_heads, attention.num_kv_heads),
        attention.attention.scale,
        _add_norm(layer.attention_norm),
        _linear(torch.cat(weights), torch.cat(biases) if biases else None),
        _norm(attention.inner_norm),
        _linear(attention.out_proj.weight, attention.out_proj.bias),
        _add_norm(layer.feed_forward_norm),
        _linear(feed_forward.fc1.weight, feed_forward.fc1.bias),
        _inner(feed_forward),
        _linear(feed_forward.fc2.weight, feed_forward.fc2.bias),
    )


def _linear(weight: Tensor, bias: Tensor | None) -> Part:
    return lambda x: F.linear(x, weight, bias)


def _norm(norm: nn.Module | None) -> Part:
    if not isinstance(norm, nn.LayerNorm):
        return lambda x: x
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def _add_norm(norm: nn.Module) -> AddNorm:
    normed = _norm(norm)

    def plain(hidden: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        total = hidden if added is None else hidden + added
        return total, normed(total)

    if not isinstance(norm, nn.LayerNorm) or not _fits_kernels(norm.weight):
        return plain
    from dilated_factory.models import _norm_kernels

    weight, bias, eps = norm.weight, norm.bias, norm.eps

    def fused(hidden: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        if added is None:
            return plain(hidden, added)
        hidden, added = hidden.contiguous(), added.contiguous()
        total, out = torch.empty_like(hidden), torch.empty_like(hidden)
        _norm_kernels.forward(hidden, added, weight, bias, total, out, None, eps, gelu=False)
        return total, out

    return fused


def _inner(feed_forward: FeedForward) -> Part:
    """What is between the two products."""
    normed, activated, norm = (
        _norm(feed_forward.inner_norm), feed_forward.activated, feed_forward.inner_norm
    )  # fmt: skip
    if feed_forward.activation == "gelu" and can_serve(feed_forward.fc1.weight.T):
        return lambda wide: gelu_norm(wide, norm.weight, norm.bias, norm.eps)
    return lambda wide: normed(activated(wide))


def _fits_kernels(weight: Tensor) -> bool:
    """Whether kernels, which compute in float32, serve rows of a weight's width and dtype."""
    return has_kernels(weight) and weight.dtype != torch.float64


def _turner(
    table: Tensor | None, heads: int, kv_heads: int
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """What divides rows (B, (H + 2 * H_kv) * D) into queries, keys and values, turned."""
    sizes = heads, kv_heads, kv_heads

    def split(rows: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = rows.view(len(rows), 1, sum(sizes), -1).split(sizes, 2)
        return parts

    if table is None:
        return split
    turns = _turns(table, heads, kv_heads)

    def turned(rows: Tensor) -> tuple[Tensor, ...]:
        both, value = rows.view(len(rows), 1, sum(sizes), -1).split((heads + kv_heads, kv_heads), 2)
        wide = both.to(turns.real.dtype).unflatten(-1, (-1, 2))
        wide = torch.view_as_real(torch.view_as_complex(wide) * turns)
        return *wide.flatten(-2).to(rows.dtype).split((heads, kv_heads), 2), value

    return turned


def _turns(table: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Complex factors (B or 1, 1, 1 or H + H_kv, D / 2) of a table for one row a sequence."""
    both = torch.view_as_complex(table)
    both = both if both.ndim == 4 else both[None]
    if both.shape[2] == 1:
        return both
    of_queries, of_keys = both.split(1, 2)
    return torch.cat(
        (of_queries.expand(-1, -1, heads, -1), of_keys.expand(-1, -1, kv_heads, -1)), 2
    )
