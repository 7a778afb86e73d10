"""One loss of ranks that each have a part of the targets, or none."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dilated_core.extending import uncompiled
from dilated_ring._agreement import agree, problem_of, refuse_alike
from dilated_ring._faults import Call
from dilated_ring._topology import device_of, find_ring


@uncompiled
def shared_loss(
    loss: Tensor | None,
    rows: Tensor,
    *,
    weight: Tensor | float = 1,
    group: dist.ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """This rank's share of the mean loss over the targets of all ranks; call `backward` on each.

    The mean of the shares over the ranks is the loss that one process would have, and so is the
    mean of their gradients, which DistributedDataParallel and FSDP take. A rank without targets has
    a share of 0 whose backward goes through `rows`, for every rank must run the backward of its
    attention.

    Args:
        loss: () the sum over this rank's targets, or None where it has none: for a classifier or
            a preference loss of one rank, the loss there and None elsewhere.
        rows: what this rank's part of the model returned, of any shape.
        weight: how many targets, or what they weigh, in all of `loss`; nothing where that is None.
        group: as in `ring_attention`; alone, a rank has all targets.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
        RankMismatchError: an argument of some ranks only is so; the same on every rank.
        RingError: a rank failed, died or stalled.

    Examples:
        >>> hidden = torch.randn(1, 4, 8, requires_grad=True)
        >>> summed = hidden.square().sum()  # over 3 targets of this rank
        >>> loss = shared_loss(summed, hidden, weight=3)  # their mean
        >>> loss.backward()
    """
    ring = find_ring(group)
    problem = problem_of(_check, loss, rows, weight)
    if problem is not None:
        refuse_alike(ring, rows, "shared_loss", problem)
    mine = 0.0 if loss is None else float(weight)
    size, total = 1, mine
    if ring is not None:
        size = ring.world_size
        with Call(ring.group, device_of(ring.group, rows), "shared_loss") as call:
            agree(call, {})
            call.step = "sum of weights"
            weights = torch.tensor(mine, dtype=torch.float64, device=call.device)
            work = dist.all_reduce(weights, group=ring.group, async_op=True)
            assert work is not None
            call.wait(work)
            total = weights.item()
    apply: Callable[..., Tensor] = _Nothing.apply
    nothing = apply(rows)
    if loss is None or not mine:
        return nothing
    return loss * (size / total) + nothing


def _check(loss: object, rows: object, weight: object) -> None:
    """Raise unless the arguments of this rank are valid."""
    if loss is not None and not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a Tensor or None. Got {type(loss).__name__}.")
    if loss is not None and loss.ndim:
        raise ValueError(f"loss must have shape (). Got {tuple(loss.shape)}.")
    if not isinstance(rows, Tensor) or not rows.is_floating_point():
        got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"rows must be a Tensor of floating point. Got {got}.")
    if isinstance(weight, Tensor) and weight.numel() == 1:
        weight = weight.item()
    if not isinstance(weight, int | float):
        raise TypeError(f"weight must be a number or a Tensor of one. Got {weight!r}.")
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be finite and not negative. Got {weight}.")


class _Nothing(torch.autograd.Function):
    """0, with a gradient of 0 to rows that may hold anything."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        return torch.zeros_like(rows)
