"""The oracle: dilated attention with dense scores, slow and readable, any dtype.

B batch, N queries, M keys, H query heads, H_kv key heads, D head_dim.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from dilated_core._branches import Branches
from dilated_core._call import DilatedCall, Scores
from dilated_core._dropout import keep_mask
from dilated_core._partial import Partial, accumulate_dtype


def multiplicity(
    pattern: Branches, length: int, heads: int, is_causal: bool, key_length: int | None = None
) -> Tensor:
    """`DilatedPattern.multiplicity`: the definition."""
    key_length = length if key_length is None else key_length
    query_positions = torch.arange(length) + (key_length - length if is_causal else 0)
    key_positions = torch.arange(key_length)
    ordered = key_positions <= query_positions[:, None]
    result = torch.zeros(heads, length, key_length, dtype=torch.int64)
    for (w, r), branch_heads in zip(pattern.branches, pattern.branch_heads(heads), strict=True):
        same_segment = query_positions[:, None] // w == key_positions // w
        for head in branch_heads:
            offset = pattern.head_offset(head, heads, r)
            query_kept = query_positions % w % r == offset
            key_kept = key_positions % w % r == offset
            shown = same_segment & query_kept[:, None] & key_kept
            result[head] += shown & ordered if is_causal else shown
    return result


def zero_keys(pattern: Branches, length: int, heads: int, key_length: int | None = None) -> Tensor:
    """`DilatedPattern.zero_keys`."""
    key_length = length if key_length is None else key_length
    positions = torch.arange(length)
    result = torch.zeros(heads, length, dtype=torch.int64)
    if not pattern.count_padding:
        return result
    for (w, r), branch_heads in zip(pattern.branches, pattern.branch_heads(heads), strict=True):
        slots = -(-min(w, key_length) // r)
        segment_start = positions // w * w
        rows = (key_length - segment_start).clamp(0, w)
        for head in branch_heads:
            offset = pattern.head_offset(head, heads, r)
            real = (rows - offset + r - 1).clamp(min=0) // r
            result[head] += torch.where(positions % w % r == offset, slots - real, 0)
    return result


def weights_and_lse(call: DilatedCall, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The effective attention weights (B, H, N, M), before dropout, and lse (B, H, N).

    A key that c branches show has c times the weight of its score; rows sum to 1, to less where
    zero keys take a share, and to 0 where nothing is visible.
    """
    pattern, asked, _ = call
    (_, length, heads, _), key_length = query.shape, key.shape[1]
    dtype = accumulate_dtype(query.dtype)
    key = key.to(dtype).repeat_interleave(heads // key.shape[2], dim=2)
    scores = torch.einsum("bnhd,bmhd->bhnm", query.to(dtype), key) * asked.scale

    count = multiplicity(pattern, length, heads, asked.is_causal, key_length).to(query.device)
    count = count.expand(query.shape[0], -1, -1, -1)
    if asked.key_padding_mask is not None:
        count = count.masked_fill(asked.key_padding_mask[:, None, None, :], 0)
    padding = torch.zeros(heads, length, dtype=torch.int64)
    if not asked.is_causal:
        padding = zero_keys(pattern, length, heads, key_length)
    padding = padding.to(query.device)

    scores = scores.masked_fill(count == 0, -math.inf)
    # Zero keys have score 0, so they take part in the shift; appending one column also keeps the
    # maximum defined when there are no keys at all.
    floor = torch.where(padding > 0, 0.0, -math.inf).to(dtype).expand(query.shape[0], -1, -1)
    shift = torch.cat([scores.detach(), floor.unsqueeze(-1)], dim=-1).amax(-1)
    shift = shift.masked_fill(shift == -math.inf, 0.0)
    weights = count * (scores - shift.unsqueeze(-1)).exp()
    # Without zero keys the shift may be so low that exp(-shift) overflows: 0 * inf is not 0.
    total = weights.sum(-1) + torch.where(padding > 0, padding * (-shift).exp(), 0.0)
    visible = total > 0
    safe_total = torch.where(visible, total, 1.0)
    lse = torch.where(visible, safe_total.log() + shift, -math.inf)
    return weights / safe_total.unsqueeze(-1), lse


def attend(call: DilatedCall, query: Tensor, key: Tensor, value: Tensor) -> Partial:
    """Dilated attention by its definition; O(B * H * N * M) memory.

    Returns:
        out (B, N, H, D) in the accumulation dtype, lse (B, H, N).
    """
    pattern, scores, cu_seqlens = call
    if cu_seqlens is None or len(cu_seqlens) == 1:
        return _attend_batch(call, query, key, value, batch_start=0)
    parts = []
    for i, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        local = DilatedCall(pattern, scores.at_keys(slice(start, stop)))
        rows = (x[:, start:stop] for x in (query, key, value))
        parts.append(_attend_batch(local, *rows, batch_start=i))
    return Partial(torch.cat([p.out for p in parts], 1), torch.cat([p.lse for p in parts], 2))


def _attend_batch(
    call: DilatedCall, query: Tensor, key: Tensor, value: Tensor, *, batch_start: int
) -> Partial:
    """Attention of a batch of equal sequences, the first with index `batch_start`."""
    weights, lse = weights_and_lse(call, query, key)
    if call.scores.dropout_p > 0:
        weights = weights * _dropout_factor(call.scores, weights, batch_start)
    value = value.to(weights.dtype).repeat_interleave(query.shape[2] // value.shape[2], dim=2)
    return Partial(torch.einsum("bhnm,bmhd->bnhd", weights, value), lse)


def _dropout_factor(scores: Scores, weights: Tensor, batch_start: int) -> Tensor:
    """0 where a weight is dropped and 1 / (1 - p) where it is kept."""
    assert scores.seed is not None
    batch, heads, length, key_length = weights.shape
    start = key_length - length if scores.is_causal else 0
    b, h, n, m = (
        torch.arange(size, device=weights.device).reshape(-1, *(1,) * (3 - axis))
        for axis, size in enumerate((batch, heads, length, key_length))
    )
    keep = keep_mask(int(scores.seed), scores.dropout_p, b + batch_start, h, n + start, m)
    return keep.to(weights.dtype) / (1.0 - scores.dropout_p)
