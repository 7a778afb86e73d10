"""LongNetEncoder: hidden states that see both directions, of tokens or of given embeddings."""

# Shapes: B batch, N length, E embed_dim, V vocab_size.

import math
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from dilated_factory.configs.models import LongNetEncoderConfig
from dilated_factory.models.layers import (
    AttentionFactory,
    TransformerEncoderLayer,
    dilated_attention_factory,
    embed_tokens,
    layer_options,
    run_layer,
)


class LongNetEncoder(nn.Module):
    """Encoder of LongNet (Ding et al., arXiv 2307.02486) with MAGNETO's norms and initialisation.

    Args:
        config: shape of the model.
        attention: makes the attention of each layer, in place of dilated attention by the config's
            pattern, count_padding and dropout; called once a layer.
        activation_checkpointing: recompute each layer in backward instead of keeping what it
            computed; memory then grows with N * E * num_layers only.
        device, dtype: as in torch.nn; with ``device="meta"`` nothing is allocated, and
            ``model.to_empty(device=...)`` followed by ``reset_parameters()`` makes it real.
    """

    def __init__(
        self,
        config: LongNetEncoderConfig,
        *,
        attention: AttentionFactory | None = None,
        activation_checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        attention = dilated_attention_factory(config) if attention is None else attention
        with nullcontext() if device is None else torch.device(device):
            self.embedding = (
                None
                if config.vocab_size is None
                else nn.Embedding(config.vocab_size, config.embed_dim)
            )
            self.dropout = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(
                TransformerEncoderLayer(
                    config.embed_dim, config.num_heads, attention(), **layer_options(config)
                )
                for _ in range(config.num_layers)
            )
            self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
            self.head = (
                nn.Linear(config.embed_dim, config.vocab_size, bias=False)
                if config.head and config.vocab_size is not None
                else None
            )
        if dtype is not None:
            self.to(dtype)
        self._reset_ends()

    def reset_parameters(self) -> None:
        """Draw all weights anew, from torch's global random state."""
        for block in self.blocks:
            assert isinstance(block, TransformerEncoderLayer)
            block.reset_parameters()
        self.norm.reset_parameters()
        self._reset_ends()

    def _reset_ends(self) -> None:
        for end in (self.embedding, self.head):
            if end is not None:
                nn.init.normal_(end.weight, std=1 / math.sqrt(self.config.embed_dim))

    def hidden_states(
        self,
        inputs: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> list[Tensor]:
        """What enters the first layer and what leaves each: num_layers + 1 tensors (B, N, E).

        None of them has gone through the last norm; arguments as in `forward`.
        """
        return list(self._states(inputs, key_padding_mask, positions))

    def forward(
        self,
        inputs: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Normed states (B, N, E), or logits (B, N, V) with ``config.head``.

        Args:
            inputs: int64 tokens (B, N), or embeddings (B, N, E) where there is no vocabulary.
            key_padding_mask: (B, N) bool, True = no position looks at this one.
            positions: (N,) int64 for the position embedding, e.g. of a rank's share of a sequence;
                0 to N - 1 when None.

        Raises:
            ValueError, TypeError: ``inputs`` has another shape or dtype.
        """
        # A queue of one: a list of all states would keep them alive.
        last = deque(self._states(inputs, key_padding_mask, positions), maxlen=1).pop()
        normed: Tensor = self.norm(last)
        return normed if self.head is None else self.head(normed)

    def _states(
        self, inputs: Tensor, key_padding_mask: Tensor | None, positions: Tensor | None
    ) -> Iterator[Tensor]:
        hidden = self._embed(inputs)
        yield hidden
        for block in self.blocks:
            hidden = run_layer(
                block,
                hidden,
                recompute=self.activation_checkpointing,
                key_padding_mask=key_padding_mask,
                positions=positions,
            )
            yield hidden

    def _embed(self, inputs: Tensor) -> Tensor:
        if self.embedding is None:
            if inputs.ndim != 3 or inputs.shape[-1] != self.config.embed_dim:
                raise ValueError(
                    f"inputs must have shape (B, N, embed_dim={self.config.embed_dim}) without a "
                    f"vocabulary. Got {tuple(inputs.shape)}."
                )
            hidden = inputs
        else:
            hidden = embed_tokens(self.embedding, inputs, scaled=self.config.scale_embedding)
        dropped: Tensor = self.dropout(hidden)
        return dropped
