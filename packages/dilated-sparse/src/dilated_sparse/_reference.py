"""The oracle: block-sparse attention with dense scores, slow and readable, any dtype.

B batch, N queries, M keys, H query heads, H_kv key heads, D head_dim.
"""

import math

import torch
from torch import Tensor

from dilated_core.extending import Partial, Scores, accumulate_dtype, keep_mask
from dilated_sparse._call import BlockCall


def attend(call: BlockCall, query: Tensor, key: Tensor, value: Tensor) -> Partial:
    """Block-sparse attention by its definition; O(B * H * N * M) memory.

    Returns:
        out (B, N, H, D) in the accumulation dtype, lse (B, H, N).
    """
    heads, dtype = query.shape[2], accumulate_dtype(query.dtype)
    key, value = (x.to(dtype).repeat_interleave(heads // x.shape[2], dim=2) for x in (key, value))
    scores = torch.einsum("bnhd,bmhd->bhnm", query.to(dtype), key) * call.scores.scale
    hidden = ~call.layout.to_dense().to(query.device)
    positions = torch.arange(query.shape[1], device=query.device) + call.query_start
    if call.scores.is_causal:
        hidden = hidden | (torch.arange(key.shape[1], device=query.device) > positions[:, None])
    hidden = hidden.expand(scores.shape)
    if (padding := call.scores.key_padding_mask) is not None:
        hidden = hidden | padding[:, None, None, :]
    scores = scores.masked_fill(hidden, -math.inf)

    seen = ~hidden.all(-1)
    # Rows that see nothing must not reach the softmax: its gradient there is NaN. One more hidden
    # column keeps it defined when there are no keys at all.
    safe = torch.nn.functional.pad(scores, (0, 1), value=-math.inf)
    lse = torch.logsumexp(safe.masked_fill(~seen.unsqueeze(-1), 0.0), -1)
    lse = torch.where(seen, lse, -math.inf)
    weights = (scores - lse.masked_fill(~seen, 0.0).unsqueeze(-1)).exp()
    if call.scores.dropout_p > 0:
        weights = weights * _dropout_factor(call.scores, weights, positions)
    return Partial(torch.einsum("bhnm,bmhd->bnhd", weights, value), lse)


def _dropout_factor(scores: Scores, weights: Tensor, positions: Tensor) -> Tensor:
    """0 where a weight is dropped and 1 / (1 - p) where it is kept."""
    assert scores.seed is not None
    b, h, _, m = (
        torch.arange(size, device=weights.device).reshape(-1, *(1,) * (3 - axis))
        for axis, size in enumerate(weights.shape)
    )
    keep = keep_mask(int(scores.seed), scores.dropout_p, b, h, positions[:, None], m)
    return keep.to(weights.dtype) / (1.0 - scores.dropout_p)
