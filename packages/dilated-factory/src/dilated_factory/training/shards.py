"""Checkpoints of several processes: each writes a part of the tensors, as safetensors."""

# torch.distributed.checkpoint takes half as long to import as torch, so it is imported where it is
# used: one process rarely needs it.

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from dilated_factory.errors import RunError
from dilated_factory.training.optimizer import Form

_MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


def save_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors that all ranks hold, alike or in parts, each once; a collective call.

    Nothing is pickled: torch's default storage would pickle its index.

    Raises:
        OSError: on all ranks, if one could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        if not isinstance(cause, OSError | SafetensorError):
            raise
        raise OSError(f"{str(folder)!r} cannot be written: {_line(cause)}") from error


def load_shards(folder: Path, tensors: dict[str, Tensor], *, alone: bool = False) -> None:
    """Fill tensors from the files of a folder, of any number of processes; a collective call.

    Args:
        folder: where the files are.
        tensors: by name; of a DTensor only this rank's part is read.
        alone: whether this process makes the call without the others.

    Raises:
        RunError: on all ranks, if a tensor is missing or has another shape in the files.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():
            # torch warns that it loads without others even where that is asked for.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(dict(tensors), storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise RunError(f"the checkpoint does not fit its configuration: {_line(cause)}") from None


def forms_in(folder: Path) -> dict[str, Form]:
    """What the whole tensors in the files of a folder are, by name.

    Raises:
        RunError: a file is not as `save_shards` writes it, or the parts do not make up a tensor.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        parts = {
            name: each for name, each in found.items() if isinstance(each, TensorStorageMetadata)
        }
        # Before any memory is taken: shapes that no file backs would take as much as they say.
        torn = [
            name
            for name, each in parts.items()
            if sum(chunk.sizes.numel() for chunk in each.chunks) != each.size.numel()
        ]
    except (SafetensorError, *_MALFORMED) as error:
        # What torch's reader makes of whatever the headers hold.
        raise RunError(f"the files in {str(folder)!r} are damaged: {_line(error)}") from None
    if torn:
        raise RunError(
            f"the files in {str(folder)!r} are damaged: parts of {torn[0]!r} are missing."
        )
    return {name: Form(each.size, each.properties.dtype) for name, each in parts.items()}


def read_shards(folder: Path) -> dict[str, Tensor]:
    """The whole tensors in the files of a folder, by name; for one process alone."""
    tensors = {
        name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in forms_in(folder).items()
    }
    load_shards(folder, tensors, alone=True)
    return tensors


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
