"""Block-sparse attention: layouts, selection by content, exact attention over visible blocks."""

from dilated_core.extending import BackendChoice
from dilated_sparse import layouts, select
from dilated_sparse.__about__ import __version__
from dilated_sparse._attend import Backend
from dilated_sparse._cache import BlockSparseKVCache
from dilated_sparse._functional import block_sparse_attention, select_backend
from dilated_sparse._layout import BlockLayout
from dilated_sparse._modules import BlockSparseAttention, BlockSparseDilatedAttention

__all__ = [
    "Backend",
    "BackendChoice",
    "BlockLayout",
    "BlockSparseAttention",
    "BlockSparseDilatedAttention",
    "BlockSparseKVCache",
    "__version__",
    "block_sparse_attention",
    "layouts",
    "select",
    "select_backend",
]
