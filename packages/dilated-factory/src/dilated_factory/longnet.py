"""LongNetLM: a causal language model over bytes (or any small vocabulary) at long context."""

# Shapes: B batch, N length, E embed_dim, V vocab_size.

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dilated_factory.config import LongNetConfig
from dilated_factory.layers import DecoderBlock

# Logits of so many positions exist at once in `loss`; 64 MB in float32 for a vocabulary of 256.
LOSS_CHUNK = 65536


class LongNetLM(nn.Module):
    """Decoder of LongNet (Ding et al., arXiv 2307.02486) with MAGNETO's norms and initialisation.

    Token embedding scaled by sqrt(E), pre-norm blocks of dilated attention and GELU feed-forward
    with sub-layer norms, a last norm, and a head that shares the embedding's weight by default.

    Args:
        config: shape of the model.
        activation_checkpointing: recompute each block in backward instead of keeping what it
            computed; memory then grows with N * E * num_layers only.
        device, dtype: as in torch.nn; with ``device="meta"`` nothing is allocated, and
            ``model.to_empty(device=...)`` followed by ``reset_parameters()`` makes it real.
    """

    def __init__(
        self,
        config: LongNetConfig,
        *,
        activation_checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        with nullcontext() if device is None else torch.device(device):
            self.embedding = nn.Embedding(config.vocab_size, config.embed_dim)
            self.dropout = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_layers))
            self.norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
            self.head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        if dtype is not None:
            self.to(dtype)
        self._reset_ends()

    def reset_parameters(self) -> None:
        """Draw all weights anew, from torch's global random state."""
        for block in self.blocks:
            assert isinstance(block, DecoderBlock)
            block.reset_parameters()
        self.norm.reset_parameters()
        self._reset_ends()

    def _reset_ends(self) -> None:
        # Standard deviation 1 / sqrt(E): unit variance after the scaling at the input, and logits
        # of unit variance from normalised states at the output.
        std = 1 / math.sqrt(self.config.embed_dim)
        nn.init.normal_(self.embedding.weight, std=std)
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight  # again, because to_empty() parts them
        else:
            nn.init.normal_(self.head.weight, std=std)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """States after the last norm (B, N, E) for int64 tokens (B, N).

        Raises:
            ValueError: ``tokens`` is not (B, N).
            TypeError: ``tokens`` is not int64.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have shape (B, N). Got {tuple(tokens.shape)}.")
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens must be int64. Got {tokens.dtype}.")
        hidden = self.dropout(self.embedding(tokens) * math.sqrt(self.config.embed_dim))
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        normed: Tensor = self.norm(hidden)
        return normed

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, N, V) of the next token, for int64 tokens (B, N)."""
        logits: Tensor = self.head(self.hidden_states(tokens))
        return logits

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats of predicting tokens[:, 1:] from those before each.

        Takes int64 tokens (B, N + 1). Logits are made chunk by chunk and recomputed in backward,
        so a long sequence never holds all of them. Divide by log(2) for bits per byte.

        Raises:
            ValueError: ``tokens`` holds fewer than two positions.
        """
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise ValueError(
                f"tokens must have shape (B, N + 1) with N >= 1. Got {tuple(tokens.shape)}."
            )
        hidden = self.hidden_states(tokens[:, :-1]).flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        if len(hidden) <= LOSS_CHUNK:
            return self._summed_loss(hidden, targets) / len(targets)
        parts = zip(torch.split(hidden, LOSS_CHUNK), torch.split(targets, LOSS_CHUNK), strict=True)
        sums = [checkpoint(self._summed_loss, *part, use_reentrant=False) for part in parts]
        return torch.stack(sums).sum() / len(targets)

    def _summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, targets, reduction="sum")
