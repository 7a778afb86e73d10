"""Optimizers of a LongNetLM and their state as flat tensors."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from dilated_factory.configs.models import TrainConfig
from dilated_factory.errors import RunError
from dilated_factory.models.longnet import LongNetLM

# What the optimizers keep of each parameter once they have taken a step.
_MOMENTUM_STATE = ("momentum_buffer",)
_ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")


class Form(NamedTuple):
    """What a tensor is, without its numbers."""

    shape: torch.Size
    dtype: torch.dtype


def build_optimizers(
    model: LongNetLM, config: TrainConfig, *, sharded: bool = False
) -> list[Optimizer]:
    """Muon, or AdamW, for the matrices in the blocks; AdamW for embedding, head, norms and biases.

    Muon (Jordan 2024) orthogonalises the update of a matrix; its step is scaled to the root mean
    square of AdamW's (Liu et al., arXiv 2502.16982), so one learning rate serves both. Only
    matrices decay.

    Args:
        model: whose parameters they change.
        config: of the run.
        sharded: whether the parameters are DTensors.
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    inner: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    outer = inner | {"weight_decay": 0.0}
    adam: dict[str, Any] = {
        "betas": (0.9, 0.95),
        "fused": matrices[0].device.type in ("cpu", "cuda"),
    }
    rest = AdamW(others, **outer, **adam)
    if config.optimizer == "adamw":
        return [AdamW(matrices, **inner, **adam), rest]
    muon: type[Muon]
    if sharded:
        from dilated_factory.training.sharded import ShardedMuon

        muon = ShardedMuon
    else:
        from dilated_factory.training.muon import GroupedMuon

        muon = GroupedMuon
    return [muon(matrices, **inner, adjust_lr_fn="match_rms_adamw"), rest]


def set_learning_rate(optimizers: Sequence[Optimizer], learning_rate: float) -> None:
    """Set the learning rate of every parameter."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate


def optimizer_tensors(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """All state of the optimizers as ``parameter/key`` -> tensor."""
    tensors: dict[str, Tensor] = {}
    for name, parameter, optimizer in _owned(model, optimizers):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value)
    return tensors


def is_optimizer_name(name: str) -> bool:
    """Whether a tensor in a checkpoint is of an optimizer; no parameter has such a name."""
    return "/" in name


def load_optimizer_tensors(
    model: nn.Module, optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what :func:`optimizer_tensors` returned, exactly.

    Raises:
        RunError: as `make_room`, or a number is not finite, or a count of steps not positive.
    """
    forms = {name: Form(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all() or (name.endswith("/step") and not tensor.ge(1).all()):
            raise _unfit(name, "must be finite, and a count of steps at least 1")
    for name, place in make_room(model, optimizers, forms).items():
        place.copy_(tensors[name])


def make_room(
    model: nn.Module, optimizers: Sequence[Optimizer], forms: Mapping[str, Form]
) -> dict[str, Tensor]:
    """Give the optimizers state of these forms; return its tensors by name, to be filled.

    A tensor is sharded where its parameter is.

    Raises:
        RunError: they are not the forms of these optimizers' state, before or after some steps.
    """
    owners = {
        f"{name}/{key}": (parameter, optimizer, key)
        for name, parameter, optimizer in _owned(model, optimizers)
        for key in (_ADAMW_STATE if isinstance(optimizer, AdamW) else _MOMENTUM_STATE)
    }
    for name in owners.keys() ^ forms.keys() if forms else ():
        raise _unfit(name, "is missing" if name in owners else "is of no parameter")
    made: dict[str, Tensor] = {}
    for full_name, (shape, dtype) in forms.items():
        parameter, optimizer, key = owners[full_name]
        expected = Form(torch.Size(()) if key == "step" else parameter.shape, parameter.dtype)
        if (shape, dtype) != expected:
            wanted = f"{expected.dtype} of shape {tuple(expected.shape)}"
            raise _unfit(full_name, f"must be {wanted}. Got {dtype} of {tuple(shape)}")
        # AdamW counts steps in a tensor that stays on the CPU, unless it is fused.
        counter = parameter.device if optimizer.defaults.get("fused") else "cpu"
        place = (
            torch.empty_like(parameter, dtype=dtype, requires_grad=False)
            if shape
            else torch.empty(shape, dtype=dtype, device=counter)
        )
        made[full_name] = optimizer.state[parameter][key] = place
    return made


def _unfit(name: str, problem: str) -> RunError:
    return RunError(f"the checkpoint does not fit its configuration: {name} {problem}.")


def _owned(
    model: nn.Module, optimizers: Sequence[Optimizer]
) -> Iterator[tuple[str, nn.Parameter, Optimizer]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield names[id(parameter)], parameter, optimizer
