"""Cross-entropy of a head's logits, which exist for a few positions at a time only."""

# Shapes: T positions, E embed_dim, V vocab_size.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_core.extending import autocast, is_transformed

# Size of the logits that exist at once.
LOSS_BYTES = 2**28

# A target that is left out, as in torch's cross_entropy.
IGNORED = -100


def head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """The summed cross-entropy in nats of the logits hidden @ weight.T, in float32 or wider.

    Gradients are made beside the loss, so backward needs no logits either. It can be called once
    only: there are no second derivatives, and `create_graph=True` is an error. Under torch.func it
    is torch's cross-entropy, which has both, and the logits of all positions.

    Args:
        hidden: (T, E).
        weight: (V, E).
        targets: (T,) int64, below V; `IGNORED` leaves a position out.
        label_smoothing: the share of a target that all V have alike, as in torch's cross_entropy.
    """
    if is_transformed():
        (narrow,) = autocast(weight)
        logits = hidden.to(narrow.dtype) @ narrow.T
        return F.cross_entropy(
            logits.to(torch.promote_types(narrow.dtype, torch.float32)), targets,
            ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing,
        )  # fmt: skip
    wants = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total: Tensor = _HeadLoss.apply(hidden, weight, targets, label_smoothing, wants)  # type: ignore[no-untyped-call] # torch's
    return total


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float, wants: bool
    ) -> Tensor:
        (narrow,) = autocast(weight)
        wide = torch.promote_types(narrow.dtype, torch.float32)
        rows = max(1, LOSS_BYTES // (len(weight) * wide.itemsize))
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden, dtype=narrow.dtype) if wants else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants else None
        for start in range(0, len(hidden), rows):
            part = hidden[start : start + rows].to(narrow.dtype)
            aim = targets[start : start + rows].unsqueeze(-1)
            ignored = aim == IGNORED
            aim = aim.masked_fill(ignored, 0)
            logits = (part @ narrow.T).to(wide)
            aimed = logits.gather(-1, aim)
            if smoothing:
                aimed = aimed.lerp(logits.mean(-1, keepdim=True), smoothing)
            # One pass for both: torch's exp, which logsumexp calls, is slow on CPUs.
            largest, slopes = logits.amax(-1, keepdim=True), logits.softmax(-1)
            del logits
            lse = largest - slopes.amax(-1, keepdim=True).log_()
            total += (lse - aimed).masked_fill(ignored, 0).sum()
            if grad_hidden is not None and grad_weight is not None:
                # By the logits: the probabilities, less those that were aimed at.
                slopes.scatter_(-1, aim, slopes.gather(-1, aim) - (1 - smoothing))
                if smoothing:
                    slopes.sub_(smoothing / len(weight))
                slopes = slopes.masked_fill_(ignored, 0).to(narrow.dtype)
                grad_hidden[start : start + rows] = slopes @ narrow
                grad_weight += slopes.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        # torch's once_differentiable lets it pass where the loss is summed, and a term is missing.
        if torch.is_grad_enabled():
            raise RuntimeError("the loss must be differentiated once only. Got create_graph=True.")
        grad_hidden, grad_weight = (
            (saved * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return grad_hidden, grad_weight, None, None, None
