"""SlideEncoder: GigaPath's slide encoder (LongNetViT), tile embeddings and coordinates in."""

# Shapes: B batch, N tiles, C tile_dim, E embed_dim.

import math
from contextlib import nullcontext
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dilated_core import DilatedAttention, DilatedPattern
from dilated_factory.configs.models import FrozenConfig, LongNetEncoderConfig
from dilated_factory.models.encoder import LongNetEncoder


class SlideEncoderConfig(FrozenConfig):
    """Shape of a slide encoder; the defaults are those of the published one, 86 million parameters.

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
    tile_size: int = Field(default=256, ge=1, description="pixels along a side of a tile")
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


class SlideEncoder(nn.Module):
    """One embedding of a slide from those of its tiles (Xu et al., Nature 2024, GigaPath).

    Tiles are projected, get the 2-D sine and cosine of their place on the slide, and go through a
    LongNet encoder behind a class token. The published weights load with `load_torchscale`.

    Args:
        config: shape of the model.
        activation_checkpointing: as in `LongNetEncoder`.
        device, dtype: as in torch.nn.
    """

    def __init__(
        self,
        config: SlideEncoderConfig,
        *,
        activation_checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        with nullcontext() if device is None else torch.device(device):
            self.patch_embed = nn.Linear(config.tile_dim, config.embed_dim)
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
            self.encoder = LongNetEncoder(
                config.encoder,
                attention=lambda: DilatedAttention(config.pattern),
                activation_checkpointing=activation_checkpointing,
            )
            self.norm = nn.LayerNorm(config.embed_dim, eps=config.final_norm_eps)
        if dtype is not None:
            self.to(dtype)
        self._reset_ends()

    def reset_parameters(self) -> None:
        """Draw all weights anew, from torch's global random state."""
        self.encoder.reset_parameters()
        self.norm.reset_parameters()
        self._reset_ends()

    def _reset_ends(self) -> None:
        nn.init.xavier_uniform_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(
        self,
        tiles: Tensor,
        coords: Tensor,
        all_layer_embed: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
    ) -> list[Tensor]:
        """Embeddings of the slide (B, E): one, or one for each state of the encoder.

        Takes and returns what GigaPath's LongNetViT does, so code written for that works.

        Args:
            tiles: (B, N, tile_dim) embeddings of the tiles.
            coords: (B, N, 2) pixels of their upper left corners, in [0, grid_size * tile_size).
            all_layer_embed: return what enters the first layer and what leaves each, num_layers + 1
                embeddings. None of them has gone through the encoder's last norm, which the single
                embedding has.
            key_padding_mask: (B, N) bool, True = no tile; its coordinates must be in range, too.

        Raises:
            ValueError: a shape or a coordinate is not what it must be.
        """
        inputs, mask = self._inputs(tiles, coords, key_padding_mask)
        if all_layer_embed:
            states = self.encoder.layer_states(inputs, key_padding_mask=mask)
        else:
            states = [self.encoder(inputs, key_padding_mask=mask)]
        return [self._summary(state, key_padding_mask) for state in states]

    def _inputs(
        self, tiles: Tensor, coords: Tensor, key_padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The class token and the tiles with their places (B, 1 + N, E), and the mask for both."""
        if tiles.ndim != 3 or tiles.shape[-1] != self.config.tile_dim:
            raise ValueError(
                f"tiles must have shape (B, N, tile_dim={self.config.tile_dim}). "
                f"Got {tuple(tiles.shape)}."
            )
        if coords.shape != (*tiles.shape[:2], 2):
            raise ValueError(
                f"coords must have shape {(*tiles.shape[:2], 2)}. Got {tuple(coords.shape)}."
            )
        if key_padding_mask is not None and (
            key_padding_mask.shape != tiles.shape[:2] or key_padding_mask.dtype != torch.bool
        ):
            raise ValueError(
                f"key_padding_mask must be bool of shape {tuple(tiles.shape[:2])}. "
                f"Got {key_padding_mask.dtype} of {tuple(key_padding_mask.shape)}."
            )
        embedded: Tensor = self.patch_embed(tiles)
        embedded = embedded + self._places(coords).to(embedded)
        # The class token stands outside of the grid; its place is zero.
        token = self.cls_token.expand(len(tiles), -1, -1)
        mask = None if key_padding_mask is None else nn.functional.pad(key_padding_mask, (1, 0))
        return torch.cat((token, embedded), dim=1), mask

    def _places(self, coords: Tensor) -> Tensor:
        grid_size, tile_size = self.config.grid_size, self.config.tile_size
        cells = torch.floor(coords.to(torch.float64) / tile_size)
        if not ((cells >= 0) & (cells < grid_size)).all():
            raise ValueError(
                f"coords must be in [0, grid_size * tile_size = {grid_size * tile_size}). "
                f"Got {coords.min().item()} to {coords.max().item()}."
            )
        return sine_cosine_2d(cells, self.config.embed_dim)

    def _summary(self, states: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """One embedding (B, E) of states (B, 1 + N, E)."""
        if not self.config.global_pool:
            pooled = states[:, 0]
        elif key_padding_mask is None:
            pooled = states[:, 1:].mean(dim=1)
        else:
            weights = (~key_padding_mask).to(states.dtype).unsqueeze(-1)
            pooled = (states[:, 1:] * weights).sum(dim=1) / weights.sum(dim=1)
        embedding: Tensor = self.norm(pooled)
        return embedding


def sine_cosine_2d(cells: Tensor, embed_dim: int) -> Tensor:
    """Position embeddings (..., embed_dim) of cells (..., 2), float32.

    The first half encodes the second coordinate, the other half the first one; each half is the
    sines of position * 10000 ** (-4i / embed_dim), then the cosines (Vaswani et al., arXiv
    1706.03762, section 3.5). In float32, because that is the precision of GigaPath's table.
    """
    quarter = embed_dim // 4
    exponents = torch.arange(quarter, dtype=torch.float64, device=cells.device) / quarter
    angles = cells.to(torch.float64).flip(-1).unsqueeze(-1) * torch.exp(
        -math.log(10000.0) * exponents
    )
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(torch.float32)
