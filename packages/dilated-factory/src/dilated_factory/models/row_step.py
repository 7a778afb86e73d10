"""A new row of each sequence through a `LongNetLM` on the CPU, without a module's call.

There a call costs as much as what a module computes, so the weights are taken out of them once.
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
from dilated_factory.models.positions import RotaryEmbedding, XPosEmbedding

Part: TypeAlias = Callable[[Tensor], Tensor]

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
        self.model, self.norm = model, _norm(model.norm)
        self.layers = [_layer(block) for block in model.layers()]

    @staticmethod
    def can_serve(model: LongNetLM) -> bool:
        """Whether the model is on the CPU, and of modules that do what they are known to do."""
        return (
            next(model.parameters()).is_cpu
            and not torch.is_autocast_enabled("cpu")
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
        hidden, table = self.model.entrance(tokens, None, caches)
        hidden = hidden[:, 0]
        heads, kv_heads = self.layers[0].heads
        turns = None if table is None else _turns(table, heads, kv_heads)
        for layer, cache in zip(self.layers, caches, strict=True):
            rows = layer.to_heads(layer.attention_norm(hidden))
            rows = rows.view(len(rows), 1, heads + 2 * kv_heads, -1)
            turned, value = rows.split((heads + kv_heads, kv_heads), 2)
            if turns is not None:
                wide = turned.to(turns.real.dtype).unflatten(-1, (-1, 2))
                wide = torch.view_as_real(torch.view_as_complex(wide) * turns)
                turned = wide.flatten(-2).to(rows.dtype)
            query, key = turned.split((heads, kv_heads), 2)
            out = cache.attend(query, key, value, scale=layer.scale, lengths=lengths)
            hidden = hidden + layer.out_proj(layer.inner_norm(out.flatten(1)))
            wide = layer.activated(layer.fc1(layer.feed_forward_norm(hidden)))
            hidden = hidden + layer.fc2(layer.ffn_norm(wide))
        return self.norm(hidden)


class _Layer(NamedTuple):
    """What a layer computes, part by part."""

    heads: tuple[int, int]
    scale: float | None
    attention_norm: Part
    to_heads: Part
    inner_norm: Part
    out_proj: Part
    feed_forward_norm: Part
    fc1: Part
    activated: Part
    ffn_norm: Part
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
        _norm(layer.attention_norm),
        _linear(torch.cat(weights), torch.cat(biases) if biases else None),
        _norm(attention.inner_norm),
        _linear(attention.out_proj.weight, attention.out_proj.bias),
        _norm(layer.feed_forward_norm),
        _linear(feed_forward.fc1.weight, feed_forward.fc1.bias),
        feed_forward.activated,
        _norm(feed_forward.inner_norm),
        _linear(feed_forward.fc2.weight, feed_forward.fc2.bias),
    )


def _linear(weight: Tensor, bias: Tensor | None) -> Part:
    return lambda x: F.linear(x, weight, bias)


def _norm(norm: nn.Module | None) -> Part:
    if not isinstance(norm, nn.LayerNorm):
        return lambda x: x
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


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
