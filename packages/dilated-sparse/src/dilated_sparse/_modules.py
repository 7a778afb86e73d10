"""Attention modules: block-sparse, and block-sparse together with a dilated pattern."""

from typing import cast

from torch import Tensor, nn

from dilated_core import DilatedPattern, Partial, dilated_attention, merge
from dilated_sparse import _checks
from dilated_sparse._functional import block_sparse_attention
from dilated_sparse._layout import BlockLayout


class BlockSparseAttention(nn.Module):
    """`block_sparse_attention` as a module: (B, N, H, D) heads in, (B, N, H, D) out.

    Goes into `dilated_core.MultiheadDilatedAttention(attention=...)`.

    Args:
        layout: which keys a query sees; it fixes the lengths N and M.
        scale: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability of dropping an attention weight while training.
        backend: "triton", "flex", "torch" or "reference" to force one; None picks.
    """

    def __init__(
        self,
        layout: BlockLayout,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(layout, BlockLayout):
            raise TypeError(f"layout must be a BlockLayout. Got {type(layout).__name__}.")
        self.layout = layout
        self.scale = scale
        self.dropout = _checks.number("dropout", dropout, low=0.0, high=1.0, closed=False)
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend: query (B, N, H, D), key and value (B, M, H_kv, D), mask (B, M) True = ignore."""
        return cast(Tensor, self._attend(query, key, value, is_causal, key_padding_mask, False))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool,
        key_padding_mask: Tensor | None,
        return_lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return block_sparse_attention(
            query, key, value, self.layout,
            is_causal=is_causal, scale=self.scale, key_padding_mask=key_padding_mask,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=query.ndim == 4 and key.ndim == 4 and query.shape[2] != key.shape[2],
            return_lse=return_lse, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        parts = [repr(self.layout)]
        for name, default in (("scale", None), ("dropout", 0.0), ("backend", None)):
            if (value := getattr(self, name)) != default:
                parts.append(f"{name}={value!r}")
        return ", ".join(parts)


class BlockSparseDilatedAttention(BlockSparseAttention):
    """One softmax over the multiset union of a dilated pattern's keys and a layout's.

    A key counts once for each branch of the pattern that shows it, and once more where the layout
    shows it. Both parts are exact partials, so their merge is exact, gradients included.

    Args:
        pattern: the dilated pattern.
        layout: the layout; it fixes the lengths N and M.
        scale: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability of dropping an attention weight while training, drawn for each part.
        backend: "triton", "torch" or "reference" to force one in both parts; None picks.
    """

    def __init__(
        self,
        pattern: DilatedPattern,
        layout: BlockLayout,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
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
        """Attend: query (B, N, H, D), key and value (B, M, H_kv, D), mask (B, M) True = ignore."""
        sparse = self._attend(query, key, value, is_causal, key_padding_mask, True)
        dilated = dilated_attention(
            query, key, value, self.pattern,
            is_causal=is_causal, scale=self.scale, key_padding_mask=key_padding_mask,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=query.shape[2] != key.shape[2],
            return_lse=True, backend=self.backend,
        )  # fmt: skip
        return merge(Partial(*sparse), Partial(*dilated)).out.to(sparse[0].dtype)

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        return f"{self.pattern!r}, {super().extra_repr()}"
