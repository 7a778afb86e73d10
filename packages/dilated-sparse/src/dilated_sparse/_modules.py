"""Attention modules: block-sparse, and block-sparse together with a dilated pattern."""

from typing import cast

from torch import Tensor

from dilated_core import DilatedPattern, Partial, dilated_attention, merge
from dilated_core.extending import HeadAttention, remembered, uncompiled
from dilated_core.interfaces import DecodingState
from dilated_sparse._attend import BACKENDS, Backend, attend
from dilated_sparse._cache import BlockSparseKVCache
from dilated_sparse._layout import BlockLayout


@uncompiled  # its sizes depend on what a layout holds: no graph can have it
@remembered(64)
def _at(layout: BlockLayout, length: int, key_length: int) -> BlockLayout:
    return layout.at(length, key_length)


class BlockSparseAttention(HeadAttention):
    """`block_sparse_attention` as a module: (B, N, H, D) heads in, (B, N, H, D) out.

    Goes into `dilated_core.MultiheadDilatedAttention(attention=...)`.

    Shapes: batch B, query positions N, key positions M, heads H, key and value heads H_kv, width of
    a head D.

    Args:
        layout: which keys a query sees; of other lengths than its own, `layout.at` says.
        scale: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability of dropping an attention weight while training.
        backend: "triton", "flex", "torch" or "reference" to force one; None picks.

    Raises:
        TypeError: layout is no BlockLayout, or dropout or scale no number.
        ValueError: dropout is not in [0, 1), scale is not finite, or backend names none.

    Examples:
        >>> attention = BlockSparseAttention(layouts.sliding_window(128, 32))
        >>> q, k, v = torch.randn(3, 1, 100, 4, 16)  # shorter than the layout
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 100, 4, 16])
    """

    _backends: tuple[str, ...] = BACKENDS

    def __init__(
        self,
        layout: BlockLayout,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(scale=scale, dropout=dropout, backend=backend, backends=self._backends)
        self.backend: Backend | None
        if not isinstance(layout, BlockLayout):
            raise TypeError(f"layout must be a BlockLayout. Got {type(layout).__name__}.")
        self.layout = layout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend, as `block_sparse_attention` does.

        Args:
            query: (B, N, H, D).
            key: (B, M, H_kv, D).
            value: (B, M, H_kv, D).
            is_causal: hide the keys after each query.
            key_padding_mask: (B, M) bool, True = ignore.

        Returns:
            (B, N, H, D) in query's dtype.

        Raises:
            TypeError, ValueError: as `block_sparse_attention`.
        """
        layout = self.layout_for(query, key, is_causal=is_causal)
        out = attend(
            layout, query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask,
            backend=self.backend, **self.options(query, key),
        )  # fmt: skip
        return cast(Tensor, out)

    def layout_for(self, query: Tensor, key: Tensor, *, is_causal: bool) -> BlockLayout:
        """The layout at the lengths of a call, (B, N, H, D) and (B, M, H_kv, D).

        The layout itself where these are its own, or cannot be had from it: the call then says so.
        """
        layout, sizes = self.layout, (query.shape[1], key.shape[1])
        if sizes == (layout.length, layout.key_length) or layout.length != layout.key_length:
            return layout
        return _at(layout, *sizes) if is_causal or sizes[0] == sizes[1] else layout

    @property
    def keeps_state(self) -> bool:
        """Whether the layout can be decoded by: `BlockSparseKVCache` says which."""
        return self.layout.can_decode

    def new_cache(self, length: int | None = None) -> DecodingState:
        """Empty decoding state for at most `length` positions; the layout's when None.

        Raises:
            TypeError, ValueError: as `BlockSparseKVCache`.
        """
        return BlockSparseKVCache(self.layout, length)

    def check_cache(self, cache: object) -> None:
        """As `HeadAttention.check_cache`."""
        if not isinstance(cache, BlockSparseKVCache):
            raise TypeError(f"cache must be a BlockSparseKVCache. Got {type(cache).__name__}.")
        if cache.source != self.layout:
            raise ValueError(
                f"cache must have the attention's layout {self.layout!r}. Got {cache.source!r}."
            )

    def shown(self) -> str:
        """The layout."""
        return repr(self.layout)


class BlockSparseDilatedAttention(BlockSparseAttention):
    """One softmax over the multiset union of a dilated pattern's keys and a layout's.

    A key counts once for each branch of the pattern that shows it, and once more where the layout
    shows it. Both parts are exact partials, so their merge is exact, gradients included.

    Args:
        pattern: the dilated pattern.
        layout: the layout, as in `BlockSparseAttention`.
        scale: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability of dropping an attention weight while training, drawn for each part.
        backend: "triton", "torch" or "reference" to force one in both parts; None picks.

    Raises:
        TypeError: pattern is no DilatedPattern, or as `BlockSparseAttention`.
        ValueError: as `BlockSparseAttention`.

    Examples:
        >>> from dilated_core import DilatedPattern
        >>> near = layouts.sliding_window(128, 32)
        >>> attention = BlockSparseDilatedAttention(DilatedPattern([128], [8]), near)
        >>> q, k, v = torch.randn(3, 1, 128, 4, 16)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 128, 4, 16])
    """

    # Flex gives no lse on the CPU, and core has no such backend.
    _backends = tuple(name for name in BACKENDS if name != "flex")

    def __init__(
        self,
        pattern: DilatedPattern,
        layout: BlockLayout,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(layout, scale=scale, dropout=dropout, backend=backend)
        if not isinstance(pattern, DilatedPattern):
            raise TypeError(f"pattern must be a DilatedPattern. Got {type(pattern).__name__}.")
        self.pattern = pattern

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend, as `BlockSparseAttention.forward`."""
        asked = {
            "is_causal": is_causal, "key_padding_mask": key_padding_mask, "return_lse": True,
            "backend": self.backend, **self.options(query, key),
        }  # fmt: skip
        layout = self.layout_for(query, key, is_causal=is_causal)
        sparse = attend(layout, query, key, value, **asked)
        dilated = dilated_attention(query, key, value, self.pattern, **asked)
        return merge(Partial(*sparse), Partial(*dilated)).out.to(sparse[0].dtype)

    @property
    def keeps_state(self) -> bool:
        """Never: there is no state of both parts."""
        return False

    new_cache = HeadAttention.new_cache
    check_cache = HeadAttention.check_cache

    def shown(self) -> str:
        """The pattern and the layout."""
        return f"{self.pattern!r}, {self.layout!r}"
