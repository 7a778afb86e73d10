"""The training loop: step, record, checkpoint, stop or resume, always from the same state."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from torch.optim import Optimizer

from dilated_factory.configs.models import TrainConfig
from dilated_factory.errors import InputError, RunError
from dilated_factory.models.layers import AttentionFactory
from dilated_factory.models.longnet import LongNetLM
from dilated_factory.training.batches import batch_offsets, gather_windows, step_seed
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
from dilated_factory.training.parallel import Parallel
from dilated_factory.training.run_folder import RunFolder, RunState, read_tensors, tensor_folder
from dilated_factory.training.schedule import learning_rate_factor
from dilated_factory.training.shards import forms_in, load_shards, save_shards


@dataclass(frozen=True)
class StepMetrics:
    """What one step did; ``step`` counts from 1. A line of metrics.jsonl."""

    step: int
    loss: float  # nats per byte
    bits_per_byte: float
    learning_rate: float
    gradient_norm: float  # before clipping
    bytes_read: int  # in all steps so far
    elapsed_seconds: float  # of training so far
    progress: float  # share of the run that is done, 0 to 1


def select_device(name: str) -> torch.device:
    """The device of that name, if this machine has it.

    Raises:
        InputError: the name is unknown to torch, or the device is absent.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
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
        checkpoint_every: steps between checkpoints, the most that a killed run loses.
    """

    def __init__(
        self,
        run: RunFolder,
        corpus: Corpus,
        *,
        parallel: Parallel = ALONE,
        checkpoint_every: int = 100,
    ) -> None:
        if checkpoint_every < 1:
            raise ValueError(f"checkpoint_every must be at least 1. Got {checkpoint_every}.")
        self.run = run
        self.corpus = corpus
        self.parallel = parallel
        self.checkpoint_every = checkpoint_every
        self.step = 0
        self.elapsed_seconds = 0.0
        parallel.require_fit(run.config)
        parallel.require_same("corpus", corpus.digest)
        self.model = initial_model(run.config, parallel.attention(run.config))
        self._loss = parallel.loss_of(self.model)
        self.optimizers: list[Optimizer] = build_optimizers(
            self.model, run.config, sharded=parallel.is_sharded
        )
        self._holds_folder = False
        self._lock: FolderLock | None = None  # on the main rank

    @classmethod
    def start(
        cls,
        path: str | Path,
        config: TrainConfig,
        corpus: Corpus,
        *,
        parallel: Parallel = ALONE,
        checkpoint_every: int = 100,
    ) -> Self:
        """Make a run folder and a trainer at step 0; nothing is written if the input is unfit.

        Raises:
            RunError: something is already at ``path``.
            InputError: the processes cannot share the batch and its sequences.
            CorpusError: the corpus is shorter than the context.
        """
        first_batch = batch_offsets(
            len(corpus.train),
            context=config.model.context,
            batch_size=config.batch_size,
            seed=config.seed,
            step=0,
        )
        assert len(first_batch) == config.batch_size
        parallel.require_fit(config)
        RunFolder.require_new(path)
        parallel.barrier()
        if parallel.is_main:
            RunFolder.create(path, config)
        parallel.barrier()
        run = RunFolder.open(path)
        trainer = cls(run, corpus, parallel=parallel, checkpoint_every=checkpoint_every)
        trainer._hold_folder()
        return trainer

    def restore(self) -> None:
        """Go back to the newest checkpoint of the run, or to the start if it has none.

        Raises:
            RunError: the checkpoint is damaged, the corpus is not the one it was trained on, or
                another process trains in the folder.
        """
        self._hold_folder()
        try:
            self._go_back()
        except BaseException:
            self._leave_folder()
            raise

    def _go_back(self) -> None:
        self.step = 0
        if self.run.checkpoints():
            folder, state = self.run.newest()
            if state.corpus_digest != self.corpus.digest:
                raise RunError("the corpus has changed since this run was started.")
            self._load(folder)
            self.step, self.elapsed_seconds = state.step, state.elapsed_seconds
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
        """
        self._hold_folder()
        self.model.train()
        device = self.parallel.device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                while not self._agree(should_stop()) and self.progress < 1:
                    metrics = self._take_step()
                    if self.parallel.is_main:
                        self.run.append_metrics(asdict(metrics))
                    on_step(metrics)
                    if self.step % self.checkpoint_every == 0:
                        self.save()
            self.save()
        finally:
            self._leave_folder()
        return self.progress >= 1

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps or by the clock."""
        config = self.run.config
        if config.steps is not None:
            return self.step / config.steps
        assert config.minutes is not None
        return min(self.elapsed_seconds / (60 * config.minutes), 1.0)

    def save(self) -> Path:
        """Write a checkpoint of the present state."""
        state = RunState(
            step=self.step,
            elapsed_seconds=self.elapsed_seconds,
            corpus_digest=self.corpus.digest,
        )
        model, optimizer = model_tensors(self.model), optimizer_tensors(self.model, self.optimizers)
        if self.parallel.mesh is None:
            self.run.sync_metrics()
            return self.run.save(model, optimizer, state)
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
        return self.run.checkpoints()[-1]

    def _load(self, checkpoint: Path) -> None:
        """Fill model and optimizers from a checkpoint; of sharded ones, this rank's part."""
        if self.parallel.mesh is None:
            load_model(self.model, read_tensors(checkpoint, "model"))
            found = read_tensors(checkpoint, "optimizer")
            load_optimizer_tensors(self.model, self.optimizers, found)
            return
        load_shards(tensor_folder(checkpoint, "model"), model_tensors(self.model))
        folder = tensor_folder(checkpoint, "optimizer")
        forms = {name: form for name, form in forms_in(folder).items() if is_optimizer_name(name)}
        load_shards(folder, make_room(self.model, self.optimizers, forms))

    def _hold_folder(self) -> None:
        """Lock the run folder, on one rank for all; do nothing if this trainer has locked it."""
        if self._holds_folder:
            return
        error: RunError | None = None
        if self.parallel.is_main:
            try:
                self._lock = self.run.lock()
            except RunError as found:
                error = found
        (failed,) = self.parallel.mean([float(error is not None)])
        if failed:
            raise error or self.run.in_use()
        self._holds_folder = True

    def _leave_folder(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock, self._holds_folder = None, False

    def _agree(self, stop: bool) -> bool:
        """Whether any rank stops; the clock is the mean of all, so that all see the same."""
        stopping, self.elapsed_seconds = self.parallel.mean([float(stop), self.elapsed_seconds])
        return stopping > 0

    def _draw_offsets(self) -> torch.Tensor:
        config = self.run.config
        return batch_offsets(
            len(self.corpus.train),
            context=config.model.context,
            batch_size=config.batch_size,
            seed=config.seed,
            step=self.step,
        )

    def _take_step(self) -> StepMetrics:
        started = time.perf_counter()
        config = self.run.config
        torch.manual_seed(step_seed(config.seed, self.step, self.parallel.dropout_purpose))
        rate = config.learning_rate * learning_rate_factor(self.progress, config.warmup)
        set_learning_rate(self.optimizers, rate)
        windows = gather_windows(self.corpus.train, self._draw_offsets(), config.model.context + 1)
        with autocast(self.parallel.device, config.dtype):
            loss = self._loss(*self.parallel.share(windows))
        (nats,) = self.parallel.mean([loss.item()])
        if not math.isfinite(nats):
            raise RunError(
                f"the loss became {nats} at step {self.step + 1}; the last checkpoint is kept. "
                "Try a lower learning rate."
            )
        loss.backward()
        norm = self.parallel.clip_gradients(self.model, config.gradient_clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.elapsed_seconds += time.perf_counter() - started
        return StepMetrics(
            step=self.step,
            loss=nats,
            bits_per_byte=nats / math.log(2),
            learning_rate=rate,
            gradient_norm=norm,
            bytes_read=self.step * config.batch_size * config.model.context,
            elapsed_seconds=self.elapsed_seconds,
            progress=self.progress,
        )


def initial_model(config: TrainConfig, attention: AttentionFactory | None = None) -> LongNetLM:
    """The model at step 0, on the CPU: the seed alone decides its weights."""
    with torch.random.fork_rng([]):
        torch.manual_seed(step_seed(config.seed, 0, "weights"))
        return LongNetLM(config.model, attention=attention)


def model_tensors(model: LongNetLM) -> dict[str, torch.Tensor]:
    """The state of a model by name, with a tied head left out: files hold each tensor once."""
    tensors = model.state_dict()
    if model.config.tie_embeddings:
        del tensors["head.weight"]
    return tensors


def load_model(model: LongNetLM, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the weights of a checkpoint into a model of the same configuration."""
    tensors = dict(tensors)
    if model.config.tie_embeddings and "embedding.weight" in tensors:
        tensors["head.weight"] = tensors["embedding.weight"]
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RunError(f"the checkpoint does not fit its configuration: {reason}") from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise RunError(f"the weights of the checkpoint must be finite. Got others in {name}.")


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Mixed precision on a device; nothing changes for "float32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
