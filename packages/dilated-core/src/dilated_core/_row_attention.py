"""Dense attention of rows to rows: by a GPU kernel where one can serve, else as `dense` does.

Shapes as there: query (b, h, n, D), key and value (b, h, m, D), lse (b, h, n).
"""

from torch import Tensor

from dilated_core import _triton
from dilated_core._call import Upstream
from dilated_core._partial import Partial
from dilated_core._torch import dense
from dilated_core._torch.dense import RowAttention


def attend(rows: RowAttention, query: Tensor, key: Tensor, value: Tensor) -> Partial:
    """Attention over these keys: out (b, h, n, D), lse (b, h, n); 0 and -inf where none is seen."""
    if not _has_kernel(rows, query, key):
        return dense.attend(rows, query, key, value)
    tensors = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out, lse = _triton.attend_rows(rows.scale, rows.is_causal, rows.key_mask, *tensors)
    return Partial(out.transpose(1, 2), lse)


def attend_backward(
    rows: RowAttention,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    total: Partial,
) -> tuple[Tensor, Tensor, Tensor]:
    """Wide gradients to query, key, value from these keys, given the merged partial of all keys."""
    if not _has_kernel(rows, query, key):
        total = Partial(total.out, dense.hide_unseen(total.lse))
        return dense.attend_backward(rows, grad_out, grad_lse, query, key, value, total)
    upstream = Upstream(
        grad_out.transpose(1, 2), grad_lse, query.transpose(1, 2), key.transpose(1, 2),
        value.transpose(1, 2), Partial(total.out.transpose(1, 2), total.lse),
    )  # fmt: skip
    dq, dk, dv = _triton.attend_rows_backward(rows.scale, rows.is_causal, rows.key_mask, upstream)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _has_kernel(rows: RowAttention, query: Tensor, key: Tensor) -> bool:
    # The kernels draw a dropout mask by the positions of rows, which are not given here, and when
    # causal take the last query for that of the last key.
    if rows.keep is not None:
        return False
    if rows.is_causal and query.shape[2] != key.shape[2]:
        return False
    return _triton.unsupported(query.transpose(1, 2), key.transpose(1, 2)) is None
