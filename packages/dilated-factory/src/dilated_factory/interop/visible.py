"""What queries see in models of others: a dilated pattern, or a block-sparse layout."""

# Shapes: B batch, N queries, M keys, H heads, D head_dim.

import sys
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from torch import Tensor, nn

from dilated_core import DilatedAttention, DilatedPattern, dilated_attention

if TYPE_CHECKING:
    from dilated_sparse import BlockLayout

Visible: TypeAlias = "DilatedPattern | BlockLayout"

ONE_SEGMENT = DilatedPattern([1 << 40], [1])  # all there is, of any length


def is_layout(value: object) -> bool:
    """Whether it is a block-sparse layout; without dilated-sparse nobody has one."""
    sparse = sys.modules.get("dilated_sparse")
    return sparse is not None and isinstance(value, sparse.BlockLayout)


def check_visible(name: str, value: object) -> None:
    """Raise TypeError unless it is a DilatedPattern or a BlockLayout."""
    if not isinstance(value, DilatedPattern) and not is_layout(value):
        raise TypeError(
            f"{name} must be a DilatedPattern or a BlockLayout. Got {type(value).__name__}."
        )


def between_heads(visible: Visible, heads: int, dropout: float) -> nn.Module:
    """The module of attention between heads, (B, N, H, D) each.

    Raises:
        ValueError: a pattern splits more groups than there are heads.
    """
    if isinstance(visible, DilatedPattern):
        visible.branch_heads(heads)
        return DilatedAttention(visible, dropout=dropout)
    from dilated_sparse import BlockSparseAttention

    return BlockSparseAttention(visible, dropout=dropout)


def attend(
    visible: Visible, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, **options: Any
) -> Tensor:
    """One call on (B, N, H, D) and (B, M, H_kv, D); a layout is taken at the lengths of the call.

    ``options`` are those of `dilated_attention`.
    """
    if isinstance(visible, DilatedPattern):
        out = dilated_attention(query, key, value, visible, is_causal=is_causal, **options)
    else:
        from dilated_sparse import BlockSparseAttention, block_sparse_attention

        layout = BlockSparseAttention(visible).layout_for(query, key, is_causal=is_causal)
        out = block_sparse_attention(query, key, value, layout, is_causal=is_causal, **options)
    return cast(Tensor, out)
