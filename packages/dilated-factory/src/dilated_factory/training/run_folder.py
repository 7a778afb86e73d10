"""The run folder: configuration, checkpoints that are complete or absent, and metrics.

Layout::

    config.json                      the TrainConfig, written once
    config.json.sha256               its checksum, as of sha256sum
    tokenizer.json                   of runs with one; its checksum beside it; perhaps a
    tokenizer_config.json            which says what ends a document, and its checksum
    genome.json                      of runs on a genome: what it is to the model; its checksum
    lock                             who writes here
    metrics.jsonl                    one line per step
    curves.png                       loss against bytes read
    checkpoint-00000400/             the newest two are kept, and the best of those validated
        model.safetensors
        optimizer.safetensors
        state.json                   step, clock, digests of the corpus and of the metrics so far,
                                     checksums of the two above
        state.json.sha256            its checksum

Of several processes each writes a part of the tensors, into files in ``model/`` and ``optimizer/``,
through torch.distributed.checkpoint and its Hugging Face (safetensors) storage. Any number of
processes can read either, whether they have whole weights or parts of them.

A checkpoint is written under a temporary name and renamed last, so a folder named
``checkpoint-*`` is always complete; one that is dropped is renamed first. Other files are written
after their checksums, and ``config.json`` last, so a folder that has it is a whole run's.

What is read may come from anywhere: only regular files of the folder are opened, nothing in them is
executed, and what is not as it was written is a `RunError`. Folders without the checksums of
``config.json`` and ``state.json``, and without a digest of the metrics, are read as well.
"""

import errno
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from dilated_factory.configs.files import open_regular, read_regular, writing
from dilated_factory.configs.models import TrainConfig, describe_invalid
from dilated_factory.corpora.tokens import (
    BYTES,
    FILE,
    SETTINGS,
    FileTokenizer,
    Tokenizer,
    load_tokenizer,
)
from dilated_factory.errors import InputError, MissingPackageError, RunError
from dilated_factory.training.atomic import sync, write_text
from dilated_factory.training.checkpoints import (
    Checkpoint,
    RunState,
    checked_state,
    checksum,
    read_state,
    read_tensors,
    require_checksum,
    write_checked,
)
from dilated_factory.training.lock import FolderLock, holder

GENOME = "genome.json"
NO_CORPUS = "0" * 64  # the digest of that of a run which was never trained here
KEPT_CHECKPOINTS = 2
MOST_LINE_BYTES = 2**16  # of metrics.jsonl
_TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
_METRICS = ("step", "loss", "bits_per_byte", "bytes_read")  # what is read of them again


class RunFolder:
    """A run folder that exists and holds a valid configuration."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path = path
        self.config = config
        self._tokenizer: FileTokenizer | None = None
        self._hashed: Any = None  # SHA-256 of the lines of the metrics, kept up to date

    @staticmethod
    def require_new(path: str | Path) -> None:
        """Refuse a path where something is already; an empty folder will do, and one torn off.

        Raises:
            RunError: the path is a file or a folder with content.
        """
        path = Path(path)
        if path.exists() and not (path.is_dir() and _is_unfinished(path)):
            raise RunError(
                f"run folder {str(path)!r} already exists; choose another, or resume it (--resume)."
            )

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: TrainConfig,
        tokenizer: Tokenizer = BYTES,
        *,
        complete: Callable[[Self], object] = lambda run: None,
    ) -> Self:
        """Make a new run folder, with a copy of its tokenizer and what ``complete`` puts there.

        Raises:
            RunError: there is already something.
        """
        path = Path(path)
        cls.require_new(path)
        path.mkdir(parents=True, exist_ok=True)
        for left in path.iterdir():
            if not _is_torn(left):
                _remove(left)  # it may be of a run of another kind
        run = cls(path, config)
        try:
            if isinstance(tokenizer, FileTokenizer):
                for name, content in tokenizer.files().items():
                    write_checked(path / name, content)
            complete(run)
            write_checked(path / "config.json", (config.model_dump_json(indent=2) + "\n").encode())
        except OSError:  # a full disk
            for left in path.iterdir():
                _remove(left)
            raise
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a run folder.

        Raises:
            RunError: there is none, or its configuration is damaged.
        """
        path = Path(path)
        file = path / "config.json"
        try:
            with _told_by_reader():
                content = read_regular(file)
                config = TrainConfig.model_validate_json(content)
                require_checksum(file, content)
        except FileNotFoundError:
            raise RunError(f"{str(path)!r} is not a run folder: no config.json in it.") from None
        except NotADirectoryError:
            raise RunError(f"run folder must be a folder. Got the file {str(path)!r}.") from None
        except ValidationError as error:
            reason = describe_invalid(error)
            raise RunError(f"{str(file)!r} is damaged or of another version: {reason}") from None
        return cls(path, config)

    def tokenizer(self) -> Tokenizer:
        """What makes tokens of bytes: the folder's own copy.

        Raises:
            RunError: it is missing, damaged or no tokenizer, or the run is on a genome.
            MissingPackageError: `tokenizers` is not installed.
        """
        if (self.path / GENOME).exists():
            raise RunError(
                f"run {str(self.path)!r} is on a genome, whose tokens are bases and not text: "
                "`dilated genomes` goes on from it, scores it and embeds by it."
            )
        if self.config.tokenizer is None:
            return BYTES
        if self._tokenizer is None:
            with _told_by_reader():
                self._tokenizer = FileTokenizer(self.path / FILE)
                for name, content in self._tokenizer.read.items():
                    require_checksum(self.path / name, content)
        return self._tokenizer

    def require_tokenizer(self, path: str | None) -> None:
        """Refuse a tokenizer other than this run's, wherever it lies; None will do.

        Raises:
            RunError: it is another.
        """
        if path is not None and load_tokenizer(path).digest != self.tokenizer().digest:
            raise RunError(f"the run folder is from another tokenizer than {path!r}.")

    def require_same(self, given: Mapping[str, Any]) -> None:
        """Refuse other values than this run's for fields of its configuration or of its model's.

        Raises:
            RunError: naming all that differ.
        """
        own = dict(self.config.model) | dict(self.config)
        differing = [
            f"{name} is {own[name]!r} there and {value!r} here"
            for name, value in given.items()
            if own[name] != value
        ]
        if differing:
            raise RunError(f"the run folder is from another configuration: {'; '.join(differing)}.")

    def lock(self) -> FolderLock | None:
        """Keep other processes from writing here, until it is released or this process ends.

        What a process left half written when it was killed is removed.

        Returns:
            The lock, or None, with a warning, where the file system has no locks.

        Raises:
            RunError: another has it.
            OSError: nothing can be written there.
        """
        try:
            lock = FolderLock(self.path)
        except BlockingIOError:
            raise self.in_use() from None
        except OSError as error:
            if error.errno in (errno.EROFS, errno.ENOSPC, errno.EDQUOT):
                raise  # nothing could be saved there either
            warnings.warn(
                f"run folder {str(self.path)!r} cannot be locked ({error.strerror}): take care "
                "that no other process trains in it.",
                stacklevel=2,
            )
            return None
        for path in filter(_is_torn, self.path.iterdir()):
            _remove(path)
        return lock

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

    def corpus_digest(self) -> str | None:
        """That of the corpus in the newest checkpoint; None if there is none that can be read."""
        for newest in self.checkpoints()[-1:]:
            with suppress(OSError, InputError):
                return read_state(newest / "state.json").corpus_digest
        return None

    def require_corpus(self) -> None:
        """Refuse a run without a corpus of its own, as those are that were converted.

        Raises:
            RunError: it has none.
        """
        if self.corpus_digest() == NO_CORPUS:
            raise RunError(
                f"run {str(self.path)!r} was converted and has no corpus: give files to score, or "
                "train from it with --from and files."
            )

    def save(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: RunState) -> Path:
        """Write a checkpoint, durable and complete or not at all; return its folder."""
        temporary = self.begin_checkpoint(state.step)
        for name, tensors in zip(_TENSOR_FILES, (model, optimizer), strict=True):
            file = temporary / name
            with writing(file):
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
        return self.finish_checkpoint(temporary, state)

    def begin_checkpoint(self, step: int) -> Path:
        """Make the folder, under a temporary name, to write tensors into."""
        temporary = self.temporary_checkpoint(step)
        _remove(temporary)  # left by a run that was killed
        temporary.mkdir()
        return temporary

    def temporary_checkpoint(self, step: int) -> Path:
        """Where a checkpoint is while it is written."""
        return self.path / f".checkpoint-{step:08d}.tmp"

    def finish_checkpoint(self, temporary: Path, state: RunState) -> Path:
        """Make durable what is in the temporary folder, give it its name, drop old checkpoints."""
        final = self._checkpoint(state.step)
        files = sorted(temporary.rglob("*.safetensors"))
        checksums = {file.relative_to(temporary).as_posix(): checksum(file) for file in files}
        digest = state.metrics_digest or self.metrics_digest()
        full = state.model_copy(update={"checksums": checksums, "metrics_digest": digest})
        record = temporary / "state.json"
        write_checked(record, (full.model_dump_json(indent=2) + "\n").encode())
        for file in files:
            # safetensors lets nobody else read its files, whatever the umask says.
            if file.stat().st_mode != record.stat().st_mode:
                shutil.copymode(record, file)
            sync(file)
        sync(temporary)
        if not final.exists():  # else the same step of the same run, already safe
            temporary.rename(final)
            sync(self.path)
        _remove(temporary)
        best = None if state.best_step is None else self._checkpoint(state.best_step)
        for old in self.checkpoints()[:-KEPT_CHECKPOINTS]:
            if old != best:
                dropped = self.temporary_checkpoint(int(old.name.removeprefix("checkpoint-")))
                _remove(dropped)
                _remove(old.rename(dropped))
        return final

    def _checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step:08d}"

    def newest(self) -> tuple[Path, RunState]:
        """The folder of the newest checkpoint, whose files are undamaged, and its state.

        Raises:
            RunError: there is none, or it is damaged.
        """
        checkpoints = self.checkpoints()
        if not checkpoints:
            raise RunError(f"run folder {str(self.path)!r} holds no checkpoint yet.")
        return checkpoints[-1], checked_state(checkpoints[-1], has_older=len(checkpoints) > 1)

    def best(self) -> tuple[Path, RunState]:
        """As `newest`, but of the least validation loss.

        Raises:
            RunError: the run was not validated, or the checkpoint is damaged.
        """
        step = self.newest()[1].best_step
        if step is None:
            raise RunError(f"run {str(self.path)!r} was not validated: it has no best checkpoint.")
        return self.at(step)

    def at(self, step: int) -> tuple[Path, RunState]:
        """As `newest`, but of a step.

        Raises:
            RunError: the checkpoint is not there, or it is damaged.
        """
        folder = self._checkpoint(step)
        if not folder.exists():
            raise RunError(f"run folder {str(self.path)!r} holds no checkpoint of step {step}.")
        return folder, checked_state(folder, has_older=False)

    def load(self, *, best: bool = False) -> Checkpoint:
        """Read the newest checkpoint, or the best; raises as `newest` and `best`."""
        folder, state = self.best() if best else self.newest()
        return Checkpoint(read_tensors(folder, "model"), read_tensors(folder, "optimizer"), state)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to the metrics."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            line = json.dumps(record) + "\n"
            hashed = self._metrics_hash()
            file.write(line)
            hashed.update(line.encode())

    def sync_metrics(self) -> None:
        """Force the metrics to the disk; done before each checkpoint, so that none is missing."""
        if self.metrics_path.exists():
            sync(self.metrics_path)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All metrics; a torn last line, left by a killed process, is left out.

        Raises:
            RunError: a line is not what `append_metrics` writes, or a step is missing.
        """
        return [record for _, record in self._metrics()]

    def truncate_metrics(self, step: int) -> None:
        """Drop the metrics of steps after ``step``: a resumed run does those again.

        Raises:
            RunError: as `read_metrics`, or the others are not those that the checkpoint of this
                step knows.
        """
        kept = [line for line, record in self._metrics() if record["step"] <= step]
        hashed = _hash_lines(kept)
        file = self.path / f"checkpoint-{step:08d}" / "state.json"
        if kept and file.exists():
            digest = read_state(file).metrics_digest
            if digest is not None and digest != hashed.hexdigest():
                raise self._damaged_metrics(f"the lines up to step {step} are not those written")
        write_text(self.metrics_path, "".join(line + "\n" for line in kept))
        self._hashed = hashed

    def metrics_digest(self) -> str:
        """SHA-256 of the lines so far."""
        digest: str = self._metrics_hash().hexdigest()
        return digest

    def _metrics_hash(self) -> Any:
        if self._hashed is None:
            self._hashed = _hash_lines(line for line, _ in self._metrics())
        return self._hashed

    def _metrics(self) -> list[tuple[str, dict[str, Any]]]:
        """The lines of the metrics, each with what it says."""
        if not self.metrics_path.exists():
            return []
        with _told_by_reader(), open_regular(self.metrics_path) as file:
            # What follows the last newline was torn off while it was written.
            lines = file.read().split(b"\n")[:-1]
        found: list[tuple[str, dict[str, Any]]] = []
        for number, line in enumerate(lines, start=1):
            try:
                record: Any = json.loads(line) if len(line) <= MOST_LINE_BYTES else None
            except (ValueError, RecursionError):
                record = None
            if not _is_metrics(record):
                raise self._damaged_metrics(f"line {number} is not the metrics of a step")
            if found and record["step"] != found[-1][1]["step"] + 1:
                raise self._damaged_metrics(
                    f"line {number} is not of the step after line {number - 1}"
                )
            found.append((line.decode(), record))
        return found

    def _damaged_metrics(self, reason: str) -> RunError:
        return RunError(
            f"{str(self.metrics_path)!r} is damaged: {reason}; remove it to go on without them."
        )


def is_run_folder(path: Path) -> bool:
    """Whether a folder looks like one of a run, damaged or not."""
    with suppress(OSError, ValueError, RecursionError):
        values = json.loads(read_regular(path / "config.json"))
        return isinstance(values, dict) and values.get("kind") == "train" and "model" in values
    return False


def _hash_lines(lines: Iterable[str]) -> Any:
    hashed = hashlib.sha256()
    for line in lines:
        hashed.update(f"{line}\n".encode())
    return hashed


def _is_metrics(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and all(name in record for name in _METRICS)
        and all(type(value) in (int, float) for value in record.values())
        and type(record["step"]) is int
        and record["step"] >= 1
    )


def _is_unfinished(path: Path) -> bool:
    """Whether a folder is empty, or a run folder whose making was killed before it was one."""
    names = {each.name for each in path.iterdir() if not _is_torn(each)}
    # What has no checksum of ours is somebody else's.
    checked = {name: f"{name}.sha256" for name in (FILE, SETTINGS, GENOME)}
    own = {name for name, checksum in checked.items() if checksum in names}
    if FILE in own:
        own.add("checkpoint-00000000")  # of a converted run
    return names <= {*own, *checked.values(), "config.json.sha256"}


def _is_torn(path: Path) -> bool:
    """Whether a killed process left it half written, or half removed."""
    file = r"(config|genome|tokenizer|tokenizer_config)\.json(\.sha256)?|metrics\.jsonl|curves\.png"
    return re.fullmatch(rf"\.checkpoint-\d+\.tmp|\.({file})\.\d+\.tmp", path.name) is not None


def _remove(path: Path) -> None:
    """Remove a file, a folder with what is in it, or a link; do nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _told_by_reader() -> Iterator[None]:
    """What is wrong with a file of the folder is an error about the run."""
    try:
        yield
    except InputError as error:
        told = isinstance(error, RunError | MissingPackageError)
        raise error if told else RunError(str(error)) from None
