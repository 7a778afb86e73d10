"""Partials and their merge: the only place in the project where softmaxes are combined.

Attention over a part of the keys is `Partial(out, lse)`; `merge` combines parts into attention
over all of them. Shapes: out (B, N, H, D), lse (B, H, N).
"""

import math
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention over a part of the keys.

    Shapes: batch B, positions N, heads H, width of a head D.

    Attributes:
        out: (B, N, H, D), softmax-weighted values over the part; 0 where no key is visible.
        lse: (B, H, N), natural log of the sum of exp(score); -inf where no key is visible.

    Examples:
        >>> q, k, v = torch.randn(3, 1, 6, 2, 8)
        >>> dense = DilatedPattern([6], [1])
        >>> Partial(*dilated_attention(q, k, v, dense, return_lse=True)).lse.shape  # (B, H, N)
        torch.Size([1, 2, 6])
    """

    out: Tensor
    lse: Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partials of that dtype are combined: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def merge(*partials: Partial) -> Partial:
    """Combine partials over disjoint parts of the keys into one softmax over all of them.

    Associative and commutative; safe where an lse is -inf, both -inf included; differentiable.
    LongNet, arXiv 2307.02486, mixes its branches with exactly these weights.

    Returns:
        A Partial in float32, or float64 where an input is.

    Raises:
        ValueError: no partials, or their shapes do not fit.

    Examples:
        >>> out, lse = torch.randn(2, 1, 5, 2, 8), torch.randn(2, 1, 2, 5)
        >>> whole = merge(Partial(out[0], lse[0]), Partial(out[1], lse[1]))
        >>> torch.allclose(whole.lse, torch.logaddexp(lse[0], lse[1]))
        True
    """
    if not partials:
        raise ValueError("partials must hold at least one Partial. Got none.")
    for i, (out, lse) in enumerate(partials):
        if out.ndim != 4 or lse.shape != (out.shape[0], out.shape[2], out.shape[1]):
            raise ValueError(
                f"partials[{i}] must have out (B, N, H, D) and lse (B, H, N). "
                f"Got {tuple(out.shape)} and {tuple(lse.shape)}."
            )
        if out.shape != partials[0].out.shape:
            raise ValueError(
                f"partials[{i}].out must have shape {tuple(partials[0].out.shape)} like the first. "
                f"Got {tuple(out.shape)}."
            )
    dtype = reduce(torch.promote_types, (t.dtype for p in partials for t in p), torch.float32)
    lses = torch.stack([p.lse.to(dtype) for p in partials])
    # The maximum is only a shift for stability; -inf shifts nothing.
    shift = lses.detach().amax(0)
    shift = shift.masked_fill(shift == -math.inf, 0.0)
    weights = (lses - shift).exp()
    total = weights.sum(0)
    visible = total > 0
    safe_total = torch.where(visible, total, 1.0)
    lse = torch.where(visible, safe_total.log() + shift, -math.inf)
    shares = (weights / safe_total).transpose(-1, -2).unsqueeze(-1)
    out = sum(
        (share * p.out.to(dtype) for share, p in zip(shares, partials, strict=True)),
        start=torch.zeros((), dtype=dtype, device=lse.device),
    )
    return Partial(out, lse)


def merge_(total: Partial, part: Partial) -> None:
    """Merge `part` into `total` in place, without a temporary as large as `out`.

    Args:
        total: out (..., N, D) and lse (..., N) in float32 or wider; views are welcome. A narrower
            out is rounded at each merge.
        part: the same shapes, out in any floating dtype.
    """
    lse = torch.logaddexp(total.lse, part.lse)
    share = (part.lse - lse).exp_()
    # Where both are -inf the difference is NaN; the part then has nothing to add.
    share.masked_fill_(lse == -math.inf, 0.0)
    wide = accumulate_dtype(total.out.dtype)
    if total.out.dtype == wide:
        total.out.lerp_(part.out.to(wide), share.unsqueeze(-1))
    else:
        merged = torch.lerp(total.out.to(wide), part.out.to(wide), share.unsqueeze(-1))
        total.out.copy_(merged)
    total.lse.copy_(lse)


def put_(total: Partial, part: Partial) -> None:
    """Write `part` into `total` in place: what `merge_` does where nothing was merged before."""
    total.out.copy_(part.out)
    total.lse.copy_(part.lse)


def add_zero_keys_(total: Partial, count: int) -> None:
    """Merge `count` keys of score 0 and value 0 into `total` in place (shapes as in `merge_`)."""
    lse = torch.logaddexp(total.lse, total.lse.new_tensor(math.log(count)))
    total.out.mul_((total.lse - lse).exp_().unsqueeze(-1))
    total.lse.copy_(lse)
