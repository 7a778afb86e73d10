"""SlideEncoder: GigaPath's slide encoder (LongNetViT), tile embeddings and coordinates in."""

# Shapes: B batch, N tiles, T tiles of all slides together, C tile_dim, E embed_dim, S slides.

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dilated_core import (
    DilatedAttention,
    MultiheadDilatedAttention,
)
from dilated_core.extending import linear
from dilated_factory.configs.slides import SlideEncoderConfig
from dilated_factory.interop.places import (
    PlaceTable,
    TileSize,
    check_coords,
    check_places,
    grid_cells,
    readable,
    tile_sizes,
)
from dilated_factory.models.encoder import LongNetEncoder
from dilated_factory.models.layers import TransformerEncoderLayer


class PackedSlideAttention(DilatedAttention):
    """Dilated attention of slides of equal length, or of slides that lie one after the other.

    The encoder hands its mask on to here unread. One of int32 numbers says where packed slides
    end: 0, then the end of each (S + 1,).
    """

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
        """Attend: (B, N, H, D), or (1, T, H, D) with the ends of packed slides for a mask."""
        ends = cu_seqlens if key_padding_mask is None else key_padding_mask
        return super().forward(query, key, value, is_causal=is_causal, cu_seqlens=ends)


class _Packed(NamedTuple):
    """Where the rows of a padded batch (B, M) lie when its slides are packed.

    Attributes:
        order: (K,) rows of the flat batch, those of each slide one after the other.
        ends: (S + 1,) int32, 0 and where each packed slide ends.
    """

    order: Tensor
    ends: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> "_Packed":
        """By a mask (B, M), True = no row.

        Where counting the rows would wait for the device, or the count would be written into a
        graph, the rows of padding are kept: as one more slide, at the end.
        """
        counts = (~mask).sum(1)
        order = torch.argsort(mask.flatten().to(torch.int8), stable=True)
        if readable(mask):
            order = order[: int(counts.sum())]
        else:
            counts = torch.cat((counts, mask.sum().unsqueeze(0)))
        ends = nn.functional.pad(counts.cumsum(0), (1, 0))
        return cls(order, ends.to(torch.int32))


class SlideEncoder(nn.Module):
    """One embedding of a slide from those of its tiles (Xu et al., Nature 2024, GigaPath).

    Tiles are projected, get the 2-D sine and cosine of their place on the slide, and go through a
    LongNet encoder behind a class token. The published weights load with `load_torchscale`; their
    authors say that the class token was not trained: take ``global_pool=True``.

    Assigning to the attribute ``tile_size``, as pipelines around GigaPath's class do, sets the size
    of calls that do not say one.

    Shapes: batch B, tiles N, heads H, width of the model E, slides S, tiles of slide i N_i.

    Args:
        config: shape of the model.
        activation_checkpointing: as in `LongNetEncoder`.
        device, dtype: as in torch.nn.

    Examples:
        >>> shape = SlideEncoderConfig(
        ...     tile_dim=8,
        ...     embed_dim=16,
        ...     num_heads=2,
        ...     num_layers=1,
        ...     segment_lengths=(16,),
        ...     dilation_rates=(1,),
        ... )
        >>> model = SlideEncoder(shape)
        >>> (embedding,) = model(torch.randn(1, 20, 8), torch.randint(99, (1, 20, 2)) * 256)
        >>> embedding.shape
        torch.Size([1, 16])
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
        self.tile_size: TileSize = config.tile_size
        with nullcontext() if device is None else torch.device(device):
            self.patch_embed = nn.Linear(config.tile_dim, config.embed_dim)
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.embed_dim))
            self.places = PlaceTable(config.grid_size, config.embed_dim)
            self.encoder = LongNetEncoder(
                config.encoder,
                attention=lambda: PackedSlideAttention(config.pattern),
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
        tile_size: TileSize | None = None,
    ) -> list[Tensor]:
        """Embeddings of the slides (B, E): one, or one for each state of the encoder.

        Takes and returns what GigaPath's LongNetViT does, so code written for that works. A slide
        gives what it gives alone, whatever pads it or stands beside it; `encode` does so without
        working on padding.

        Coordinates on the CPU are checked; elsewhere that would wait for the device, and a slide
        with a tile outside of the grid gives NaN.

        Args:
            tiles: (B, N, tile_dim) or (N, tile_dim) embeddings of the tiles, of any float dtype.
            coords: (B, N, 2), or (N, 2) of one slide, of any real or integer dtype: pixels of the
                tiles' upper left corners, in [0, grid_size * tile_size).
            all_layer_embed: return what enters the first layer and what leaves each, num_layers + 1
                embeddings. None of them has gone through the encoder's last norm, which the single
                embedding has.
            key_padding_mask: (B, N) bool, True = no tile, whatever stands there.
            tile_size: pixels along a side of a tile, or (B,) of them, one for each slide; the
                attribute ``tile_size`` when None.

        Raises:
            TypeError, ValueError: naming the argument, what it must be, and what it was; a slide
                has no tile.

        Warns:
            UserWarning: coordinates that cannot be right, see `dilated_factory.interop.places`.
        """
        inputs, mask = self._inputs(tiles, coords, key_padding_mask, tile_size)
        return [self._summary(state, mask) for state in self._states(inputs, mask, all_layer_embed)]

    def encode(
        self,
        slides: Sequence[tuple[Tensor, Tensor]],
        *,
        tile_size: TileSize | None = None,
        all_layer_embed: bool = False,
    ) -> list[Tensor]:
        """Embeddings (S, E) of slides of different lengths, each what it gives alone.

        The slides are packed, one after the other, so there is no padding to work on.

        Args:
            slides: for each its tiles (N_i, tile_dim) and coordinates (N_i, 2), as in `forward`;
                they are brought to the model's device.
            tile_size: a number, or one for each slide, as in `forward`.
            all_layer_embed: as in `forward`.

        Raises:
            TypeError, ValueError: as in `forward`, naming the slide where it is about one.
        """
        inputs, ends = self._packed_inputs(slides, tile_size)
        found = self._run(inputs, all_layer_embed, _ends(ends, inputs.device))
        return [self._packed_summary(state[0], ends) for state in found]

    def tile_states(
        self,
        tiles: Tensor,
        coords: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        tile_size: TileSize | None = None,
    ) -> Tensor:
        """What `forward` pools (B, N, E): the tiles after the encoder and its last norm.

        Arguments as in `forward`; where there is no tile the states are 0.
        """
        inputs, mask = self._inputs(tiles, coords, key_padding_mask, tile_size)
        (states,) = self._states(inputs, mask, False)
        return states[:, 1:]

    @torch.no_grad()
    def tile_attention(
        self,
        tiles: Tensor,
        coords: Tensor,
        *,
        layer: int = -1,
        key_padding_mask: Tensor | None = None,
        tile_size: TileSize | None = None,
    ) -> Tensor:
        """How a layer weighs the tiles for the embedding of the slide (B, H, N); no gradients.

        Without ``global_pool`` these are the class token's weights by the pattern: together with
        the token's own they add up to at most 1 (zeros that fill a segment have a share). With it
        they are those of the mean of all tiles' queries, which has no place and so sees every tile:
        they add up to 1.

        Args:
            tiles: as in `forward`.
            coords: as in `forward`.
            layer: which of the layers; negative ones count from the end.
            key_padding_mask: as in `forward`; weights are 0 where there is no tile.
            tile_size: as in `forward`.

        Raises:
            ValueError: there is no such layer; or as `forward`.
        """
        depth = self.config.num_layers
        if not -depth <= layer < depth:
            raise ValueError(f"layer must be in [-{depth}, {depth - 1}]. Got {layer}.")
        inputs, mask = self._inputs(tiles, coords, key_padding_mask, tile_size)
        block = cast(TransformerEncoderLayer, self.encoder.blocks[layer])
        states: Tensor = block.attention_norm(self._states(inputs, mask, True)[layer % depth])
        weights = states.new_zeros(len(states), self.config.num_heads, states.shape[1] - 1)
        for i, rows in enumerate(states):
            kept = slice(None) if mask is None else ~mask[i]
            found = self._weights(block.attention, rows[kept].unsqueeze(0))
            weights[i, :, slice(None) if mask is None else ~mask[i, 1:]] = found
        return weights

    def _weights(self, attention: MultiheadDilatedAttention, rows: Tensor) -> Tensor:
        """The weights (H, N) of the tiles in rows (1, 1 + N, E), the class token first."""
        if not self.config.global_pool:
            _, seen = attention(rows[:, :1], rows, need_weights=True)
            return cast(Tensor, seen)[0, :, 0, 1:]
        heads = (attention.num_heads, attention.head_dim)
        query = attention.q_proj(rows[:, 1:].mean(1)).unflatten(-1, heads)
        key = linear(attention.k_proj, rows[0, 1:]).unflatten(-1, heads)
        scores = torch.einsum("hd,nhd->hn", query[0], key) * attention.head_dim**-0.5
        weights: Tensor = scores.softmax(-1)
        return weights

    def _states(self, inputs: Tensor, mask: Tensor | None, every: bool) -> list[Tensor]:
        """The states (B, 1 + N, E) of inputs; 0 where the mask is."""
        if mask is None:
            return self._run(inputs, every)
        packed = _Packed.of(mask)
        rows = inputs.flatten(0, 1)[packed.order].unsqueeze(0)
        found = self._run(rows, every, packed.ends)
        return [
            torch.zeros_like(inputs, dtype=state.dtype)
            .flatten(0, 1)
            .index_copy(0, packed.order, state[0])
            .view_as(inputs)
            .masked_fill(mask.unsqueeze(-1), 0)
            for state in found
        ]

    def _run(self, inputs: Tensor, every: bool, ends: Tensor | None = None) -> list[Tensor]:
        options: dict[str, Any] = {"key_padding_mask": ends}
        if every:
            return self.encoder.layer_states(inputs, **options)
        return [self.encoder(inputs, **options)]

    def _inputs(
        self,
        tiles: Tensor,
        coords: Tensor,
        key_padding_mask: Tensor | None,
        tile_size: TileSize | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The class token and the tiles with their places (B, 1 + N, E), and the mask for both."""
        self._check_tiles("tiles", tiles, (2, 3))
        tiles = tiles.unsqueeze(0) if tiles.ndim == 2 else tiles
        if isinstance(coords, Tensor) and coords.ndim == 2:
            coords = coords.unsqueeze(0)
        check_coords(coords, (*tiles.shape[:2], 2))
        if tiles.shape[1] == 0:
            raise ValueError("tiles must hold at least one tile of each slide. Got none.")
        sizes = self._sizes(tile_size, len(tiles), coords.device)[:, None, None]
        cells = grid_cells(coords, sizes)
        mask = key_padding_mask
        if mask is not None:
            _check_mask(mask, tiles)
            hole = mask.unsqueeze(-1)
            # What stands there may be anything, NaN too, whose gradient would spread.
            tiles, cells = tiles.masked_fill(hole, 0), cells.masked_fill(hole.to(cells.device), 0)
            mask = nn.functional.pad(mask, (1, 0))
        if readable(coords):
            for i, size in enumerate(sizes):
                kept = slice(None) if key_padding_mask is None else ~key_padding_mask[i].cpu()
                check_places(coords[i][kept], cells[i][kept], size, self.config.grid_size)
        embedded = self._embed(tiles, cells)
        return torch.cat((self.cls_token.expand(len(tiles), -1, -1), embedded), dim=1), mask

    def _packed_inputs(
        self, slides: Sequence[tuple[Tensor, Tensor]], tile_size: TileSize | None
    ) -> tuple[Tensor, list[int]]:
        """The packed inputs (1, T + S, E), and where the rows of each slide end, 0 first."""
        if not len(slides):
            raise ValueError("slides must hold at least one slide. Got none.")
        device = self.cls_token.device
        sizes = self._sizes(tile_size, len(slides), torch.device("cpu"))
        all_tiles, all_cells = [], []
        for i, (tiles, coords) in enumerate(slides):
            try:
                self._check_tiles("tiles", tiles, (2, 3))
                if tiles.ndim == 3 and len(tiles) == 1:
                    tiles = tiles[0]
                    if isinstance(coords, Tensor) and coords.ndim == 3:
                        coords = coords.squeeze(0)
                self._check_tiles("tiles", tiles, (2,))
                check_coords(coords, (len(tiles), 2))
                if not len(tiles):
                    raise ValueError("tiles must hold at least one tile. Got none.")
                size = sizes[i]
                if coords.device.type != "cpu":
                    size = size.to(torch.float32).to(coords.device, non_blocking=True)
                cells = grid_cells(coords, size)
                check_places(coords, cells, size, self.config.grid_size)
            except (TypeError, ValueError) as error:
                raise type(error)(f"slide {i}: {error}") from None
            all_tiles.append(tiles.to(device, non_blocking=True))
            all_cells.append(cells.to(torch.float32).to(device, non_blocking=True))
        lengths = [len(tiles) for tiles in all_tiles]
        embedded = self._embed(torch.cat(all_tiles), torch.cat(all_cells))
        parts = [part for one in embedded.split(lengths) for part in (self.cls_token[0], one)]
        ends = [0]
        for length in lengths:
            ends.append(ends[-1] + 1 + length)
        return torch.cat(parts).unsqueeze(0), ends

    def _check_tiles(self, name: str, tiles: object, dims: tuple[int, ...]) -> None:
        if not isinstance(tiles, Tensor):
            raise TypeError(f"{name} must be a Tensor. Got {type(tiles).__name__}.")
        width = self.patch_embed.in_features
        if tiles.ndim not in dims or tiles.shape[-1] != width:
            shape = "(B, N, " if 3 in dims else "(N, "
            raise ValueError(
                f"{name} must have shape {shape}tile_dim={width}). Got {tuple(tiles.shape)}."
            )
        if not tiles.is_floating_point():
            raise TypeError(f"{name} must be of a float dtype. Got {tiles.dtype}.")

    def _sizes(self, tile_size: TileSize | None, slides: int, device: torch.device) -> Tensor:
        return tile_sizes(self.tile_size if tile_size is None else tile_size, slides, device)

    def _embed(self, tiles: Tensor, cells: Tensor) -> Tensor:
        """Projected tiles (..., E) with their places, from tiles (..., C) and cells (..., 2)."""
        # Under autocast the projection casts by itself, to what it computes in.
        kind = tiles.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            tiles = tiles.to(self.patch_embed.weight.dtype)
        embedded: Tensor = linear(self.patch_embed, tiles)
        cells = cells.to(embedded.device, non_blocking=True)
        inside = ((cells >= 0) & (cells < self.config.grid_size)).all(-1)
        # NaN has no whole number.
        whole = cells.masked_fill(~inside.unsqueeze(-1), 0).long()
        # In the weights' dtype, float32 under autocast: the layers add to this sum.
        places: Tensor = self.places(whole, inside)
        return embedded + places.to(self.cls_token.dtype)

    def _summary(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """One embedding (B, E) of states (B, 1 + N, E), which are 0 where the mask is."""
        if not self.config.global_pool:
            pooled = states[:, 0]
        elif mask is None:
            pooled = states[:, 1:].mean(dim=1)
        else:
            counts = (~mask[:, 1:]).sum(dim=1, keepdim=True)
            pooled = states[:, 1:].sum(dim=1) / counts.clamp(min=1)
        embedding: Tensor = self.norm(pooled)
        return embedding

    def _packed_summary(self, states: Tensor, ends: list[int]) -> Tensor:
        """The embeddings (S, E) of packed states (T + S, E)."""
        slides = [states[start:end] for start, end in pairwise(ends)]
        pool = self.config.global_pool
        pooled = torch.stack([rows[1:].mean(dim=0) if pool else rows[0] for rows in slides])
        embedding: Tensor = self.norm(pooled)
        return embedding


def _ends(ends: list[int], device: torch.device) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32).to(device, non_blocking=True)


def _check_mask(mask: Tensor, tiles: Tensor) -> None:
    if mask.shape != tiles.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"key_padding_mask must be bool of shape {tuple(tiles.shape[:2])}. "
            f"Got {mask.dtype} of {tuple(mask.shape)}."
        )
    if readable(mask):
        empty = mask.all(dim=1).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                "key_padding_mask must leave at least one tile of each slide. "
                f"Got none in slide {', '.join(map(str, empty))}."
            )
