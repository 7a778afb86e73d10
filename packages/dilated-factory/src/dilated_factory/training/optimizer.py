"""Optimizers of a LongNetLM and their state as flat tensors."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from dilated_factory.config import TrainConfig
from dilated_factory.longnet import LongNetLM


def build_optimizers(model: LongNetLM, config: TrainConfig) -> list[Optimizer]:
    """Muon for the matrices inside the blocks; AdamW for embedding, head, norms and biases.

    Muon (Jordan 2024) orthogonalises the update of a matrix; its step is scaled to the root mean
    square of AdamW's (Liu et al., arXiv 2502.16982), so one learning rate serves both. Only
    matrices decay.
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        Muon(
            matrices,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        AdamW(others, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


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


def load_optimizer_tensors(
    model: nn.Module, optimizers: Sequence[Optimizer], tensors: dict[str, Tensor]
) -> None:
    """Put back what :func:`optimizer_tensors` returned, exactly.

    Raises:
        KeyError: the tensors name a parameter that the model lacks.
        ValueError: a tensor has neither its parameter's shape nor none.
    """
    owners = {
        name: (parameter, optimizer) for name, parameter, optimizer in _owned(model, optimizers)
    }
    for full_name, tensor in tensors.items():
        name, key = full_name.rsplit("/", 1)
        parameter, optimizer = owners[name]
        if tensor.ndim and tensor.shape != parameter.shape:
            raise ValueError(
                f"{full_name} must have shape {tuple(parameter.shape)}. Got {tuple(tensor.shape)}."
            )
        # AdamW counts steps in a tensor that stays on the CPU.
        device = parameter.device if tensor.ndim else torch.device("cpu")
        optimizer.state[parameter][key] = tensor.to(device, copy=True)


def _owned(
    model: nn.Module, optimizers: Sequence[Optimizer]
) -> Iterator[tuple[str, nn.Parameter, Optimizer]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield names[id(parameter)], parameter, optimizer
