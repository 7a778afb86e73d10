"""Validated configuration of slide encoders."""

from typing import Literal

from pydantic import Field

from dilated_core import DilatedPattern
from dilated_factory.configs.base import FrozenConfig
from dilated_factory.configs.models import LongNetEncoderConfig


class SlideEncoderConfig(FrozenConfig):
    """Shape of a slide encoder; the defaults are those of the published one, 86 million parameters.

    Its authors say that the class token of the published weights was not trained, and that
    ``global_pool=True`` is meant; the default of the field is that of their class, False.

    Raises:
        pydantic.ValidationError: (a ValueError) naming the field, the requirement and the value.
    """

    kind: Literal["slide_encoder"] = "slide_encoder"
    tile_dim: int = Field(default=1536, ge=1, description="width of a tile's embedding")
    embed_dim: int = Field(default=768, ge=4, multiple_of=4)
    num_heads: int = Field(default=16, ge=1)
    num_layers: int = Field(default=12, ge=1)
    ffn_dim: int | None = Field(default=None, ge=1, description="None means 4 * embed_dim")
    segment_lengths: tuple[int, ...] = (1024, 5792, 32768, 185363, 1048576)
    dilation_rates: tuple[int, ...] = (1, 2, 4, 8, 16)
    grid_size: int = Field(default=1000, ge=1, description="tiles along a side of a slide")
    tile_size: float = Field(
        default=256, gt=0, description="pixels along a side of a tile, where a call does not say"
    )
    global_pool: bool = Field(default=False, description="mean of the tiles, not the class token")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    layer_norm_eps: float = Field(default=1e-5, gt=0)
    final_norm_eps: float = Field(default=1e-6, gt=0)

    @property
    def encoder(self) -> LongNetEncoderConfig:
        """Shape of the LongNet encoder inside, with torchscale's habits."""
        return LongNetEncoderConfig(
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            ffn_dim=self.ffn_dim,
            segment_lengths=self.segment_lengths,
            dilation_rates=self.dilation_rates,
            head_offsets="blocked",
            count_padding=True,
            context=max(self.segment_lengths),
            positions="none",
            dropout=self.dropout,
            layer_norm_eps=self.layer_norm_eps,
            float32_gelu=True,
        )

    @property
    def pattern(self) -> DilatedPattern:
        """The dilated-attention pattern of every layer."""
        return self.encoder.pattern
