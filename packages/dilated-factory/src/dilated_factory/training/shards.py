"""Checkpoints of several processes: each writes a part of the tensors, as safetensors."""

from pathlib import Path

from torch import Tensor


def save_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors that all ranks hold alike, each by one of them; a collective call.

    Nothing is pickled: torch's default storage would pickle its index.
    """
    # To import these takes as long as to import torch; one process never needs them.
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(dict(tensors), storage_writer=writer)
