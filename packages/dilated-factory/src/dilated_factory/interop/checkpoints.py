"""Reading checkpoints of other projects, without running anything that is in them."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

StateDict: TypeAlias = Mapping[str, Tensor]


def read_checkpoint(source: StateDict | str | PathLike[str]) -> dict[str, Tensor]:
    """The named tensors of a state dict, of a ``.safetensors`` file, or of one of ``torch.save``.

    A ``torch.save`` file is read with ``weights_only=True``. Where the tensors lie under the key
    "model", as in checkpoints of fairseq and GigaPath, what is there is taken.

    Raises:
        ValueError: something else than named tensors.
        pickle.UnpicklingError: a file of ``torch.save`` that holds more than data.
    """
    content: object = source
    if isinstance(source, str | PathLike):
        if Path(source).suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(source)
        else:
            content = torch.load(source, map_location="cpu", weights_only=True)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping):
        raise ValueError(f"a checkpoint must hold named tensors. Got {type(content).__name__}.")
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                "a checkpoint must hold named tensors only. "
                f"Got {type(tensor).__name__} under {name!r}."
            )
    return dict(content)


def assign(model: nn.Module, state: StateDict, names: Mapping[str, str]) -> None:
    """Put copies of a checkpoint's tensors into a model on the meta device, in their own dtype.

    Args:
        model: its parameters become the copies.
        state: the checkpoint.
        names: the checkpoint's name of each entry of the model's state dict.

    Raises:
        ValueError: listing all tensors that are missing, unexpected, or of another shape or dtype.
    """
    expected = model.state_dict()
    problems = [f"missing {name}" for name in dict.fromkeys(names.values()) if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in set(names.values())]
    problems += [
        f"{names[own]} must have shape {tuple(tensor.shape)}, got {tuple(state[names[own]].shape)}"
        for own, tensor in expected.items()
        if names[own] in state and state[names[own]].shape != tensor.shape
    ]
    dtypes = sorted({str(state[name].dtype) for name in names.values() if name in state})
    if len(dtypes) > 1:
        problems.append(f"all tensors must have one dtype, got {', '.join(dtypes)}")
    if problems:
        raise ValueError(
            "state_dict must hold exactly what the configuration asks for. Got: "
            + "; ".join(problems)
            + "."
        )
    # Copies, so that training the model leaves the checkpoint alone.
    copies = {own: state[names[own]].detach().clone() for own in expected}
    model.load_state_dict(copies, assign=True)
