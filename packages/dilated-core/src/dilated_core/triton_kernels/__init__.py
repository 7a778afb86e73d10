"""The `triton` backend: one pass over strided runs of rows, forward and backward.

Nothing here imports triton until `attend` is called. Results are deterministic: the same inputs
give the same bits, forward and backward.
"""

from torch import Tensor

from dilated_core._inputs import Options
from dilated_core._partial import Partial
from dilated_core.triton_kernels._support import unsupported

__all__ = ["attend", "unsupported"]


def attend(
    options: Options, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None = None
) -> Partial:
    """Dilated attention with exact gradients: out (B, N, H, D) in query's dtype, lse (B, H, N).

    With `cu_seqlens` (S + 1,) the batch is 1 and the rows are S sequences, one after the other.
    `unsupported` says which calls it cannot serve.
    """
    from dilated_core.triton_kernels import _operators

    return _operators.OPERATORS.attend(options, query, key, value, cu_seqlens)
