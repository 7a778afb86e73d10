"""Configurations of block layouts: what a layout is, without the length that it is built for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from dilated_core.extending import remembered
from dilated_factory.configs.base import KIND, FrozenConfig

if TYPE_CHECKING:
    from dilated_sparse import BlockLayout

Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, description="of the random blocks")]
Drawn = Annotated[int, Field(ge=1, description="heads, each of which draws for itself")]


class _Layout(FrozenConfig):
    """What all layouts have: tokens on a side of a block. Definitions: `dilated_sparse.layouts`."""

    block_size: Size = Field(default=128, description="tokens on a side of a block")

    def arguments(self, length: int) -> dict[str, Any]:
        """The arguments of the function of `dilated_sparse.layouts` that has the layout's name."""
        return {"length": length, **self.model_dump(exclude={"kind"})}


class SlidingWindowConfig(_Layout):
    """Keys at a distance of at most `window`."""

    kind: Annotated[Literal["sliding_window"], KIND] = "sliding_window"
    window: Count = Field(description="largest distance of a key, in tokens")


class DilatedWindowConfig(_Layout):
    """Every `dilation`-th key, up to `window` of them on either side."""

    kind: Annotated[Literal["dilated_window"], KIND] = "dilated_window"
    window: Count = Field(description="keys on either side")
    dilation: Size = Field(description="tokens from a key to the next")


class StridedConfig(_Layout):
    """Sparse Transformer's strided pattern."""

    kind: Annotated[Literal["strided"], KIND] = "strided"
    stride: Size = Field(description="near tokens, and tokens from a far key to the next")


class FixedConfig(_Layout):
    """Sparse Transformer's fixed pattern."""

    kind: Annotated[Literal["fixed"], KIND] = "fixed"
    stride: Size = Field(description="tokens of a segment")
    summary: Size = Field(description="last tokens of a segment, which all later queries see")


class GlobalTokensConfig(_Layout):
    """The first `count` tokens see and are seen by all."""

    kind: Annotated[Literal["global_tokens"], KIND] = "global_tokens"
    count: Count = Field(description="tokens at the start")


class RandomBlocksConfig(_Layout):
    """`count` random blocks of keys for each block of queries."""

    kind: Annotated[Literal["random_blocks"], KIND] = "random_blocks"
    count: Count = Field(description="blocks of keys for a block of queries")
    seed: Seed = 0
    heads: Drawn = 1


class BigBirdConfig(_Layout):
    """BigBird: window, global and random blocks."""

    kind: Annotated[Literal["bigbird"], KIND] = "bigbird"
    window_blocks: Size = Field(default=3, description="blocks in the window, the own one included")
    global_blocks: Count = Field(default=2, description="blocks at the start that see all")
    random_blocks: Count = Field(default=3, description="blocks of keys for a block of queries")
    seed: Seed = 0
    heads: Drawn = 1
    block_size: Size = Field(default=64, description="tokens on a side of a block")


class LongformerConfig(_Layout):
    """Longformer: a window, and global tokens at the start."""

    kind: Annotated[Literal["longformer"], KIND] = "longformer"
    window: Count = Field(description="largest distance of a key, in tokens")
    global_count: Count = Field(description="tokens at the start that see all")


class DocumentConfig(_Layout):
    """Documents of these lengths, one after the other, that do not see each other."""

    kind: Annotated[Literal["document"], KIND] = "document"
    lengths: tuple[Count, ...] = Field(description="of the documents, in tokens")

    def arguments(self, length: int) -> dict[str, Any]:
        """As in the base class; the lengths must add up to `length`.

        Raises:
            ValueError: they do not.
        """
        if sum(self.lengths) != length:
            raise ValueError(f"lengths must add up to {length}. Got {sum(self.lengths)}.")
        return self.model_dump(exclude={"kind"})


class PrefixConfig(_Layout):
    """The first `count` tokens are seen by all, the others causally."""

    kind: Annotated[Literal["prefix"], KIND] = "prefix"
    count: Count = Field(description="tokens of the prefix")


class HierarchicalConfig(_Layout):
    """Windows at several scales, coarser further away."""

    kind: Annotated[Literal["hierarchical"], KIND] = "hierarchical"
    window: Count = Field(description="cells of each level on either side")
    levels: Size = Field(description="how many scales; a cell of the first is a token")
    growth: int = Field(default=2, ge=2, description="factor of a cell's side from level to level")


LayoutConfig = Annotated[
    SlidingWindowConfig
    | DilatedWindowConfig
    | StridedConfig
    | FixedConfig
    | GlobalTokensConfig
    | RandomBlocksConfig
    | BigBirdConfig
    | LongformerConfig
    | DocumentConfig
    | PrefixConfig
    | HierarchicalConfig,
    Field(discriminator="kind"),
]


# Building costs more than one step of attention; layouts are immutable, so callers can share them.
@remembered(8)
def build_layout(config: LayoutConfig, length: int) -> BlockLayout:
    """The layout of `config` for `length` positions. Needs dilated-sparse.

    Raises:
        ValueError: the layout does not fit the length.
    """
    from dilated_sparse import layouts

    function = getattr(layouts, config.kind)
    layout: BlockLayout = function(**config.arguments(length))
    return layout
