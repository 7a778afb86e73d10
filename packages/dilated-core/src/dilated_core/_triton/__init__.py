"""The `triton` backend: one pass over strided runs of rows, forward and backward.

Nothing here imports triton until `attend` is called. Results are deterministic: the same inputs
give the same bits, forward and backward.
"""

from torch import Tensor

from dilated_core._call import DilatedCall, Scores, Upstream
from dilated_core._partial import Partial
from dilated_core._triton._driving import HeldTensors, Tiling
from dilated_core._triton._support import on_device, relaunched, unsupported

__all__ = [
    "HeldTensors",
    "attend",
    "attend_rows",
    "attend_rows_backward",
    "attend_span",
    "attend_span_backward",
    "decode",
    "drive",
    "drive_backward",
    "on_device",
    "relaunched",
    "unsupported",
]
Gradients = tuple[Tensor, Tensor, Tensor]


def attend(call: DilatedCall, query: Tensor, key: Tensor, value: Tensor) -> Partial:
    """Dilated attention with exact gradients: out (B, N, H, D) in query's dtype, lse (B, H, N).

    `unsupported` says which calls it cannot serve.
    """
    from dilated_core._triton import _operators

    return _operators.OPERATORS.attend(call, query, key, value)


def attend_span(
    call: DilatedCall, query: Tensor, key: Tensor, value: Tensor, first_key: int
) -> Partial:
    """Dilated attention among the rows of a span that starts at position `first_key`.

    As `drive` in all else. Zero keys (`count_padding`) would be those of a sequence that ends with
    the span, so such patterns are not for it.
    """
    from dilated_core._triton import _launch

    return _launch.forward(_launch.pattern_call(call, query, key, value, first_key))


def attend_span_backward(call: DilatedCall, upstream: Upstream, first_key: int) -> Gradients:
    """The adjoint of `attend_span`, given the partial of all keys; gradients in query's dtype."""
    from dilated_core._triton import _launch

    _, _, query, key, value, _ = upstream
    return _launch.backward(_launch.pattern_call(call, query, key, value, first_key), upstream)


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
    from dilated_core._triton import _launch

    call = _launch.rows_call(Scores(is_causal, scale, key_mask), query, key, value)
    return _launch.forward(call, wide=True)


def attend_rows_backward(
    scale: float, is_causal: bool, key_mask: Tensor | None, upstream: Upstream
) -> Gradients:
    """The adjoint of `attend_rows`, given the partial of all keys; gradients in float32."""
    from dilated_core._triton import _launch

    _, _, query, key, value, total = upstream
    # The kernels write the gradient to a query, and its terms, where its out and lse are.
    total = Partial(total.out.contiguous(), total.lse.contiguous())
    call = _launch.rows_call(Scores(is_causal, scale, key_mask), query, key, value)
    return _launch.backward(call, upstream._replace(total=total), wide=True)


def decode(
    held: HeldTensors, scale: float, real: Tensor | None, query: Tensor, key: Tensor,
    value: Tensor, padding: Tensor | None,
) -> Tensor:  # fmt: skip
    """Keep one new row of each sequence, count it in `lengths`, and attend it to all rows so far.

    Two launches, whose shapes depend on those of the tensors alone: nothing is awaited, and a CUDA
    graph can hold them.

    Args:
        held: where the rows go.
        scale: factor on the scores.
        real: (B,) int64, 0 where there is no new row: its output is 0 then, nothing is kept.
        query: (B, 1, H, D).
        key: (B, 1, H_kv, D), value like it.
        value: see `key`.
        padding: (B, 1) bool, True = ignore the new key, or None; `held` then has a padding too.

    Returns:
        (B, 1, H, D) in query's dtype.
    """
    from dilated_core._triton import _decode

    return _decode.decode(held, scale, real, query, key, value, padding)


def drive(scores: Scores, tiling: Tiling, query: Tensor, key: Tensor, value: Tensor) -> Partial:
    """Attention over what a tiling shows: out (B, N, H, D) in query's dtype, lse (B, H, N).

    Outside of any operator, so without gradients: `drive_backward` is to be one's backward. Every
    element is written, also of rows that see nothing: out 0 and lse -inf. When causal, the queries
    are the last N of the M positions. `unsupported` says which calls cannot be served.

    Args:
        scores: what to do with the scores.
        tiling: which keys each query sees.
        query: (B, N, H, D).
        key: (B, M, H_kv, D), value like it.
        value: see `key`.
    """
    from dilated_core._triton import _launch

    return _launch.forward(_launch.KernelCall(scores, tiling, query, key, value))


def drive_backward(scores: Scores, tiling: Tiling, upstream: Upstream) -> Gradients:
    """Gradients to query, key and value, in their dtype, given what `drive` returned."""
    from dilated_core._triton import _launch

    _, _, query, key, value, _ = upstream
    return _launch.backward(_launch.KernelCall(scores, tiling, query, key, value), upstream)
