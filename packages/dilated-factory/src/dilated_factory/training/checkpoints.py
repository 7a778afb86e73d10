"""What is in a checkpoint: tensors, the state that belongs to them, and their checksums."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dilated_factory.configs.files import open_regular, read_regular
from dilated_factory.configs.models import FrozenConfig, describe_invalid
from dilated_factory.errors import InputError, RunError
from dilated_factory.training.atomic import write_bytes, write_text
from dilated_factory.training.shards import read_shards

MOST_STATE_BYTES = 2**26  # of state.json, with the checksums of many processes' files


class RunState(FrozenConfig):
    """Where a run stands, beside its tensors.

    No state of a random generator is needed: batches and dropout depend on seed and step alone.
    """

    step: int = Field(ge=0, description="steps done")
    elapsed_seconds: float = Field(ge=0, description="spent on the steps done")
    corpus_digest: str
    bytes_read: float | None = Field(default=None, description="where a token is not a byte")
    best_step: int | None = Field(default=None, description="of the least validation loss so far")
    best_bits_per_byte: float | None = Field(default=None, description="what that was")
    checksums: dict[str, str] = Field(default_factory=dict, description="SHA-256 by file name")
    metrics_digest: str | None = Field(default=None, description="SHA-256 of the lines so far")


@dataclass(frozen=True)
class Checkpoint:
    """Model and optimizer tensors by name, and the state that belongs to them."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: RunState


def tensor_folder(checkpoint: Path, name: str) -> Path:
    """Where the files with the tensors of the "model" or of the "optimizer" are.

    One process writes both into one folder, and tells them apart by the names of the files.
    """
    return checkpoint / name if (checkpoint / name).is_dir() else checkpoint


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """All tensors of the "model" or of the "optimizer", whole.

    Raises:
        RunError: a file is not of the safetensors format, or parts of a tensor are missing.
    """
    folder = tensor_folder(checkpoint, name)
    if folder != checkpoint:
        return read_shards(folder)
    try:
        return load_file(checkpoint / f"{name}.safetensors")
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise RunError(f"checkpoint {str(checkpoint)!r} is damaged: {name}: {reason}") from None


def checked_state(checkpoint: Path, *, has_older: bool) -> RunState:
    """The state of a checkpoint whose files have their checksums.

    Raises:
        RunError: it is damaged.
    """
    advice = "; remove this folder to go on from the one before it" if has_older else ""
    try:
        state = read_state(checkpoint / "state.json")
        reason = _damage(checkpoint, state)
    except (OSError, InputError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
    if reason is not None:
        raise RunError(f"checkpoint {str(checkpoint)!r} is damaged: {reason}{advice}.")
    return state


def _damage(checkpoint: Path, state: RunState) -> str | None:
    """What of a checkpoint is not as its state says."""
    if checkpoint.name != f"checkpoint-{state.step:08d}":
        return f"its state is of step {state.step}"
    # Its own files and no others are opened, whatever names the state holds.
    own = {file.relative_to(checkpoint).as_posix() for file in checkpoint.rglob("*.safetensors")}
    if own != set(state.checksums) or not own:
        return "its tensor files are not those that state.json names"
    for name in sorted(own):
        if checksum(checkpoint / name) != state.checksums[name]:
            return name
    return None


def read_state(file: Path) -> RunState:
    """The state in a file that has its checksum.

    Raises:
        RunError: the file has not, or holds something else.
    """
    content = read_regular(file, most=MOST_STATE_BYTES)
    try:
        state = RunState.model_validate_json(content)
    except ValidationError as error:
        raise RunError(f"{file.name}: {describe_invalid(error)}") from None
    require_checksum(file, content)
    return state


def write_checked(path: Path, content: bytes) -> None:
    """Write a file's checksum as `sha256sum` does, then the file."""
    write_text(_checksum_file(path), f"{hashlib.sha256(content).hexdigest()}  {path.name}\n")
    write_bytes(path, content)


def require_checksum(path: Path, content: bytes) -> None:
    """Raise unless the content of a file is what its checksum says, where there is one."""
    try:
        expected = read_regular(_checksum_file(path)).split()[:1]
    except FileNotFoundError:
        return
    if expected != [hashlib.sha256(content).hexdigest().encode()]:
        raise RunError(
            f"{str(path)!r} is damaged or was changed: it has not the checksum in "
            f"{_checksum_file(path).name}; remove that file to take it as it is."
        )


def _checksum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def checksum(file: Path) -> str:
    """SHA-256 of a file."""
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
