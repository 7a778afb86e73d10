"""Configurations of block layouts: what a layout is, without the length that it is built for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from dilated_core.extending import remembered
from dilated_factory.configs.base import FrozenConfig

if TYPE_CHECKING:
    from dilated_sparse import BlockLayout

Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]


class _Layout(FrozenConfig):
    """What all layouts have: tokens on a side of a block. Definitions: `dilated_sparse.layouts`."""

    block_size: Size = 128

    def arguments(self, length: int) -> dict[str, Any]:
        """The arguments of the function of `dilated_sparse.layouts` that has the layout's name."""
        return {"length": length, **self.model_dump(exclude={"kind"})}


class SlidingWindowConfig(_Layout):
    """Keys at a distance of at most `window`."""

    kind: Literal["sliding_window"] = "sliding_window"
    window: Count


class DilatedWindowConfig(_Layout):
    """Every `dilation`-th key, up to `window` of them on either side."""

    kind: Literal["dilated_window"] = "dilated_window"
    window: Count
    dilation: Size


class StridedConfig(_Layout):
    """Sparse Transformer's strided pattern."""

    kind: Literal["strided"] = "strided"
    stride: Size


class FixedConfig(_Layout):
    """Sparse Transformer's fixed pattern."""

    kind: Literal["fixed"] = "fixed"
    stride: Size
    summary: Size


class GlobalTokensConfig(_Layout):
    """The first `count` tokens see and are seen by all."""

    kind: Literal["global_tokens"] = "global_tokens"
    count: Count


class RandomBlocksConfig(_Layout):
    """`count` random blocks of keys for each block of queries."""

    kind: Literal["random_blocks"] = "random_blocks"
    count: Count
    seed: Count = 0
    heads: Size = 1


class BigBirdConfig(_Layout):
    """BigBird: window, global and random blocks."""

    kind: Literal["bigbird"] = "bigbird"
    window_blocks: Size = 3
    global_blocks: Count = 2
    random_blocks: Count = 3
    seed: Count = 0
    heads: Size = 1
    block_size: Size = 64


class LongformerConfig(_Layout):
    """Longformer: a window, and global tokens at the start."""

    kind: Literal["longformer"] = "longformer"
    window: Count
    global_count: Count


class DocumentConfig(_Layout):
    """Documents of these lengths, one after the other, that do not see each other."""

    kind: Literal["document"] = "document"
    lengths: tuple[Count, ...]

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

    kind: Literal["prefix"] = "prefix"
    count: Count


class HierarchicalConfig(_Layout):
    """Windows at several scales, coarser further away."""

    kind: Literal["hierarchical"] = "hierarchical"
    window: Count
    levels: Size
    growth: Annotated[int, Field(ge=2)] = 2


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
