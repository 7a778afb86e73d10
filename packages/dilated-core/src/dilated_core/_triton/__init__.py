"""The `triton` backend: one pass over strided runs of rows, forward and backward.

Nothing here imports triton until `attend` is called. Results are deterministic: the same inputs
give the same bits, forward and backward.
"""

import torch
from torch import Tensor

from dilated_core._inputs import Options
from dilated_core._partial import Partial
from dilated_core.triton_kernels._driving import Schedule, Scores
from dilated_core.triton_kernels._support import unsupported

__all__ = [
    "attend",
    "attend_rows",
    "attend_rows_backward",
    "attend_span",
    "attend_span_backward",
    "drive",
    "drive_backward",
    "unsupported",
]


def attend(
    options: Options, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None = None
) -> Partial:
    """Dilated attention with exact gradients: out (B, N, H, D) in query's dtype, lse (B, H, N).

    With `cu_seqlens` (S + 1,) the batch is 1 and the rows are S sequences, one after the other.
    `unsupported` says which calls it cannot serve.
    """
    from dilated_core.triton_kernels import _operators

    return _operators.OPERATORS.attend(options, query, key, value, cu_seqlens)


def attend_span(
    options: Options, query: Tensor, key: Tensor, value: Tensor, first_key: int
) -> Partial:
    """Dilated attention among the rows of a span that starts at position `first_key`.

    As `drive` in all else. Zero keys (`count_padding`) would be those of a sequence that ends with
    the span, so such patterns are not for it.
    """
    from dilated_core.triton_kernels import _launch

    with torch.cuda.device_of(query):
        call = _launch.pattern_call(options, query, key, value, first_key=first_key)
        return _launch.run_forward(call)


def attend_span_backward(
    options: Options,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    total: Partial,
    first_key: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint of `attend_span`, given the partial of all keys; gradients in query's dtype."""
    from dilated_core.triton_kernels import _launch

    with torch.cuda.device_of(query):
        call = _launch.pattern_call(options, query, key, value, first_key=first_key)
        return _launch.run_backward(call, grad_out, grad_lse, total)


def attend_rows(
    scale: float, is_causal: bool, key_mask: Tensor | None, query: Tensor, key: Tensor,
    value: Tensor,
) -> Partial:  # fmt: skip
    """Attention of each query to all keys: out (B, n, H, D) and lse (B, H, n), in float32.

    Args:
        scale: factor on the scores.
        is_causal: hide the keys after each query; there are then as many keys as queries.
        key_mask: (B, m) bool, True = ignore, or None.
        query: (B, n, H, D).
        key: (B, m, H, D), value like it.
        value: see `key`.
    """
    from dilated_core.triton_kernels import _launch

    with torch.cuda.device_of(query):
        call = _launch.rows_call(scale, is_causal, key_mask, query, key, value)
        return _launch.run_forward(call, wide=True)


def attend_rows_backward(
    scale: float,
    is_causal: bool,
    key_mask: Tensor | None,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    total: Partial,
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint of `attend_rows`, given the partial of all keys; gradients in float32."""
    from dilated_core.triton_kernels import _launch

    # The kernels write the gradient to a query, and its terms, where its out and lse are.
    total = Partial(total.out.contiguous(), total.lse.contiguous())
    with torch.cuda.device_of(query):
        call = _launch.rows_call(scale, is_causal, key_mask, query, key, value)
        return _launch.run_backward(call, grad_out, grad_lse, total, wide=True)


def drive(
    options: Scores, schedule: Schedule, query: Tensor, key: Tensor, value: Tensor
) -> Partial:
    """Attention over what a schedule shows: out (B, N, H, D) in query's dtype, lse (B, H, N).

    Outside of any operator, so without gradients: `drive_backward` is to be one's backward. Every
    element is written, also of rows that see nothing: out 0 and lse -inf. When causal, the queries
    are the last N of the M positions. `unsupported` says which calls cannot be served.

    Args:
        options: what to do with the scores.
        schedule: which keys each query sees.
        query: (B, N, H, D).
        key: (B, M, H_kv, D), value like it.
        value: see `key`.
    """
    from dilated_core.triton_kernels import _launch

    # Kernels are launched on the current device, so make it the tensors' one.
    with torch.cuda.device_of(query):
        return _launch.run_forward(_launch.Call(options, schedule, query, key, value))


def drive_backward(
    options: Scores,
    schedule: Schedule,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    total: Partial,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value, in their dtype, given what `drive` returned."""
    from dilated_core.triton_kernels import _launch

    with torch.cuda.device_of(query):
        call = _launch.Call(options, schedule, query, key, value)
        return _launch.run_backward(call, grad_out, grad_lse, total)
