"""Slide encoders and classifiers for the commands: from a checkpoint and what is told of it."""

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError

from dilated_factory.configs.kinds import read_config
from dilated_factory.configs.slides import SlideEncoderConfig
from dilated_factory.errors import InputError
from dilated_factory.training.loop import select_device

Content = TypeVar("Content")
Pool: TypeAlias = Literal["tiles", "token"]


def encoder_config(path: Path | None, pool: Pool | None) -> SlideEncoderConfig:
    """The shape in a file, that of the published encoder without one; tiles are pooled unless told.

    Raises:
        InputError: the file holds another kind of configuration.
    """
    config = SlideEncoderConfig() if path is None else read_config(path)
    if not isinstance(config, SlideEncoderConfig):
        got = type(config).__name__
        raise InputError(f"{str(path)!r} must hold a SlideEncoderConfig. Got a {got}.")
    if pool is None and "global_pool" in config.model_fields_set:
        return config
    return SlideEncoderConfig(**{**config.model_dump(), "global_pool": pool != "token"})


def loaded(load: Callable[[Path], Content], path: Path) -> Content:
    """What a loader of checkpoints makes of a file.

    Raises:
        InputError: the file is no checkpoint, or does not fit.
        OSError: the file cannot be read.
    """
    try:
        return load(path)
    except (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError):
        raise InputError(f"{str(path)!r} is no checkpoint, or is damaged.") from None
    except ValueError as error:
        raise InputError(f"{str(path)!r}: {error}") from None


def digest(path: Path) -> str:
    """What tells checkpoints apart: the SHA-256 of a file.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def autocast_dtype(name: str) -> torch.dtype | None:
    """The dtype that a command computes in; None for float32."""
    dtype: torch.dtype = getattr(torch, name)
    return None if dtype == torch.float32 else dtype


def local_device(name: str) -> torch.device:
    """The device of that name; under torchrun "cuda" and "auto" are the GPU of this process.

    Raises:
        InputError: as `select_device`.
    """
    device = select_device(name)
    if name in ("auto", "cuda") and device.type == "cuda":
        return select_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    return device
