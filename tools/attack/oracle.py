"""What the definition says, by brute force in float64; it shares no code with the packages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def counts(case: dict[str, Any], length: int, key_length: int) -> tuple[Tensor, Tensor]:
    """How often each query sees each key (H, N, M), and how many zero keys (H, N).

    Args:
        case: branches as pairs, heads, offsets, groups, causal, zeros.
        length: of the queries, the last of the keys where it is causal.
        key_length: of the keys.
    """
    heads, branches, causal = case["heads"], case["branches"], case["causal"]
    place = torch.arange(length) + (key_length - length if causal else 0)
    keys = torch.arange(key_length)
    seen = torch.zeros(heads, length, key_length, dtype=torch.float64)
    zeros = torch.zeros(heads, length, dtype=torch.float64)
    for number, (w, r) in enumerate(branches):
        for head in range(heads):
            if case["groups"] == "split" and _group(head, heads, len(branches)) != number:
                continue
            blocked = case["offsets"] == "blocked"
            offset = head // ((heads + r - 1) // r) if blocked else head % r
            mine = (place % w % r == offset)[:, None] & (keys % w % r == offset)
            mine &= (place // w)[:, None] == keys // w
            seen[head] += mine & (not causal or keys <= place[:, None])
            if case["zeros"] and not causal:
                slots = (min(w, key_length) + r - 1) // r
                zeros[head] += (place % w % r == offset) * (slots - mine.sum(1))
    return seen, zeros


def _group(head: int, heads: int, groups: int) -> int:
    size, more = divmod(heads, groups)
    for group in range(groups):
        head -= size + (group < more)
        if head < 0:
            return group
    raise AssertionError


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    zeros: Tensor,
    *,
    scale: float | None = None,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (B, N, H, D) and log-sum-exp (B, H, N) of float64 tensors.

    Args:
        query: (B, N, H, D).
        key: (B, M, H_kv, D).
        value: (B, M, H_kv, D).
        seen: (H, N, M) of `counts`.
        zeros: (H, N) of `counts`.
        scale: of the scores; 1 / sqrt(D) when None.
        hidden: (B, M), true where a key is padding.
    """
    group = query.shape[2] // key.shape[2]
    key, value = (
        torch.stack([x[:, :, h // group] for h in range(query.shape[2])], 2) for x in (key, value)
    )
    factor = query.shape[3] ** -0.5 if scale is None else scale
    scores = factor * torch.einsum("bnhd,bmhd->bhnm", query, key)
    weight = seen[None].expand_as(scores)
    if hidden is not None:
        weight = weight * (~hidden)[:, None, None, :]
    there = weight > 0
    top = (
        torch.where(there, scores, -torch.inf).amax(-1).detach()
        if scores.shape[-1]
        else (torch.full(scores.shape[:-1], -torch.inf, dtype=torch.float64))
    )
    top = torch.where(zeros > 0, top.clamp(min=0.0), top)
    top = torch.where(top.isfinite(), top, 0.0)
    terms = weight * torch.where(there, scores - top[..., None], 0.0).exp()
    total = terms.sum(-1) + zeros * (-top).exp()
    out = torch.einsum(
        "bhnm,bmhd->bnhd", terms / torch.where(total > 0, total, 1.0)[..., None], value
    )
    lse = torch.where(total > 0, top + torch.where(total > 0, total, 1.0).log(), -torch.inf)
    return out, lse
