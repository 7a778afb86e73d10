"""The oracle: dilated attention with dense scores, slow and readable, any dtype.

B batch, N queries, M keys, H query heads, H_kv key heads, D head_dim.
"""

import math
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from dilated_core._dropout import keep_mask
from dilated_core._inputs import Options
from dilated_core._partial import Partial, accumulate_dtype


def weights_and_lse(options: Options, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The effective attention weights (B, H, N, M), before dropout, and lse (B, H, N).

    A key that c branches show has c times the weight of its score; rows sum to 1, to less where
    zero keys take a share, and to 0 where nothing is visible.
    """
    pattern, (_, length, heads, _), key_length = options.pattern, query.shape, key.shape[1]
    dtype = accumulate_dtype(query.dtype)
    key = key.to(dtype).repeat_interleave(heads // key.shape[2], dim=2)
    scores = torch.einsum("bnhd,bmhd->bhnm", query.to(dtype), key) * options.scale

    count = pattern.multiplicity(
        length, heads, is_causal=options.is_causal, key_length=key_length
    ).to(query.device)
    count = count.expand(query.shape[0], -1, -1, -1)
    if options.key_padding_mask is not None:
        count = count.masked_fill(options.key_padding_mask[:, None, None, :], 0)
    zero_keys = torch.zeros(heads, length, dtype=torch.int64)
    if not options.is_causal:
        zero_keys = pattern.zero_keys(length, heads, key_length=key_length)
    zero_keys = zero_keys.to(query.device)

    scores = scores.masked_fill(count == 0, -math.inf)
    # Zero keys have score 0, so they take part in the shift; appending one column also keeps the
    # maximum defined when there are no keys at all.
    floor = torch.where(zero_keys > 0, 0.0, -math.inf).to(dtype).expand(query.shape[0], -1, -1)
    shift = torch.cat([scores.detach(), floor.unsqueeze(-1)], dim=-1).amax(-1)
    shift = shift.masked_fill(shift == -math.inf, 0.0)
    weights = count * (scores - shift.unsqueeze(-1)).exp()
    # Without zero keys the shift may be so low that exp(-shift) overflows: 0 * inf is not 0.
    total = weights.sum(-1) + torch.where(zero_keys > 0, zero_keys * (-shift).exp(), 0.0)
    visible = total > 0
    safe_total = torch.where(visible, total, 1.0)
    lse = torch.where(visible, safe_total.log() + shift, -math.inf)
    return weights / safe_total.unsqueeze(-1), lse


def attend(
    options: Options, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None = None
) -> Partial:
    """Dilated attention by its definition; O(B * H * N * M) memory.

    With `cu_seqlens` (S + 1,) the batch is 1 and the rows are S sequences, one after the other.

    Returns:
        out (B, N, H, D) in the accumulation dtype, lse (B, H, N).
    """
    if cu_seqlens is None or len(cu_seqlens) == 1:
        return _attend_batch(options, query, key, value, batch_start=0)
    parts = []
    for i, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        mask = options.key_padding_mask
        local = replace(options, key_padding_mask=None if mask is None else mask[:, start:stop])
        rows = (x[:, start:stop] for x in (query, key, value))
        parts.append(_attend_batch(local, *rows, batch_start=i))
    return Partial(torch.cat([p.out for p in parts], 1), torch.cat([p.lse for p in parts], 2))


def _attend_batch(
    options: Options, query: Tensor, key: Tensor, value: Tensor, *, batch_start: int
) -> Partial:
    """Attention of a batch of equal sequences, the first with index `batch_start`."""
    weights, lse = weights_and_lse(options, query, key)
    if options.dropout_p > 0:
        weights = weights * _dropout_factor(options, weights, batch_start)
    value = value.to(weights.dtype).repeat_interleave(query.shape[2] // value.shape[2], dim=2)
    return Partial(torch.einsum("bhnm,bmhd->bnhd", weights, value), lse)


def _dropout_factor(options: Options, weights: Tensor, batch_start: int) -> Tensor:
    """0 where a weight is dropped and 1 / (1 - p) where it is kept."""
    assert options.seed is not None
    batch, heads, length, key_length = weights.shape
    start = key_length - length if options.is_causal else 0
    b, h, n, m = (
        torch.arange(size, device=weights.device).reshape(-1, *(1,) * (3 - axis))
        for axis, size in enumerate((batch, heads, length, key_length))
    )
    keep = keep_mask(int(options.seed), options.dropout_p, b + batch_start, h, n + start, m)
    return keep.to(weights.dtype) / (1.0 - options.dropout_p)
