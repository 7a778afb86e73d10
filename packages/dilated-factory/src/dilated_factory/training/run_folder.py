"""The run folder: configuration, checkpoints that are complete or absent, and metrics.

Layout::

    config.json                      the TrainConfig, written once
    lock                             who writes here
    metrics.jsonl                    one line per step
    curves.png                       loss against bytes read
    checkpoint-00000400/             the newest two are kept
        model.safetensors
        optimizer.safetensors
        state.json                   step, clock, digest of the corpus, checksums of the two above

Of several processes each writes a part of the tensors, into files in ``model/`` and ``optimizer/``,
through torch.distributed.checkpoint and its Hugging Face (safetensors) storage. Any number of
processes can read either, whether they have whole weights or parts of them.

A checkpoint is written under a temporary name and renamed last, so a folder named
``checkpoint-*`` is always complete.
"""

import hashlib
import json
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dilated_factory.configs.models import FrozenConfig, TrainConfig, describe_invalid
from dilated_factory.errors import RunError
from dilated_factory.training.atomic import sync, write_text
from dilated_factory.training.lock import FolderLock, holder
from dilated_factory.training.shards import read_shards

KEPT_CHECKPOINTS = 2
_TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")


class RunState(FrozenConfig):
    """Where a run stands, beside its tensors.

    No state of a random generator is needed: batches and dropout depend on seed and step alone.
    """

    step: int = Field(ge=0, description="steps done")
    elapsed_seconds: float = Field(ge=0, description="spent on the steps done")
    corpus_digest: str
    checksums: dict[str, str] = Field(default_factory=dict, description="SHA-256 by file name")


@dataclass(frozen=True)
class Checkpoint:
    """Model and optimizer tensors by name, and the state that belongs to them."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: RunState


class RunFolder:
    """A run folder that exists and holds a valid configuration."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path = path
        self.config = config

    @staticmethod
    def require_new(path: str | Path) -> None:
        """Refuse a path where something is already; an empty folder will do.

        Raises:
            RunError: the path is a file or a folder with content.
        """
        path = Path(path)
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise RunError(
                f"run folder {str(path)!r} already exists; choose another, or resume it (--resume)."
            )

    @classmethod
    def create(cls, path: str | Path, config: TrainConfig) -> Self:
        """Make a new run folder.

        Raises:
            RunError: there is already something.
        """
        path = Path(path)
        cls.require_new(path)
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / "config.json", config.model_dump_json(indent=2) + "\n")
        return cls(path, config)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a run folder.

        Raises:
            RunError: there is none, or its configuration is damaged.
        """
        path = Path(path)
        file = path / "config.json"
        try:
            config = TrainConfig.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            raise RunError(f"{str(path)!r} is not a run folder: no config.json in it.") from None
        except NotADirectoryError:
            raise RunError(f"run folder must be a folder. Got the file {str(path)!r}.") from None
        except ValidationError as error:
            reason = describe_invalid(error)
            raise RunError(f"{str(file)!r} is damaged or of another version: {reason}") from None
        return cls(path, config)

    def lock(self) -> FolderLock | None:
        """Keep other processes from writing here, until it is released or this process ends.

        Returns:
            The lock, or None, with a warning, where the file system has no locks.

        Raises:
            RunError: another has it.
        """
        try:
            return FolderLock(self.path)
        except BlockingIOError:
            raise self.in_use() from None
        except OSError as error:
            warnings.warn(
                f"run folder {str(self.path)!r} cannot be locked ({error.strerror}): take care "
                "that no other process trains in it.",
                stacklevel=2,
            )
            return None

    def in_use(self) -> RunError:
        """The error that says who trains in this folder."""
        return RunError(
            f"run folder {str(self.path)!r} is in use by {holder(self.path)}: wait until that "
            "ends, or stop it."
        )

    @property
    def metrics_path(self) -> Path:
        """Where the metrics are, one JSON line per step."""
        return self.path / "metrics.jsonl"

    @property
    def curves_path(self) -> Path:
        """Where the picture of the loss curve is."""
        return self.path / "curves.png"

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        named = [path for path in self.path.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
        return sorted(named, key=lambda path: int(path.name.removeprefix("checkpoint-")))

    def save(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: RunState) -> Path:
        """Write a checkpoint, durable and complete or not at all; return its folder."""
        temporary = self.begin_checkpoint(state.step)
        for name, tensors in zip(_TENSOR_FILES, (model, optimizer), strict=True):
            file = temporary / name
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
        return self.finish_checkpoint(temporary, state)

    def begin_checkpoint(self, step: int) -> Path:
        """Make the folder, under a temporary name, to write tensors into."""
        temporary = self.temporary_checkpoint(step)
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
        temporary.mkdir()
        return temporary

    def temporary_checkpoint(self, step: int) -> Path:
        """Where a checkpoint is while it is written."""
        return self.path / f".checkpoint-{step:08d}.tmp"

    def finish_checkpoint(self, temporary: Path, state: RunState) -> Path:
        """Make durable what is in the temporary folder, give it its name, drop old checkpoints."""
        final = self.path / f"checkpoint-{state.step:08d}"
        files = sorted(temporary.rglob("*.safetensors"))
        checksums = {file.relative_to(temporary).as_posix(): _checksum(file) for file in files}
        full = state.model_copy(update={"checksums": checksums})
        record = temporary / "state.json"
        write_text(record, full.model_dump_json(indent=2) + "\n")
        for file in files:
            # safetensors lets nobody else read its files, whatever the umask says.
            if file.stat().st_mode != record.stat().st_mode:
                shutil.copymode(record, file)
            sync(file)
        sync(temporary)
        if not final.exists():  # else the same step of the same run, already safe
            temporary.rename(final)
            sync(self.path)
        shutil.rmtree(temporary, ignore_errors=True)
        for old in self.checkpoints()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
        return final

    def newest(self) -> tuple[Path, RunState]:
        """The folder of the newest checkpoint, whose files are undamaged, and its state.

        Raises:
            RunError: there is none, or it is damaged.
        """
        checkpoints = self.checkpoints()
        if not checkpoints:
            raise RunError(f"run folder {str(self.path)!r} holds no checkpoint yet.")
        return checkpoints[-1], _checked_state(checkpoints[-1], has_older=len(checkpoints) > 1)

    def load(self) -> Checkpoint:
        """Read the newest checkpoint; raises as `newest`."""
        folder, state = self.newest()
        return Checkpoint(read_tensors(folder, "model"), read_tensors(folder, "optimizer"), state)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to the metrics."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def sync_metrics(self) -> None:
        """Force the metrics to the disk; done before each checkpoint, so that none is missing."""
        if self.metrics_path.exists():
            sync(self.metrics_path)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All metrics; a torn last line, left by a killed process, is left out."""
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8").split("\n")
        try:
            # What follows the last newline was torn off while it was written.
            return [json.loads(line) for line in lines[:-1]]
        except json.JSONDecodeError:
            raise RunError(f"{str(self.metrics_path)!r} is damaged: not JSON lines.") from None

    def truncate_metrics(self, step: int) -> None:
        """Drop the metrics of steps after ``step``: a resumed run does those again."""
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        write_text(self.metrics_path, "".join(json.dumps(record) + "\n" for record in kept))


def tensor_folder(checkpoint: Path, name: str) -> Path:
    """Where the files with the tensors of the "model" or of the "optimizer" are.

    One process writes both into one folder, and tells them apart by the names of the files.
    """
    return checkpoint / name if (checkpoint / name).is_dir() else checkpoint


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """All tensors of the "model" or of the "optimizer", whole."""
    folder = tensor_folder(checkpoint, name)
    if folder == checkpoint:
        return load_file(checkpoint / f"{name}.safetensors")
    return read_shards(folder)


def _checked_state(checkpoint: Path, *, has_older: bool) -> RunState:
    """The state of a checkpoint whose files have their checksums."""
    advice = "; remove this folder to go on from the one before it" if has_older else ""
    try:
        state = RunState.model_validate_json((checkpoint / "state.json").read_bytes())
        damaged = [
            name
            for name, digest in state.checksums.items()
            if _checksum(checkpoint / name) != digest
        ]
    except (OSError, ValidationError) as error:
        damaged = [str(error).splitlines()[0]]
    if damaged:
        raise RunError(f"checkpoint {str(checkpoint)!r} is damaged: {damaged[0]}{advice}.")
    return state


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
