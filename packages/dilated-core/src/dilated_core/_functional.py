"""The public functions: validate once, pick a backend, compute."""

import torch
from torch import Tensor

from dilated_core import _inputs, _reference, _torch_backend, triton_kernels
from dilated_core._inputs import Options
from dilated_core._operators import Forward
from dilated_core._pattern import DilatedPattern
from dilated_core._selection import Backend, select_backend

_BACKENDS: dict[Backend, Forward] = {
    "reference": _reference.attend,
    "torch": _torch_backend.OPERATORS.attend,
    "triton": triton_kernels.attend,
}


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: DilatedPattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dilated attention of LongNet (arXiv 2307.02486), exact for any length, with exact gradients.

    Per head, one softmax over the multiset union of the keys that all branches of the pattern show
    a query; a key shown by c branches counts c times.

    Args:
        query: (B, N, H, D), float16, bfloat16, float32 or float64.
        key: (B, M, H_kv, D). When causal, the queries are the last N of the M positions;
            otherwise both count from position 0.
        value: (B, M, H_kv, D).
        pattern: which keys a query sees.
        is_causal: hide the keys after each query.
        scale: factor on the scores; 1 / sqrt(D) when None.
        key_padding_mask: (B, M) bool, True = ignore, as in torch.nn.MultiheadAttention.
        dropout_p: probability of dropping an attention weight, in [0, 1), on every call.
        enable_gqa: allow H to be a multiple of H_kv; query head h reads key head
            h // (H / H_kv). Head offsets go by the query head.
        return_lse: also return the log-sum-exp.
        backend: "triton", "torch" or "reference" to force one; None picks.

    Returns:
        out (B, N, H, D) in query's dtype; with return_lse also lse (B, H, N), natural log,
        float32 or wider. A query that sees no key has out 0, lse -inf and zero gradients.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
    """
    _inputs.check_tensors(query, key, value, enable_gqa=enable_gqa, dims=4)
    _inputs.check_padding_mask(key_padding_mask, key.shape[0], key.shape[1], query.device)
    if is_causal and query.shape[1] > key.shape[1]:
        raise ValueError(
            f"query length must not exceed key length when is_causal=True. "
            f"Got {query.shape[1]} and {key.shape[1]}."
        )
    options = _options(
        query, pattern, is_causal, scale, key_padding_mask, dropout_p, enable_gqa, return_lse
    )
    query, key, value = _autocast(query, key, value)
    out, lse = _BACKENDS[select_backend(query, key, backend).backend](
        options, query, key, value, None
    )
    out = out.to(query.dtype)
    return (out, lse) if return_lse else out


def dilated_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    pattern: DilatedPattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`dilated_attention` of packed sequences of different lengths; segments start anew in each.

    Args:
        query: (total, H, D): the sequences one after the other.
        key: (total, H_kv, D).
        value: (total, H_kv, D).
        cu_seqlens: (S + 1,) int32 or int64: 0, then the end row of each sequence; ends at total.
        pattern: which keys a query sees.
        is_causal: hide the keys after each query.
        scale: factor on the scores; 1 / sqrt(D) when None.
        key_padding_mask: (total,) bool, True = ignore.
        dropout_p: probability of dropping an attention weight, in [0, 1), on every call.
        enable_gqa: allow H to be a multiple of H_kv.
        return_lse: also return the log-sum-exp.
        backend: as in `dilated_attention`.

    Returns:
        out (total, H, D); with return_lse also lse (H, total).

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
    """
    _inputs.check_tensors(query, key, value, enable_gqa=enable_gqa, dims=3)
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"key must have query's total {query.shape[0]}. Got {key.shape[0]}.")
    _inputs.check_cu_seqlens(cu_seqlens, query.shape[0], query.device)
    if key_padding_mask is not None and isinstance(key_padding_mask, Tensor):
        key_padding_mask = key_padding_mask.unsqueeze(0)
    _inputs.check_padding_mask(key_padding_mask, 1, query.shape[0], query.device)
    options = _options(
        query, pattern, is_causal, scale, key_padding_mask, dropout_p, enable_gqa, return_lse
    )
    query, key, value = (x.unsqueeze(0) for x in _autocast(query, key, value))
    out, lse = _BACKENDS[select_backend(query, key, backend).backend](
        options, query, key, value, cu_seqlens
    )
    out = out[0].to(query.dtype)
    return (out, lse[0]) if return_lse else out


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: DilatedPattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The oracle: `dilated_attention` by its definition, with dense scores.

    Slow and readable, O(B * H * N * M) memory; arguments and results as in `dilated_attention`.
    """
    return dilated_attention(
        query, key, value, pattern,
        is_causal=is_causal, scale=scale, key_padding_mask=key_padding_mask, dropout_p=dropout_p,
        enable_gqa=enable_gqa, return_lse=return_lse, backend="reference",
    )  # fmt: skip


def _options(
    query: Tensor,
    pattern: DilatedPattern,
    is_causal: bool,
    scale: float | None,
    key_padding_mask: Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
    return_lse: bool,
) -> Options:
    scale = _inputs.check_options(
        query, pattern, is_causal=is_causal, scale=scale, dropout_p=dropout_p,
        enable_gqa=enable_gqa, return_lse=return_lse,
    )  # fmt: skip
    # On query's device and from its default generator: no host sync, and checkpointing, which
    # restores that generator, draws the same mask again.
    seed = torch.randint(2**62, (), device=query.device) if dropout_p > 0 else None
    return Options(pattern, is_causal, scale, key_padding_mask, float(dropout_p), seed)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype where autocast is on, as torch's own attention does."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)
