"""`BlockLayout`: which blocks of keys each block of queries sees, exact to the token.

N queries, M keys, b block_size, R block rows, C block columns, nnz visible blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, Self, cast

import torch
from torch import Tensor

from dilated_sparse import _block_mask, _checks, _combine, _cut, _picture
from dilated_sparse._blocks import HeadRule, Layout, Rule, compress, from_head_rule
from dilated_sparse._grid import Grid, make_grid
from dilated_sparse._spans import LayoutSpans

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.nn.attention.flex_attention import BlockMask


P = ParamSpec("P")


@dataclass(frozen=True, init=False, eq=False, repr=False)
class BlockLayout(Layout):
    """The visible blocks as compressed rows of full and partial blocks; immutable and hashable.

    A block is full (all its token pairs are visible) or partial (a mask says which). Neighbours of
    one kind in a row are stored as one run, so memory is O(runs), and no more than O(nnz). Layouts
    of equal token pairs, sizes and heads are equal, on whatever device. Make one with
    `dilated_sparse.layouts`, a `from_...` method, `|` or `&`, not by this constructor.

    Shapes: query positions N, key positions M, heads H, rows of blocks R.

    Attributes:
        length: number of queries N.
        key_length: number of keys M.
        block_size: tokens on a side of a block; the last blocks may be short.
        heads: 1 for a layout that all heads share, or the number of query heads; of a layout whose
            batch rows differ, of all rows together.
        batch: how many batch rows have a layout of their own, 1 where all share one; `rows` are
            theirs.
        run_offsets: (heads * R + 1,) int64; row r of head h has the runs from
            run_offsets[h * R + r] up to the next entry.
        run_columns: (runs,) int32, the first column of each, rising in a row.
        run_counts: (runs,) int32, how many blocks it has.
        run_masks: (runs,) int32; -1 where its blocks are full, else their mask in `table`.
        table: (masks, b, ceil(b / 8)) uint8, each mask once; bit j % 8 of byte j // 8 of row i
            says whether query i of the block sees its key j.

    Examples:
        >>> layout = layouts.sliding_window(128, 32, block_size=32).causal()
        >>> print(layout.text(size=4))
        +...
        ++..
        .++.
        ..++
        >>> dense = layout.to_dense()
        >>> BlockLayout.from_dense(dense, block_size=32) == layout
        True
    """

    _rule: ClassVar[Rule | None] = None

    @classmethod
    def from_dense(cls, mask: Tensor, *, block_size: int = 128) -> Self:
        """The layout of a bool mask; True = visible.

        (N, M), shared by all heads, (H, N, M), or (B, H or 1, N, M) where batch rows differ.

        Raises:
            TypeError: mask is no bool tensor.
            ValueError: mask has another shape.
        """
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a Tensor. Got {type(mask).__name__}.")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, True = visible. Got {mask.dtype}.")
        if mask.ndim not in (2, 3, 4) or 0 in mask.shape[:-2]:
            raise ValueError(
                f"mask must have shape (N, M), (H, N, M) or (B, H, N, M). Got {tuple(mask.shape)}."
            )
        batch = len(mask) if mask.ndim == 4 else 1
        mask = mask.flatten(0, -3) if mask.ndim > 2 else mask[None]
        heads, length, key_length = mask.shape

        def visible(head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return mask[head, query, key]

        grid = make_grid(length, key_length, block_size, mask.device)
        return cls._from_rule(grid, visible, heads, batch)

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: _block_mask.MaskMod,
        length: int,
        *,
        key_length: int | None = None,
        block_size: int = 128,
        heads: int = 1,
        batch: int = 1,
        device: torch.device | str = "cpu",
    ) -> Self:
        """The layout of a FlexAttention `mask_mod(batch, head, query, key)`, called on tensors.

        It is called on every token pair: O(batch * heads * N * M) time, O(nnz) memory.
        """
        rule = _block_mask.as_rule(mask_mod, _checks.integer("heads", heads))
        _checks.integer("batch", batch)
        key_length = length if key_length is None else key_length
        grid = make_grid(length, key_length, block_size, device)
        return cls._from_rule(grid, rule, heads * batch, batch)

    @classmethod
    def from_block_mask(cls, block_mask: BlockMask) -> Self:
        """The layout of torch's BlockMask: square blocks. O(nnz * b^2) time."""
        return _block_mask.to_layout(cls, block_mask)

    @classmethod
    def stack(cls, layouts: Sequence[BlockLayout]) -> Self:
        """One layout for a batch whose rows differ: the first is the first row's, and so on.

        Raises:
            TypeError: one is no BlockLayout.
            ValueError: there is none, one has rows of its own, or their lengths, block sizes,
                devices or heads differ (a layout that all heads share goes with any).
        """
        layouts = tuple(layouts)
        for i, x in enumerate(layouts):
            if not isinstance(x, BlockLayout):
                raise TypeError(f"layouts[{i}] must be a BlockLayout. Got {type(x).__name__}.")
        heads = max((x.heads for x in layouts), default=1)
        if not layouts or any(x.grid != layouts[0].grid or x.batch > 1 for x in layouts):
            raise ValueError(
                "layouts must be one or more, of one batch row each, of equal lengths, block sizes "
                f"and devices. Got {layouts!r}."
            )
        grid = layouts[0].grid
        runs = _combine.stack(grid, [x.per_head(heads).runs for x in layouts], heads)
        stacked = compress(cls, grid, runs, heads * len(layouts), len(layouts))
        rules = [x._rule for x in layouts]
        if any(rule is None for rule in rules):
            return stacked
        is_cut = all(rule is not None and rule.is_cut for rule in rules)
        return stacked.ruled(Rule(partial(_stack_at, layouts), is_cut))

    @classmethod
    def _from_rule(cls, grid: Grid, visible: HeadRule, heads: int, batch: int) -> Self:
        row = grid.arange(grid.rows).repeat_interleave(grid.columns)
        column = grid.arange(grid.columns).repeat(grid.rows)
        return from_head_rule(cls, grid, visible, [(row, column)] * heads, batch)

    def to_block_mask(self, *, device: torch.device | str | None = None) -> BlockMask:
        """Torch's BlockMask of the same token pairs; its tensors are O(heads * R * C).

        Args:
            device: where it is to be; the layout's device when None.
        """
        return _block_mask.from_layout(self if device is None else self.to(device))

    def text(self, head: int = 0, *, size: int = 64) -> str:
        """A picture in at most size x size letters: # full, + partial, . empty."""
        return _picture.text(self, head, size)

    def plot(self, *, size: int = 512) -> Figure:
        """A matplotlib Figure with a panel for each head, at most size x size pixels each.

        Raises:
            ImportError: matplotlib is not installed (the extra `plot` brings it).
        """
        return _picture.plot(self, size)

    def at(self, length: int, key_length: int | None = None) -> Self:
        """The same rule for another length: the last `length` of `key_length` positions.

        A named layout of `dilated_sparse.layouts`, and what |, &, `causal` and `per_head` make of
        such, is cut or goes on; what is made from a mask can only be cut. Random blocks are drawn
        anew where a layout goes on, and the last document of `document` grows. So `at(n)` is for a
        batch of shorter or longer sequences, and `at(1, n)` for a step of decoding.

        Args:
            length: queries.
            key_length: keys; as many as queries when None.

        Raises:
            TypeError: a length is no int.
            ValueError: it has not as many queries as keys, there would be more queries than keys,
                or it would have to go on and cannot.
        """
        _checks.integer("length", length, low=0)
        key_length = length if key_length is None else key_length
        if _checks.integer("key_length", key_length, low=0) < length:
            raise ValueError(f"key_length must be at least length={length}. Got {key_length}.")
        if self.length != self.key_length:
            raise ValueError(
                "a layout must have as many queries as keys to be cut or to go on. "
                f"Got {self.length} and {self.key_length}."
            )
        if length == key_length == self.length:
            return self
        rule, source = self._rule, self
        if rule is not None and not rule.is_cut and length != key_length:
            raise ValueError(
                "length must be key_length for a layout in an order of its own. "
                f"Got {length} and {key_length}."
            )
        if key_length > self.length or (rule is not None and not rule.is_cut):
            if rule is None:
                raise ValueError(
                    f"key_length must be at most {self.length} for a layout that is made from a "
                    f"mask. Got {key_length}."
                )
            source = cast(Self, rule.make(key_length).to(self.device))
        if length == key_length == source.length:
            return source
        found = _cut.cut(source, length, key_length)
        return found if rule is None or length != key_length else found.ruled(rule)

    @property
    def can_decode(self) -> bool:
        """Whether queries may come one by one: the layout of fewer is the beginning of this one."""
        in_order = self._rule is None or self._rule.is_cut
        return self.batch == 1 and self.length == self.key_length and in_order

    def ruled(self, rule: Rule | None) -> Self:
        """The same layout with a rule for other lengths; for code inside this package."""
        object.__setattr__(self, "_rule", rule)
        return self

    def causal(self) -> Self:
        """As `Layout.causal`; it goes on as this one does."""
        return super().causal().ruled(self._as(partial(_causal_at, self)))

    def per_head(self, heads: int) -> Self:
        """As `Layout.per_head`; it goes on as this one does."""
        found = super().per_head(heads)
        return found if found is self else found.ruled(self._as(partial(_heads_at, self, heads)))

    def to(self, device: torch.device | str) -> Self:
        """As `Layout.to`; it goes on as this one does."""
        found = super().to(device)
        return found if found is self else found.ruled(self._rule)

    def _combine(self, other: Layout, operation: _combine.Operation) -> Self:
        found = super()._combine(other, operation)
        if found is NotImplemented or not isinstance(other, BlockLayout):
            return found
        rule, second = self._rule, other._rule
        if rule is None or second is None:
            return found.ruled(None)
        both = partial(_both_at, self, other, operation)
        return found.ruled(Rule(both, rule.is_cut and second.is_cut))

    def _as(self, make: Callable[[int], BlockLayout]) -> Rule | None:
        return None if self._rule is None else Rule(make, self._rule.is_cut)

    @property
    def spans(self) -> LayoutSpans:
        """Attention by this layout span by span, as sequence-parallel attention takes it."""
        return LayoutSpans(self)


def _causal_at(layout: BlockLayout, length: int) -> BlockLayout:
    return layout.at(length).causal()


def _stack_at(layouts: tuple[BlockLayout, ...], length: int) -> BlockLayout:
    return BlockLayout.stack([x.at(length) for x in layouts])


def _heads_at(layout: BlockLayout, heads: int, length: int) -> BlockLayout:
    return layout.at(length).per_head(heads)


def _both_at(
    one: BlockLayout, other: BlockLayout, operation: _combine.Operation, length: int
) -> BlockLayout:
    return one.at(length)._combine(other.at(length), operation)


def ruled(*, is_cut: bool = True) -> Callable[[Callable[P, BlockLayout]], Callable[P, BlockLayout]]:
    """Have a function whose first argument is the length give its layouts a rule."""

    def decorate(make: Callable[P, BlockLayout]) -> Callable[P, BlockLayout]:
        @wraps(make)
        def made(*args: P.args, **options: P.kwargs) -> BlockLayout:
            again = partial(_again, made, args, options)
            return make(*args, **options).ruled(Rule(again, is_cut))

        return made

    return decorate


def _again(
    make: Callable[..., BlockLayout], args: tuple[Any, ...], options: dict[str, Any], length: int
) -> BlockLayout:
    if args:
        return make(length, *args[1:], **options)
    return make(**{**options, "length": length})
