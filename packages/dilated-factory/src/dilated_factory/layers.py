"""Blocks of the decoder: feed-forward with sub-layer norm, and the pre-norm residual block."""

# Shapes: B batch, N length, E embed_dim.

import math

import torch.nn.functional as F
from torch import Tensor, nn

from dilated_core import MultiheadDilatedAttention
from dilated_factory.config import LongNetConfig
from dilated_factory.positions import RotaryEmbedding, XPosEmbedding


def magneto_gain(num_layers: int) -> float:
    """Xavier gain of value, output and feed-forward weights: sqrt(log(2 * num_layers)).

    Source: MAGNETO (Wang et al., arXiv 2210.06423, table 2, decoder-only). With it the expected
    update of the model stays bounded as layers are added; query and key weights keep gain 1.
    """
    return math.sqrt(math.log(2 * num_layers))


def position_embedding(config: LongNetConfig) -> RotaryEmbedding:
    """The position embedding that ``config.positions`` names."""
    if config.positions == "rotary":
        return RotaryEmbedding(config.head_dim, base=config.rotary_base)
    return XPosEmbedding(
        config.head_dim,
        base=config.rotary_base,
        scale_base=config.xpos_scale_base,
        centre=config.context // 2,
    )


class FeedForward(nn.Module):
    """fc2(norm(gelu(fc1(x)))): GELU feed-forward with MAGNETO's sub-layer norm before fc2."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.hidden_dim)
        self.inner_norm = nn.LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
        self.fc2 = nn.Linear(config.hidden_dim, config.embed_dim)
        self.gain = magneto_gain(config.num_layers)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew: Xavier normal with MAGNETO's gain, zero biases."""
        self.inner_norm.reset_parameters()
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_normal_(linear.weight, gain=self.gain)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, E) to (B, N, E)."""
        output: Tensor = self.fc2(self.inner_norm(F.gelu(self.fc1(hidden))))
        return output


class DecoderBlock(nn.Module):
    """Causal pre-norm block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: LongNetConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.attention = MultiheadDilatedAttention(
            config.embed_dim,
            config.num_heads,
            config.pattern,
            dropout=config.dropout,
            layer_norm_eps=config.layer_norm_eps,
            gamma_init=magneto_gain(config.num_layers),
            position_embedding=position_embedding(config),
        )
        self.feed_forward_norm = nn.LayerNorm(config.embed_dim, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def reset_parameters(self) -> None:
        """Draw all weights of the block anew."""
        self.attention_norm.reset_parameters()
        self.attention.reset_parameters()
        self.feed_forward_norm.reset_parameters()
        self.feed_forward.reset_parameters()

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, N, E) to (B, N, E); position n sees only positions up to n."""
        attended, _ = self.attention(self.attention_norm(hidden), is_causal=True)
        hidden = hidden + self.dropout(attended)
        output: Tensor = hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))
        return output
