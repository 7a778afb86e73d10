"""LongNetEncoder: hidden states that see both directions, of tokens or of given embeddings."""

# Shapes: B batch, N length, E embed_dim, V vocab_size.

from torch import Tensor

from dilated_factory.configs.models import LongNetEncoderConfig
from dilated_factory.models.layers import TransformerEncoderLayer
from dilated_factory.models.stack import LongNetStack


class LongNetEncoder(LongNetStack[LongNetEncoderConfig]):
    """Encoder of LongNet (Ding et al., arXiv 2307.02486) with MAGNETO's norms and initialisation.

    Shapes: batch B, positions N, width of the model E, vocabulary V.

    Args:
        config: shape of the model.
        attention: makes the attention of each layer, in place of dilated attention by the config's
            pattern, count_padding and dropout; called once a layer.
        activation_checkpointing: True recomputes each layer in backward instead of keeping what it
            computed; memory then grows with N * E * num_layers only. "pointwise" recomputes
            norms and GELU, and "selective" all of the feed-forward part: compiled under autocast, a
            layer keeps 11 and 7 tensors (B, N, E) of two bytes, and 18 without.
        device, dtype: as in torch.nn; with ``device="meta"`` nothing is allocated, and
            ``model.to_empty(device=...)`` followed by ``reset_parameters()`` makes it real.

    Examples:
        >>> config = LongNetEncoderConfig(embed_dim=32, num_heads=4, num_layers=2)
        >>> LongNetEncoder(config)(torch.randn(2, 300, 32)).shape
        torch.Size([2, 300, 32])
    """

    layer_type = TransformerEncoderLayer

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
        normed = self.hidden_states(inputs, key_padding_mask=key_padding_mask, positions=positions)
        return normed if self.head is None else self.head(normed)
