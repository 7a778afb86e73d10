"""The public functions."""

from torch import Tensor

from dilated_core._attend import Backend, attend
from dilated_core._pattern import DilatedPattern


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
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dilated attention of LongNet (arXiv 2307.02486), exact for any length, with exact gradients.

    Per head, one softmax over the multiset union of the keys that all branches of the pattern show
    a query; a key shown by c branches counts c times.

    Shapes: batch B, query positions N, key positions M, heads H, key and value heads H_kv, width of
    a head D.

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
        TypeError: pattern is no DilatedPattern, or another argument has the wrong type or dtype.
        ValueError: lengths, heads, devices or sizes do not fit each other, is_causal with more
            queries than keys, dropout_p is not in [0, 1), scale is not finite, the pattern splits
            more groups than there are heads, or `backend` names none, or one that cannot serve the
            call.

    Examples:
        >>> q, k, v = torch.randn(3, 2, 100, 4, 16).requires_grad_()
        >>> out = dilated_attention(q, k, v, DilatedPattern([16, 64], [1, 4]), is_causal=True)
        >>> out.sum().backward()
        >>> out.shape
        torch.Size([2, 100, 4, 16])
    """
    _check_pattern(pattern)
    return attend(
        pattern, query, key, value, is_causal=is_causal, scale=scale,
        key_padding_mask=key_padding_mask, dropout_p=dropout_p, enable_gqa=enable_gqa,
        return_lse=return_lse, backend=backend,
    )  # fmt: skip


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
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`dilated_attention` of packed sequences of different lengths; segments start anew in each.

    Shapes: heads H, key and value heads H_kv, width of a head D, packed sequences S.

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
        TypeError, ValueError: as `dilated_attention`; also unless cu_seqlens rises from 0 to
            total, which is checked on the CPU alone.

    Examples:
        >>> pattern = DilatedPattern([16, 64], [1, 4])
        >>> q, k, v = torch.randn(3, 50, 4, 16)  # documents of 20 and 30 positions
        >>> ends = torch.tensor([0, 20, 50])
        >>> out = dilated_attention_varlen(q, k, v, ends, pattern)
        >>> first = dilated_attention(q[None, :20], k[None, :20], v[None, :20], pattern)[0]
        >>> torch.allclose(out[:20], first, atol=1e-5)
        True
    """
    _check_pattern(pattern)
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a Tensor. Got {type(cu_seqlens).__name__}.")
    return attend(
        pattern, query, key, value, is_causal=is_causal, scale=scale,
        key_padding_mask=key_padding_mask, dropout_p=dropout_p, enable_gqa=enable_gqa,
        return_lse=return_lse, backend=backend, cu_seqlens=cu_seqlens,
    )  # fmt: skip


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

    Examples:
        >>> q, k, v = torch.randn(3, 1, 20, 2, 8, dtype=torch.float64)
        >>> pattern = DilatedPattern([4, 16], [1, 3])
        >>> expected = reference_attention(q, k, v, pattern, is_causal=True)
        >>> torch.allclose(dilated_attention(q, k, v, pattern, is_causal=True), expected)
        True
    """
    return dilated_attention(
        query, key, value, pattern,
        is_causal=is_causal, scale=scale, key_padding_mask=key_padding_mask, dropout_p=dropout_p,
        enable_gqa=enable_gqa, return_lse=return_lse, backend="reference",
    )  # fmt: skip


def _check_pattern(pattern: object) -> None:
    if not isinstance(pattern, DilatedPattern):
        raise TypeError(f"pattern must be a DilatedPattern. Got {type(pattern).__name__}.")
