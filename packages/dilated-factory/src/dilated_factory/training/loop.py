"""The training loop: step, record, checkpoint, stop or resume, always from the same state."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch.optim import Optimizer

from dilated_factory.configs.models import Parent, TrainConfig
from dilated_factory.errors import InputError, RunError
from dilated_factory.models.longnet import LongNetLM
from dilated_factory.training.background import Ahead, Beside
from dilated_factory.training.batches import (
    document_starts,
    gather_windows,
    offsets_of,
    require_window,
    step_seed,
)
from dilated_factory.training.checkpoints import RunState, read_tensors, tensor_folder
from dilated_factory.training.compiling import compiling
from dilated_factory.training.corpus import Corpus
from dilated_factory.training.lock import FolderLock
from dilated_factory.training.optimizer import (
    build_optimizers,
    is_optimizer_name,
    load_optimizer_tensors,
    make_room,
    optimizer_tensors,
    set_learning_rate,
)
from dilated_factory.training.parallel import Parallel, Share
from dilated_factory.training.precision import autocast
from dilated_factory.training.readback import Readback, to_host
from dilated_factory.training.run_folder import RunFolder
from dilated_factory.training.schedule import learning_rate_factor
from dilated_factory.training.shards import forms_in, load_shards, save_shards
from dilated_factory.training.validation import validation_starts
from dilated_factory.training.weights import (
    RECOMPUTED,
    initial_model,
    load_model,
    model_tensors,
    require_heir,
    require_room_for,
    require_tokenizer,
)


@dataclass(frozen=True)
class StepMetrics:
    """What one step did; ``step`` counts from 1. A line of metrics.jsonl.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("text").write_bytes(b"Any bytes will do. " * 100)
        >>> shape = LongNetConfig(embed_dim=16, num_heads=2, num_layers=1, context=32)
        >>> config = TrainConfig(model=shape, paths=("text",), steps=2, batch_size=2)
        >>> _ = train(config, "run", on_step=lambda step: print(step.step))
        1
        2
    """

    step: int
    loss: float  # nats per token
    bits_per_byte: float
    learning_rate: float
    gradient_norm: float  # before clipping
    bytes_read: int  # in all steps so far
    elapsed_seconds: float  # of training so far
    progress: float  # share of the run that is done, 0 to 1
    validation_bits_per_byte: float | None = None  # of held-out bytes, after steps that looked
    tokens_read: int | None = None  # as bytes_read, where a token is not a byte

    def record(self) -> dict[str, float]:
        """What metrics.jsonl says of it."""
        return {name: value for name, value in asdict(self).items() if value is not None}


_AROUND = 2**17  # bytes that the system maps around what is read
_MOST_TOUCHED = 2**28


class Best(NamedTuple):
    """The least validation loss of a run."""

    step: int
    bits_per_byte: float


class _Launched(NamedTuple):
    """A step that the device has been told to take."""

    step: int
    learning_rate: float
    losses: torch.Tensor  # (2,): nats per token, norm of the gradients
    bytes_read: float  # in all steps so far
    tokens_per_byte: float  # of what is predicted


class Drawn(NamedTuple):
    """This rank's part of a batch, and what is true of the whole batch."""

    shares: list[Share]
    bytes_read: float
    tokens_per_byte: float  # of what is predicted


class _Pending(NamedTuple):
    """A step whose numbers are on their way to the host."""

    launched: _Launched
    numbers: Readback


def select_device(name: str) -> torch.device:
    """The device of that name, if this machine has it; "auto" is CUDA if it has that, else the CPU.

    Raises:
        InputError: the name is unknown to torch, or the device is absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # torch asks a backend's own module, which may raise anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"device {name!r} is not available: {reason}") from None
    if device.type == "meta":
        raise InputError("device must be able to compute. Got 'meta'.")
    return device


ALONE = Parallel(torch.device("cpu"))


class Trainer:
    """One run in memory: model, optimizers and the step they stand at.

    From `start` or `restore` until `train` is done, no other process can write in its folder.

    Args:
        run: the folder that everything is written to; its ``config`` decides the loss curve.
        corpus: what to train on.
        parallel: where to compute, and with which other processes; by default on the CPU, alone.
        checkpoint_every: steps between checkpoints. A killed run loses at most these, and those
            that were taken while the last one was written.
        compiled: whether the blocks go through torch.compile.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("text").write_bytes(b"Any bytes will do. " * 100)
        >>> shape = LongNetConfig(embed_dim=16, num_heads=2, num_layers=1, context=32)
        >>> config = TrainConfig(model=shape, paths=("text",), steps=2, batch_size=2)
        >>> trainer = Trainer.start("run", config, load_corpus(config.paths))
        >>> trainer.train()  # to its end
        True
        >>> trainer.step
        2
    """

    def __init__(
        self,
        run: RunFolder,
        corpus: Corpus,
        *,
        parallel: Parallel = ALONE,
        checkpoint_every: int = 100,
        compiled: bool = False,
    ) -> None:
        if checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1. Got {checkpoint_every}.")
        self.run = run
        self.corpus = corpus
        self.parallel = parallel
        self.checkpoint_every = checkpoint_every
        self.step = 0
        self.elapsed_seconds = 0.0
        self.bytes_read = 0.0
        self.best: Best | None = None
        parallel.require_fit(run.config)
        parallel.require_same("corpus", corpus.digest)
        self._compiled = compiled
        self._begin_anew()
        self._holds_folder = False
        self._lock: FolderLock | None = None  # on the main rank
        self._stopping = False
        # A device that works beside the host has its next step while the last one's loss arrives.
        self._lag = 1 if parallel.device.type == "cuda" else 0
        self._shares = Ahead[Drawn](beside=parallel.device.type != "cpu")
        self._touched = 0  # bytes of the corpus, about, since it let go of them
        self._seconds = 0.0  # of this process; elapsed_seconds is what all have agreed on

    def _begin_anew(self) -> None:
        """Make model and optimizers as at step 0."""
        self.model = self.make_model()
        self.model.activation_checkpointing = RECOMPUTED[self.run.config.recompute]
        if self._compiled:
            self.model.compile_blocks()
        self._loss = self.parallel.loss_of(self.model)
        self.optimizers: list[Optimizer] = build_optimizers(
            self.model, self.run.config, sharded=self.parallel.is_sharded
        )
        self._is_fresh = True

    def make_model(self) -> LongNetLM:
        """Make the model at step 0, on the CPU; a subclass may train one of its own.

        That has ``loss``, as `LongNetLM` has it with targets, which is the mean over them;
        ``blocks``, whose matrices are the optimizer's, while all else is AdamW's; and to be
        compiled, ``compile_blocks``. Its weights must depend on the run's seed alone. `restore`
        resumes it; `load_trained` and the commands know LongNetLM alone.
        """
        return initial_model(self.run.config, self.parallel.attention(self.run.config))

    @classmethod
    def start(
        cls,
        path: str | Path,
        config: TrainConfig,
        corpus: Corpus,
        *,
        parallel: Parallel = ALONE,
        checkpoint_every: int = 100,
        compiled: bool = False,
    ) -> Self:
        """Make a run folder and a trainer at step 0; nothing is written if the input is unfit.

        Raises:
            RunError: something is already at ``path``.
            InputError: the processes cannot share the batch and its sequences, or these or the
                model do not fit into memory.
            RunError: the run that this one goes on from is gone, or its weights do not fit.
            CorpusError: the corpus is shorter than the context, or what is held out of it, if the
                run is to be validated.
        """
        require_room_for(config)
        cls._require_tokens(config, corpus)
        if config.validate_every is not None:
            validation_starts(len(corpus.validation), config.model.context, 1, 1)
        require_window(len(corpus.train), config.model.context)
        parallel.require_fit(config)
        RunFolder.require_new(path)
        parallel.barrier()
        if parallel.is_main:
            RunFolder.create(
                path, config, corpus.tokenizer, complete=lambda run: cls._complete(run, corpus)
            )
        parallel.barrier()
        run = RunFolder.open(path)
        trainer = cls(
            run, corpus, parallel=parallel, checkpoint_every=checkpoint_every, compiled=compiled
        )
        trainer._hold_folder()
        if config.parent is not None:
            trainer._inherit(config.parent)
        return trainer

    @staticmethod
    def _complete(run: RunFolder, corpus: Corpus) -> None:
        """Put into a new folder what else belongs there."""

    @staticmethod
    def _require_tokens(config: TrainConfig, corpus: Corpus) -> None:
        """Refuse a corpus, or weights to begin with, whose tokens are not the configuration's."""
        require_tokenizer(config, corpus.tokenizer)
        if config.parent is not None:
            require_heir(config, config.parent)
            if RunFolder.open(config.parent.run).tokenizer().digest != corpus.tokenizer.digest:
                raise RunError(
                    f"the weights of {config.parent.run!r} do not fit: they are of another "
                    "tokenizer."
                )

    def _inherit(self, parent: Parent) -> None:
        """Begin with the weights of another run, and with the state of its optimizers if it fits.

        They are saved at once, so that this run no longer needs the other.
        """
        run = RunFolder.open(parent.run)
        folder, _ = run.at(parent.step)
        self._load(folder, optimizers=run.config.optimizer == self.run.config.optimizer)
        self.save()

    def restore(self) -> None:
        """Go back to the newest checkpoint of the run, or to the start if it has none.

        Raises:
            RunError: the checkpoint is damaged, the corpus is not the one it was trained on,
                another process trains in the folder, or there is no checkpoint and the run that
                this one goes on from is gone.
        """
        self._hold_folder()
        try:
            self._go_back()
        except BaseException:
            self._leave_folder()
            raise

    def _go_back(self) -> None:
        self.step, self.elapsed_seconds, self.bytes_read, self.best = 0, 0.0, 0.0, None
        checkpoints = self.run.checkpoints()
        if not (checkpoints or self._is_fresh):
            self._begin_anew()
        if checkpoints:
            folder, state = self.run.newest()
            if state.corpus_digest != self.corpus.digest:
                raise RunError("the corpus has changed since this run was started.")
            self._load(folder)
            self.step, self.elapsed_seconds = state.step, state.elapsed_seconds
            self.bytes_read = self._bytes_read(state)
            if state.best_step is not None and state.best_bits_per_byte is not None:
                self.best = Best(state.best_step, state.best_bits_per_byte)
        elif self.run.config.parent is not None:  # it ended before what it inherits was saved
            self._inherit(self.run.config.parent)
        self.parallel.barrier()
        if self.parallel.is_main:
            self.run.truncate_metrics(self.step)

    def train(
        self,
        *,
        on_step: Callable[[StepMetrics], None] = lambda metrics: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Run to the end, or until ``should_stop``; save either way. Return whether it is done.

        It stops on all ranks once it should on any. The global random state of torch is left as it
        was found.

        Raises:
            RunError: the loss became infinite or no number.
            OSError: a checkpoint could not be written.
        """
        self._hold_folder()
        self._is_fresh = False
        self.model.train()
        device = self.parallel.device
        try:
            with (
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                compiling() if self._compiled else nullcontext(),
                Beside() as writing,
            ):
                self._agree(should_stop())
                self._take_steps(on_step, should_stop, writing)
                writing.wait()
                self.save()
        finally:
            self._shares.close()
            self._leave_folder()
        return self.progress >= 1

    def _take_steps(
        self,
        on_step: Callable[[StepMetrics], None],
        should_stop: Callable[[], bool],
        writing: Beside,
    ) -> None:
        pending = deque[_Pending]()
        alone = self.parallel.mesh is None
        while not self._stopping and self.progress < 1:
            with self._clock():
                launched = self._take_step()
            # Several ranks decide together, so their votes travel with the numbers of the step.
            vote = float(not alone and should_stop()), self._seconds
            pending.append(
                _Pending(launched, Readback(self.parallel.average(launched.losses, vote)))
            )
            writing.check()
            due = self.step % self.checkpoint_every == 0
            looks = self._looks_at(self.step)
            while len(pending) > (0 if due or looks else self._lag):
                with self._clock():
                    metrics = self._read(pending.popleft())
                if looks and not pending:
                    metrics = replace(metrics, validation_bits_per_byte=self.validate())
                    due |= self._is_best(metrics)
                if self.parallel.is_main:
                    self.run.append_metrics(metrics.record())
                on_step(metrics)
            if due:
                self._save_beside(writing)
            self._stopping |= alone and should_stop()
        while pending:
            metrics = self._read(pending.popleft())
            if self.parallel.is_main:
                self.run.append_metrics(metrics.record())
            on_step(metrics)

    @contextmanager
    def _clock(self) -> Iterator[None]:
        """Count what is done within it as training."""
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    def _looks_at(self, step: int) -> bool:
        every = self.run.config.validate_every
        return every is not None and (step % every == 0 or step == self.run.config.steps)

    def _is_best(self, metrics: StepMetrics) -> bool:
        """Whether validation was never better; if so it is noted."""
        bits = metrics.validation_bits_per_byte
        assert bits is not None
        if self.best is not None and self.best.bits_per_byte <= bits:
            return False
        self.best = Best(metrics.step, bits)
        return True

    @torch.no_grad()
    def validate(self) -> float:
        """Mean bits of held-out bytes, in windows of one context; a collective call."""
        config, data = self.run.config, self.corpus.validation
        ranks, context = self.parallel.data_ranks, config.model.context
        rows = config.micro_batch_size or config.batch_size // ranks
        # Whole batches, since a compiled block would be compiled anew for another size.
        most = max(1, round(config.validation_bytes / self.corpus.bytes_per_token))
        starts = validation_starts(len(data), context, most, rows * ranks)
        total = torch.zeros((), dtype=torch.float32, device=self.parallel.device)
        targets = len(starts) * context - sum(
            map(len, self._document_starts(starts, context, held_out=True) or [])
        )
        scored_bytes = 0.0
        was_training = self.model.training
        self.model.eval()
        for part in starts.split(rows * ranks):
            windows = gather_windows(data, part, context + 1)
            begins = self._document_starts(part, context, held_out=True)
            scored_bytes += self._scored(windows, begins)[1]
            share_of_all = (len(part) * context - sum(map(len, begins or []))) / max(1, targets)
            for share in self.parallel.shares(windows, starts=begins):
                with autocast(self.parallel.device, config.dtype):
                    loss = self._loss(*share.to(self.parallel.device)) / share.divisor
                total += loss * share_of_all
        self.model.train(was_training)
        (nats,) = self.parallel.mean([total.item()])
        return nats / math.log(2) * (targets / max(1.0, scored_bytes))

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps or by the clock."""
        return self._progress(self.step)

    def _progress(self, step: int) -> float:
        config = self.run.config
        if config.steps is not None:
            return step / config.steps
        assert config.minutes is not None
        return min(self.elapsed_seconds / (60 * config.minutes), 1.0)

    def save(self) -> Path:
        """Write a checkpoint of the present state."""
        with Beside() as writing:
            self._save_beside(writing)
        return self.run.checkpoints()[-1]

    def _save_beside(self, writing: Beside) -> None:
        """Copy the present state and have it written while training goes on.

        Several processes wait for each other, and so until it is written.
        """
        state = RunState(
            step=self.step,
            elapsed_seconds=self.elapsed_seconds,
            corpus_digest=self.corpus.digest,
            bytes_read=self.bytes_read if self._has_tokenizer else None,
            best_step=self.best.step if self.best else None,
            best_bits_per_byte=self.best.bits_per_byte if self.best else None,
            # Now: lines of later steps are added while this checkpoint is written.
            metrics_digest=self.run.metrics_digest() if self.parallel.is_main else None,
        )
        model, optimizer = model_tensors(self.model), optimizer_tensors(self.model, self.optimizers)
        if self.parallel.mesh is None:
            writing.wait()  # two copies at once would take the memory of both
            kept, wait = to_host(
                {f"model {name}": x for name, x in model.items()}
                | {f"optimizer {name}": x for name, x in optimizer.items()}
            )
            writing.begin(lambda: self._write(kept, wait, state))
            return
        temporary = self.run.temporary_checkpoint(self.step)
        if self.parallel.is_main:
            self.run.sync_metrics()
            self.run.begin_checkpoint(self.step)
        self.parallel.barrier()
        save_shards(temporary / "model", model)
        save_shards(temporary / "optimizer", optimizer)
        if self.parallel.is_main:
            self.run.finish_checkpoint(temporary, state)
        self.parallel.barrier()

    def _write(
        self, tensors: dict[str, torch.Tensor], wait: Callable[[], None], state: RunState
    ) -> None:
        wait()
        self.run.sync_metrics()
        model, optimizer = (
            {key.removeprefix(kind): x for key, x in tensors.items() if key.startswith(kind)}
            for kind in ("model ", "optimizer ")
        )
        self.run.save(model, optimizer, state)

    def _load(self, checkpoint: Path, *, optimizers: bool = True) -> None:
        """Fill model and optimizers from a checkpoint; of sharded ones, this rank's part."""
        if self.parallel.mesh is None:
            load_model(self.model, read_tensors(checkpoint, "model"))
            if not optimizers:
                return
            found = read_tensors(checkpoint, "optimizer")
            load_optimizer_tensors(self.model, self.optimizers, found)
            return
        load_shards(tensor_folder(checkpoint, "model"), model_tensors(self.model))
        if not optimizers:
            return
        folder = tensor_folder(checkpoint, "optimizer")
        forms = {name: form for name, form in forms_in(folder).items() if is_optimizer_name(name)}
        load_shards(folder, make_room(self.model, self.optimizers, forms))

    def _hold_folder(self) -> None:
        """Lock the run folder, on one rank for all; do nothing if this trainer has locked it."""
        if self._holds_folder:
            return
        error: RunError | OSError | None = None
        if self.parallel.is_main:
            try:
                self._lock = self.run.lock()
            except (RunError, OSError) as found:
                error = found
        (failed,) = self.parallel.mean([float(error is not None)])
        if failed:
            raise error or self.run.in_use()
        self._holds_folder = True

    def _leave_folder(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock, self._holds_folder = None, False

    def _agree(self, stop: bool) -> None:
        """Note whether any rank stops; the clock is the mean of all, so that all see the same."""
        stopping, self.elapsed_seconds = self.parallel.mean([float(stop), self.elapsed_seconds])
        self._stopping, self._seconds = stopping > 0, self.elapsed_seconds

    @property
    def _has_tokenizer(self) -> bool:
        return self.run.config.tokenizer is not None

    def _bytes_read(self, state: RunState) -> float:
        if state.bytes_read is not None:
            return state.bytes_read
        return float(state.step * self.run.config.batch_size * self.run.config.model.context)

    def _scored(
        self, windows: torch.Tensor, begins: list[torch.Tensor] | None
    ) -> tuple[int, float]:
        """How many tokens of windows are predicted, and how many bytes these stand for."""
        targets = windows[:, 1:]
        left_out = [
            row[at - 1] for row, at in zip(targets, begins or (), strict=begins is not None)
        ]
        missing = torch.cat(left_out) if left_out else targets[:0]
        counted = self.corpus.bytes_in(targets) - self.corpus.bytes_in(missing)
        return targets.numel() - missing.numel(), counted

    def _draw(self, step: int) -> Drawn:
        """This rank's part of the batch of a step."""
        config = self.run.config
        data = self.corpus.train
        offsets, context = offsets_of(config, len(data), step)
        windows = gather_windows(data, offsets, context + 1)
        begins = self._document_starts(offsets, context)
        rows = config.micro_batch_size
        if rows is not None:
            rows *= len(offsets) // config.batch_size
        tokens, scored_bytes = self._scored(windows, begins)
        # The pages of the map that were read count as memory of this process until it lets go.
        self._touched += len(offsets) * ((context + 1) * data.element_size() + _AROUND)
        if self._touched > _MOST_TOUCHED:
            self.corpus.drop_pages()
            self._touched = 0
        return Drawn(
            self.parallel.shares(windows, rows, begins),
            self.corpus.bytes_in(windows[:, 1:]),
            tokens / max(1.0, scored_bytes),
        )

    def _document_starts(
        self, offsets: torch.Tensor, context: int, *, held_out: bool = False
    ) -> list[torch.Tensor] | None:
        """Where separate documents begin in windows of a context; None where they are joined."""
        if self.run.config.documents == "joined":
            return None
        offsets = offsets + len(self.corpus.train) if held_out else offsets
        return document_starts(self.corpus.ends, offsets, context + 1)

    def _take_step(self) -> _Launched:
        """Have the device take a step, and do not wait for it."""
        config, device = self.run.config, self.parallel.device
        torch.manual_seed(step_seed(config.seed, self.step, self.parallel.dropout_purpose))
        factor = learning_rate_factor(config, self.step, self.progress)
        rate = config.learning_rate * factor
        set_learning_rate(self.optimizers, rate)
        shares, bytes_read, tokens_per_byte = self._shares.get(self._draw, self.step)
        losses = []
        for index, share in enumerate(shares, start=1):
            with self.parallel.gathering(self._loss, last=index == len(shares)):
                with autocast(device, config.dtype):
                    loss = self._loss(*share.to(device)) / share.divisor
                loss.backward()
            losses.append(loss.detach())
        norm = self.parallel.clip_gradients(self.model, config.gradient_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.bytes_read += bytes_read
        nats = torch.stack(losses).sum()
        numbers = torch.stack([nats, norm.to(nats)])
        return _Launched(self.step, rate, numbers, self.bytes_read, tokens_per_byte)

    def _read(self, pending: _Pending) -> StepMetrics:
        """The numbers of a step, once they are here; what the ranks agreed on with it is noted."""
        nats, norm, stopping, self.elapsed_seconds = pending.numbers.numbers()
        self._stopping |= stopping > 0
        config = self.run.config
        step, rate, _, bytes_read, tokens_per_byte = pending.launched
        if not math.isfinite(nats):
            raise RunError(
                f"the loss became {nats} at step {step}; the last checkpoint is kept. "
                "Try a lower learning rate."
            )
        return StepMetrics(
            step=step,
            loss=nats,
            bits_per_byte=nats / math.log(2) * tokens_per_byte,
            learning_rate=rate,
            gradient_norm=norm,
            bytes_read=round(bytes_read),
            elapsed_seconds=self.elapsed_seconds,
            progress=self._progress(step),
            tokens_read=step * config.batch_size * config.model.context
            if self._has_tokenizer
            else None,
        )
