"""The public function: validate once, pick a backend, compute."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dilated_core.extending import autocast, check_padding_mask, check_tensors
from dilated_sparse import _checks, _flex_backend, _operators, _reference
from dilated_sparse._layout import BlockLayout
from dilated_sparse._options import Options
from dilated_sparse._selection import Backend, select_backend

# Flex has no lse where `select_backend` refuses return_lse.
_BACKENDS: dict[
    Backend, Callable[[Options, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
] = {
    "reference": _reference.attend,
    "torch": _operators.TORCH.attend,
    "flex": _flex_backend.attend,
    "triton": _operators.TRITON.attend,
}


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over the token pairs of a layout, with exact gradients and O(N) memory.

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
        TypeError, ValueError: naming the argument, what it must be, and what it was.
    """
    check_tensors(query, key, value, enable_gqa=_checks.boolean("enable_gqa", enable_gqa), dims=4)
    check_padding_mask(key_padding_mask, key.shape[0], key.shape[1], query.device)
    _check_layout(layout, query, key, _checks.boolean("is_causal", is_causal))
    _checks.boolean("return_lse", return_lse)
    dropout_p = _checks.number("dropout_p", dropout_p, low=0.0, high=1.0, closed=False)
    scale = _scale(scale, query.shape[-1])
    query, key, value = autocast(query, key, value)
    # On query's device and from its default generator: no host sync, and checkpointing, which
    # restores that generator, draws the same mask again.
    seed = torch.randint(2**62, (), device=query.device) if dropout_p > 0 else None
    options = Options(layout, is_causal, scale, key_padding_mask, dropout_p, seed)
    choice = select_backend(
        query, key, backend,
        layout=layout, dropout_p=dropout_p, has_padding=key_padding_mask is not None,
        return_lse=return_lse,
        needs_gradients=torch.is_grad_enabled()
        and any(x.requires_grad for x in (query, key, value)),
    )  # fmt: skip
    out, lse = _BACKENDS[choice.backend](options, query, key, value)
    out = out.to(query.dtype)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _check_layout(layout: BlockLayout, query: Tensor, key: Tensor, is_causal: bool) -> None:
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout must be a BlockLayout. Got {type(layout).__name__}.")
    if (layout.length, layout.key_length) != (query.shape[1], key.shape[1]):
        raise ValueError(
            f"layout must have the query and key lengths {(query.shape[1], key.shape[1])}. "
            f"Got {(layout.length, layout.key_length)}."
        )
    if layout.heads not in (1, query.shape[2]):
        raise ValueError(
            f"layout must have 1 head or query's {query.shape[2]}. Got {layout.heads}."
        )
    if is_causal and query.shape[1] > key.shape[1]:
        raise ValueError(
            f"query length must not exceed key length when is_causal=True. "
            f"Got {query.shape[1]} and {key.shape[1]}."
        )


def _scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, float | int):
        raise TypeError(f"scale must be a float or None. Got {scale!r}.")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite. Got {scale}.")
    return float(scale)
