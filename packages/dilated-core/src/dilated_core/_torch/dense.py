"""Dense attention of rows to rows, forward and backward: fused by torch where it can be.

Shapes here: query (b, h, n, D), key and value (b, h, m, D), lse (b, h, n). The backward takes the
*merged* out and lse, which makes it exact for one part of a larger softmax.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core._partial import Partial, accumulate_dtype
from dilated_core._torch_internals import flash, flash_backward

_CHUNK_SCORES = 1 << 22


class RowAttention(NamedTuple):
    """How the rows of one call attend.

    Attributes:
        scale: factor on the scores.
        is_causal: key i is hidden from the query rows before row i.
        key_mask: (b, m), True = ignore, or None.
        keep: maps a range of query rows to a bool mask (b, h, rows, m) of the attention weights
            that dropout keeps, or None.
        dropout_p: the probability that `keep` is False.
    """

    scale: float
    is_causal: bool
    key_mask: Tensor | None = None
    keep: Callable[[range], Tensor] | None = None
    dropout_p: float = 0.0


def attend(rows: RowAttention, query: Tensor, key: Tensor, value: Tensor) -> Partial:
    """Attention over these keys: out (b, h, n, D), lse (b, h, n); 0 and -inf where none is seen."""
    if query.is_cpu and rows.keep is None:
        mask = _additive(rows.key_mask, query.dtype)
        factor, scale = _positive(rows, query.dtype)
        query = query if factor == 1 else query * factor
        out, lse = flash(query, key, value, 0.0, rows.is_causal, attn_mask=mask, scale=scale)
        if rows.key_mask is not None:
            # The operator reports lse 0 for a row that sees nothing.
            lse = lse.masked_fill(_sees_nothing(rows, query.shape[2]), -math.inf)
        return Partial(out, lse)
    return _attend_in_chunks(rows, query, key, value)


def attend_backward(
    rows: RowAttention,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    total: Partial,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key, value from these keys, given the merged partial of all keys.

    Its lse is one of `hide_unseen`.
    """
    if query.is_cpu and rows.keep is None and grad_lse is None:
        mask = _additive(rows.key_mask, query.dtype)
        factor, scale = _positive(rows, query.dtype)
        query = query if factor == 1 else query * factor
        grad_query, grad_key, grad_value = flash_backward(
            grad_out, query, key, value, total.out, total.lse, 0.0, rows.is_causal,
            attn_mask=mask, scale=scale,
        )  # fmt: skip
        return grad_query if factor == 1 else grad_query * factor, grad_key, grad_value
    return _backward_in_chunks(rows, grad_out, grad_lse, query, key, value, total)


def hide_unseen(lse: Tensor) -> Tensor:
    """A lse for a backward: a row that sees nothing gives and gets no gradient.

    There exp(score - lse) is to be 0, so the lse is inf in place of -inf.
    """
    return lse.masked_fill(lse == -math.inf, math.inf)


def _positive(rows: RowAttention, dtype: torch.dtype) -> tuple[float, float]:
    """The scale as a factor on the query and a scale for torch's operator.

    The operator (torch 2.11 to 2.13) hides later keys before it scales: -inf times 0, or a scale
    that is 0 in float32, is NaN, and times a negative one it is +inf.
    """
    least = torch.finfo(accumulate_dtype(dtype)).tiny
    if not rows.is_causal or rows.scale >= least:
        return 1.0, rows.scale
    return (-1.0, -rows.scale) if rows.scale <= -least else (rows.scale, 1.0)


def _additive(key_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if key_mask is None:
        return None
    zeros = torch.zeros(key_mask.shape, dtype=dtype, device=key_mask.device)
    return zeros.masked_fill_(key_mask, -math.inf)[:, None, None, :]


def _sees_nothing(rows: RowAttention, length: int) -> Tensor:
    """(b, 1, n) or (b, 1, 1): query rows all of whose keys are masked."""
    assert rows.key_mask is not None
    if not rows.is_causal:
        return rows.key_mask.all(-1)[:, None, None]
    masked_so_far = rows.key_mask.cumprod(-1).bool()
    last = torch.arange(length, device=masked_so_far.device).clamp(max=masked_so_far.shape[1] - 1)
    return masked_so_far[:, None, last]


def _chunks(rows: RowAttention, query: Tensor, key: Tensor) -> Iterator[tuple[range, int]]:
    """Ranges of query rows, and how many keys they can see, with bounded score blocks."""
    (b, h, n, _), m = query.shape, key.shape[2]
    size = max(1, _CHUNK_SCORES // max(1, b * h * m))
    for start in range(0, n, size):
        chunk = range(start, min(n, start + size))
        yield chunk, min(chunk.stop, m) if rows.is_causal else m


def _scores(rows: RowAttention, query: Tensor, key: Tensor, chunk: range) -> Tensor:
    scores = query @ key.transpose(-1, -2) * rows.scale
    if rows.key_mask is not None:
        scores.masked_fill_(rows.key_mask[:, None, None, : key.shape[2]], -math.inf)
    if rows.is_causal:
        i = torch.arange(chunk.start, chunk.stop, device=query.device)
        later = torch.arange(key.shape[2], device=query.device) > i[:, None]
        scores.masked_fill_(later, -math.inf)
    return scores


def _keep_factor(rows: RowAttention, chunk: range, seen: int, dtype: torch.dtype) -> Tensor | None:
    if rows.keep is None:
        return None
    return rows.keep(chunk)[..., :seen].to(dtype) / (1.0 - rows.dropout_p)


def _attend_in_chunks(rows: RowAttention, query: Tensor, key: Tensor, value: Tensor) -> Partial:
    dtype = accumulate_dtype(query.dtype)
    out = torch.empty(query.shape, dtype=dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=dtype, device=query.device)
    key, value = key.to(dtype), value.to(dtype)
    for chunk, seen in _chunks(rows, query, key):
        here = slice(chunk.start, chunk.stop)
        scores = _scores(rows, query[:, :, here].to(dtype), key[:, :, :seen], chunk)
        lse[:, :, here] = torch.logsumexp(scores, -1)
        shift = lse[:, :, here].masked_fill(lse[:, :, here] == -math.inf, math.inf)
        weights = scores.sub_(shift.unsqueeze(-1)).exp_()
        if (factor := _keep_factor(rows, chunk, seen, dtype)) is not None:
            weights *= factor
        torch.matmul(weights, value[:, :, :seen], out=out[:, :, here])
    return Partial(out, lse)


def _backward_in_chunks(
    rows: RowAttention,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    total: Partial,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, (out, lse) = accumulate_dtype(query.dtype), total
    key, value = key.to(dtype), value.to(dtype)
    grad_query = torch.empty(query.shape, dtype=dtype, device=query.device)
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    for chunk, seen in _chunks(rows, query, key):
        here = slice(chunk.start, chunk.stop)
        q, grad = query[:, :, here].to(dtype), grad_out[:, :, here].to(dtype)
        delta = (grad * out[:, :, here].to(dtype)).sum(-1)
        if grad_lse is not None:
            delta = delta - grad_lse[:, :, here]
        scores = _scores(rows, q, key[:, :, :seen], chunk)
        weights = scores.sub_(lse[:, :, here].unsqueeze(-1)).exp_()
        grad_weights = grad @ value[:, :, :seen].transpose(-1, -2)
        kept = weights
        if (factor := _keep_factor(rows, chunk, seen, dtype)) is not None:
            kept = weights * factor
            grad_weights *= factor
        grad_value[:, :, :seen] += kept.transpose(-1, -2) @ grad
        grad_scores = weights * grad_weights.sub_(delta.unsqueeze(-1)) * rows.scale
        torch.matmul(grad_scores, key[:, :, :seen], out=grad_query[:, :, here])
        grad_key[:, :, :seen] += grad_scores.transpose(-1, -2) @ q
    return grad_query, grad_key, grad_value
