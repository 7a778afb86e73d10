"""What fused attention loses by rounding, for any scores: the yardstick of the GPU kernels.

torch's fused operators take no multiplicities, no dropout mask of ours and no gradient to the
log-sum-exp. This is their arithmetic with dense scores: products of inputs of the given dtype
summed in float32, softmax in float32, probabilities and score gradients rounded to the inputs'
dtype before the next product, results rounded to it. A GPU test holds it against the real ones.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from dilated_core._call import DilatedCall
from dilated_core._reference import _dropout_factor

NAMES = ("out", "lse", "dq", "dk", "dv")


def rounded_attention(
    call: DilatedCall,
    inputs: list[Tensor],
    upstream: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """Out (B, N, H, D), lse (B, H, N) and the gradients of a call, rounded as fused attention is.

    `inputs` are query (B, N, H, D), key and value (B, M, H_kv, D); `upstream` the gradients of out
    and lse.
    """
    cu_seqlens = call.cu_seqlens
    if cu_seqlens is None:
        return _batch(call, inputs, upstream, 0)
    parts = []
    for index, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        rows = slice(start, stop)
        local = call._replace(scores=call.scores.at_keys(rows))
        parts.append(
            _batch(
                local,
                [x[:, rows] for x in inputs],
                (upstream[0][:, rows], upstream[1][:, :, rows]),
                index,
            )
        )
    return {
        name: torch.cat([part[name] for part in parts], 2 if name == "lse" else 1) for name in NAMES
    }


def _batch(
    call: DilatedCall, inputs: list[Tensor], upstream: tuple[Tensor, Tensor], first: int
) -> dict[str, Tensor]:
    dtype, (_, length, heads, _), key_length = inputs[0].dtype, inputs[0].shape, inputs[1].shape[1]
    group = heads // inputs[1].shape[2]
    query = inputs[0].float()
    key, value = (x.float().repeat_interleave(group, dim=2) for x in inputs[1:])
    grad_out, grad_lse = upstream[0].to(dtype).float(), upstream[1].float()

    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * call.scores.scale
    count = call.pattern.multiplicity(
        length, heads, is_causal=call.scores.is_causal, key_length=key_length
    ).to(query.device)
    if call.scores.key_padding_mask is not None:
        count = count * ~call.scores.key_padding_mask[:, None, None, :]
    scores = (scores + count.float().log()).masked_fill(count == 0, -math.inf)
    zero = torch.zeros(heads, length)
    if not call.scores.is_causal:
        zero = call.pattern.zero_keys(length, heads, key_length=key_length).float()
    zero = zero.log().to(query.device).expand(len(query), -1, -1)
    padded = torch.cat([scores, zero[..., None]], 3)
    lse = padded.logsumexp(-1)
    shift = lse.masked_fill(lse == -math.inf, math.inf)[..., None]
    # The kernels round exp(score - maximum) and divide at the end.
    high = padded.amax(-1, keepdim=True).masked_fill(shift == math.inf, 0.0)
    factor = _dropout_factor(call.scores, scores, first) if call.scores.dropout_p > 0 else 1.0

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).float()

    weights = rounded((scores - high).exp() * factor)
    out = torch.einsum("bhnm,bmhd->bnhd", weights, value)
    out = rounded(out * (high - shift).exp().squeeze(-1).transpose(1, 2)[..., None])
    p = (scores - shift).exp()
    dp = torch.einsum("bnhd,bmhd->bhnm", grad_out, value) * factor
    delta = (grad_out * out).sum(-1).transpose(1, 2) - grad_lse
    ds = rounded(p * (dp - delta[..., None]))
    grads = (
        torch.einsum("bhnm,bmhd->bnhd", ds, key) * call.scores.scale,
        torch.einsum("bhnm,bnhd->bmhd", ds, query) * call.scores.scale,
        torch.einsum("bhnm,bnhd->bmhd", rounded(p * factor), grad_out),
    )
    dq, dk, dv = (
        rounded(x if x is grads[0] else x.unflatten(2, (-1, group)).sum(3)) for x in grads
    )
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
