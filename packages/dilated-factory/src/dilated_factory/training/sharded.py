"""Weights in shards, one on each rank (FSDP2), and what must see them whole."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Muon

# Private, but a copy of it would have to follow each change of torch's.
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz


def shard_weights(model: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Leave each rank a part of every parameter; a layer has its parameters whole while it runs.

    Backward averages gradients over the ranks of the mesh, each into its part.

    Args:
        model: on any device; its parameters become DTensors on the device of the mesh.
        layers: modules inside it that run one after the other.
        mesh: of one dimension.
    """
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this one is a part; itself if it is none. A collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class ShardedMuon(Muon):
    """Muon (Jordan 2024) for matrices of which each rank has a part, as DTensors.

    Momentum is in parts too. Only the update is put together, one matrix at a time, since what it
    becomes depends on the whole of it: to the bit the step of torch's Muon on whole matrices.
    """

    @torch.no_grad()
    def step(  # type: ignore[override]  # torch writes the same signature as two overloads
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Take a step; a collective call."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters, grads, momenta = list[Tensor](), list[Tensor](), list[Tensor]()
            self._init_group(group, parameters, grads, momenta)
            for parameter, grad, momentum in zip(parameters, grads, momenta, strict=True):
                momentum.lerp_(grad, 1 - group["momentum"])
                mixed = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                update = _zeropower_via_newtonschulz(
                    whole(mixed), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                rate = _adjust_lr(group["lr"], group["adjust_lr_fn"], parameter.shape)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(_part(update, parameter), alpha=-rate)
        return loss


def _part(tensor: Tensor, like: Tensor) -> Tensor:
    """The part of a tensor, which all ranks have alike, that this rank has of another."""
    assert isinstance(like, DTensor)
    # Without a source rank nothing is sent.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
