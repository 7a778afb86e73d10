"""The public functions."""

from torch import Tensor

from dilated_core.extending import BackendChoice, choose
from dilated_sparse._attend import BACKENDS, REASONS, UNASKED, Backend, attend, obstacles
from dilated_sparse._layout import BlockLayout


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over the token pairs of a layout, with exact gradients and O(N) memory.

    Shapes: batch B, query positions N, key positions M, heads H, key and value heads H_kv, width of
    a head D.

    Args:
        query: (B, N, H, D), float16, bfloat16, float32 or float64.
        key: (B, M, H_kv, D). When causal, the queries are the last N of the M positions.
        value: (B, M, H_kv, D).
        layout: which keys a query sees; of N queries, M keys, and 1 or H heads.
        is_causal: hide the keys after each query.
        scale: factor on the scores; 1 / sqrt(D) when None.
        key_padding_mask: (B, M) bool, True = ignore, as in torch.nn.MultiheadAttention.
        dropout_p: probability of dropping an attention weight, in [0, 1), on every call.
        enable_gqa: allow H to be a multiple of H_kv; query head h reads key head
            h // (H / H_kv). A layout's heads are query heads.
        return_lse: also return the log-sum-exp.
        backend: "triton", "flex", "torch" or "reference" to force one; None picks.

    Returns:
        out (B, N, H, D) in query's dtype; with return_lse also lse (B, H, N), natural log,
        float32 or wider. A query that sees no key has out 0, lse -inf and zero gradients.

    Raises:
        TypeError: layout is no BlockLayout, or another argument has the wrong type or dtype.
        ValueError: lengths, heads, devices or sizes do not fit each other, is_causal with more
            queries than keys, dropout_p is not in [0, 1), scale is not finite, or `backend` names
            none, or one that cannot serve the call.

    Examples:
        >>> layout = layouts.sliding_window(128, 32) | layouts.global_tokens(128, 2)
        >>> q, k, v = torch.randn(3, 2, 128, 4, 16).requires_grad_()
        >>> out = block_sparse_attention(q, k, v, layout, is_causal=True)
        >>> out.sum().backward()
        >>> out.shape
        torch.Size([2, 128, 4, 16])
    """
    _check_layout(layout)
    return attend(
        layout, query, key, value, is_causal=is_causal, scale=scale,
        key_padding_mask=key_padding_mask, dropout_p=dropout_p, enable_gqa=enable_gqa,
        return_lse=return_lse, backend=backend,
    )  # fmt: skip


def select_backend(
    query: Tensor,
    key: Tensor,
    backend: Backend | None = None,
    *,
    layout: BlockLayout,
    dropout_p: float = 0.0,
    has_padding: bool = False,
    return_lse: bool = False,
    needs_gradients: bool = False,
) -> BackendChoice:
    """Pick the backend of a call by its request and the device, dtype and sizes of its tensors.

    Shapes: batch B, query positions N, key positions M, heads H, key and value heads H_kv, width of
    a head D.

    Args:
        query: (B, N, H, D); values do not matter.
        key: (B, M, H_kv, D).
        backend: the name of one to force it.
        layout: the layout of the call.
        dropout_p: as in the call.
        has_padding: whether the call has a key_padding_mask.
        return_lse: as in the call.
        needs_gradients: whether a backward may follow.

    Raises:
        TypeError: layout is no BlockLayout.
        ValueError: `backend` names none, or one that cannot serve the call.

    Examples:
        >>> x = torch.zeros(1, 128, 4, 16)
        >>> select_backend(x, x, layout=layouts.sliding_window(128, 32)).backend
        'torch'
    """
    _check_layout(layout)
    why_not = obstacles(
        query, key, backend, layout, dropout_p=dropout_p, has_padding=has_padding,
        return_lse=return_lse, needs_gradients=needs_gradients,
    )  # fmt: skip
    return choose(BackendChoice, "backend", backend, BACKENDS, REASONS, why_not, UNASKED)


def _check_layout(layout: object) -> None:
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout must be a BlockLayout. Got {type(layout).__name__}.")
