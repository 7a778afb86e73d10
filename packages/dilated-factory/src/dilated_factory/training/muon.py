"""Muon for many matrices at once: those of one shape are orthogonalised as one batch."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Muon

# Private, but a copy of it would have to follow each change of torch's.
from torch.optim._muon import _adjust_lr


class GroupedMuon(Muon):
    """torch's Muon, but for rounding, in a few calls a shape instead of some twenty a matrix.

    Its state is that of torch's, so either goes on from the other's.
    """

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch writes the same signature as two overloads
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Take a step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters, grads, momenta = list[Tensor](), list[Tensor](), list[Tensor]()
            self._init_group(group, parameters, grads, momenta)
            if not parameters:
                continue
            torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
            mixed = momenta
            if group["nesterov"]:
                mixed = list(torch._foreach_lerp(grads, momenta, group["momentum"]))
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            alike = defaultdict[torch.Size, list[int]](list)
            for index, parameter in enumerate(parameters):
                alike[parameter.shape].append(index)
            for shape, indices in alike.items():
                updates = orthogonalised(
                    torch.stack([mixed[i].bfloat16() for i in indices]),
                    group["ns_coefficients"],
                    group["ns_steps"],
                    group["eps"],
                )
                rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], shape)
                torch._foreach_add_(
                    [parameters[i] for i in indices],
                    [update.to(parameters[indices[0]].dtype) for update in updates],
                    alpha=-rate,
                )
        return loss


def orthogonalised(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """The nearest orthogonal matrices, roughly, of bfloat16 ones (K, rows, columns).

    A quintic Newton-Schulz iteration (Jordan 2024), on the shorter side.
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
