"""Training on several processes: which share of a batch each has, and what they do together.

The processes form a mesh of (data, sequence): a row of the mesh shares the sequences of one part of
the batch, each rank with a contiguous part of every sequence. Gradients are averaged over all of
them, so that a step is the step that one process would have taken with the whole batch. The weights
are on every rank (DistributedDataParallel), or each rank has a part of them (FSDP2).
"""

# Shapes: B batch, N length; b and n are those of a share.

import json
import math
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from dilated_core import DilatedAttention
from dilated_core.extending import let_gloo_rest, let_gloo_rest_at_exit
from dilated_factory.configs.models import TrainConfig
from dilated_factory.errors import InputError, RunError, missing_package
from dilated_factory.models.head_loss import IGNORED
from dilated_factory.models.layers import AttentionFactory
from dilated_factory.models.longnet import LongNetLM, document_positions
from dilated_factory.training.precision import Float32Attention

DataParallel = Literal["ddp", "fsdp"]

_MEETING_SECONDS = 600.0  # for the processes of all nodes to start
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


class Share(NamedTuple):
    """The part of a batch that one rank computes.

    Attributes:
        tokens: (b, n) int64; (1, b * n) where documents are separate.
        targets: as tokens, what to predict at each token.
        positions: (n,) or (b * n,) int64, where the tokens are in their sequences or documents.
        cu_seqlens: (S + 1,) int32, where separate documents end; of the whole sequence, where ranks
            share it. None where documents are joined.
        divisor: how many times the targets of all ranks' shares with it are in all of the batch.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor | None = None
    divisor: float = 1.0

    def to(self, device: torch.device) -> tuple[Tensor | None, ...]:
        """The arguments of a loss on a device, which need not have them when this returns."""
        return tuple(x if x is None else x.to(device, non_blocking=True) for x in self[:4])


def require_shares(config: TrainConfig, data: int, sequence: int) -> None:
    """Refuse a configuration that cannot be shared out evenly.

    Args:
        config: of the run.
        data: parts of its batch.
        sequence: parts of each sequence.

    Raises:
        InputError: the batch or the context cannot be divided.
    """
    if config.batch_size % data:
        raise InputError(
            "batch_size must be a multiple of the processes that share it "
            f"({data}). Got {config.batch_size}."
        )
    if config.micro_batch_size and config.batch_size // data % config.micro_batch_size:
        raise InputError(
            "micro_batch_size must divide the sequences of a process "
            f"({config.batch_size // data}). Got {config.micro_batch_size}."
        )
    for name, length in ("context", config.model.context), ("short_context", config.short_context):
        if (length or 0) % sequence:
            raise InputError(
                f"{name} must be a multiple of --sequence-parallel ({sequence}). Got {length}."
            )


@dataclass(frozen=True)
class Parallel:
    """The processes that train together; by default this one alone.

    Attributes:
        device: where this rank computes.
        mesh: of two dimensions, (data, sequence), or None where there is one process.
        data_parallel: "ddp" has all weights on every rank, "fsdp" a part of them; of several.
    """

    device: torch.device
    mesh: DeviceMesh | None = None
    data_parallel: DataParallel = "ddp"

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run folder and talks."""
        return self.mesh is None or dist.get_rank() == 0

    @property
    def is_sharded(self) -> bool:
        """Whether this rank has a part of each weight only."""
        return self.mesh is not None and self.data_parallel == "fsdp"

    def require_fit(self, config: TrainConfig) -> None:
        """Refuse a configuration that cannot be shared out evenly: as `require_shares`."""
        require_shares(config, *self._sizes)

    def attention(self, config: TrainConfig) -> AttentionFactory | None:
        """What makes the attention of a layer; None if it is the model's own.

        Raises:
            MissingPackageError: sequences are shared, and dilated-ring is not installed.
        """
        make = self._ring_attention(config) if self.shares_sequences else None
        if self.device.type != "cpu" or config.dtype == "float32":
            return make
        pattern, dropout = config.model.pattern, config.model.dropout
        inner = make or (lambda: DilatedAttention(pattern, dropout=dropout))
        return lambda: Float32Attention(inner())

    def _ring_attention(self, config: TrainConfig) -> AttentionFactory:
        try:
            from dilated_ring import RingDilatedAttention
        except ImportError:
            raise missing_package("--sequence-parallel", "dilated-ring") from None
        assert self.mesh is not None
        pattern, dropout = config.model.pattern, config.model.dropout
        group = self.mesh["sequence"]
        return lambda: RingDilatedAttention(pattern, dropout=dropout, group=group)

    def loss_of(self, model: LongNetLM) -> nn.Module:
        """Move a model here; return a module that takes a `Share` and returns its mean loss.

        Its backward averages gradients over the ranks. Where the weights are sharded, the model's
        parameters are others afterwards (DTensors): make optimizers later.
        """
        loss = _Loss(model, None if self.mesh is None else dist.group.WORLD)
        if self.is_sharded:
            # To import DTensors takes half as long as to import torch; other training needs none.
            from dilated_factory.training.sharded import shard_weights

            # Ranks that share a sequence have the same weights too, so all ranks divide them.
            all_ranks = init_device_mesh(self.device.type, (dist.get_world_size(),))
            shard_weights(loss, model.blocks, all_ranks)
            return loss
        loss.to(self.device)
        return loss if self.mesh is None else DistributedDataParallel(loss)

    def clip_gradients(self, model: LongNetLM, limit: float) -> Tensor:
        """Scale all gradients down to a norm of at most `limit`; return the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        if self.is_sharded:
            from dilated_factory.training.sharded import whole

            norm = whole(norm)
        return norm

    def gathering(self, loss: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Within it, backward adds to gradients; only with the last of a step are they averaged.

        Parts of weights are averaged each time, since whole gradients would not fit.
        """
        if last or not isinstance(loss, DistributedDataParallel):
            return nullcontext()
        return loss.no_sync()

    def shares(
        self, windows: Tensor, rows: int | None = None, starts: Sequence[Tensor] | None = None
    ) -> list[Share]:
        """This rank's part of the windows (B, N + 1) of a step, so many rows at a time.

        With ``starts``, where documents begin in each window, none sees another, and ranks that
        share sequences have one at a time.
        """
        mine = self._share(windows)
        size = len(mine.tokens) if rows is None else rows
        if starts is not None:
            return self._separate(windows, starts, 1 if self.shares_sequences else size)
        parts = list(zip(mine.tokens.split(size), mine.targets.split(size), strict=True))
        return [
            Share(self._pinned(x), self._pinned(y), mine.positions, None, len(parts))
            for x, y in parts
        ]

    def _separate(self, windows: Tensor, starts: Sequence[Tensor], size: int) -> list[Share]:
        """As `shares`; the first token of a document is no target."""
        (batch, length), (data, sequence) = windows.shape, self._sizes
        length -= 1
        targets = windows[:, 1:].clone()
        for row, begins in zip(targets, starts, strict=True):
            row[begins - 1] = IGNORED
        counts = (targets != IGNORED).sum(1).reshape(data, -1, size).sum((0, 2)).tolist()
        row, column = self._place
        n, first = length // sequence, row * batch // data
        span = slice(column * n, (column + 1) * n)
        shares = []
        for i, count in enumerate(counts):
            rows = range(first + i * size, first + (i + 1) * size)
            ends = [
                torch.cat([begins[begins < length], begins.new_tensor([length])]) + j * length
                for j, begins in enumerate(starts[rows.start : rows.stop])
            ]
            cu_seqlens = torch.cat([ends[0].new_zeros(1), *ends])
            positions = document_positions(cu_seqlens, size * length).reshape(size, length)
            tensors = (
                windows[rows.start : rows.stop, :-1][:, span], targets[rows.start : rows.stop, span]
            )  # fmt: skip
            tokens, wanted = (self._pinned(x.reshape(1, -1)) for x in tensors)
            where = self._pinned(positions[:, span].flatten())
            whole = self._pinned(cu_seqlens.to(torch.int32))
            shares.append(Share(tokens, wanted, where, whole, max(1, sum(counts)) / max(1, count)))
        return shares

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous().pin_memory() if self.device.type == "cuda" else tensor

    def _share(self, windows: Tensor) -> Share:
        (batch, length), (row, column) = windows.shape, self._place
        data, sequence = self._sizes
        rows = slice(row * batch // data, (row + 1) * batch // data)
        n = (length - 1) // sequence
        start = column * n
        return Share(
            windows[rows, start : start + n],
            windows[rows, start + 1 : start + n + 1],
            self._pinned(torch.arange(start, start + n)),
        )

    def average(self, numbers: Tensor, mine: Sequence[float]) -> Tensor:
        """The mean over the ranks of numbers on the device and of others, without waiting for it.

        Args:
            numbers: (n,) on the device.
            mine: of this rank's host.

        Returns:
            (n + len(mine),) on the device, in float64 where it has that.
        """
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        own = self._pinned(torch.tensor(mine, dtype=wide)).to(self.device, non_blocking=True)
        total = torch.cat([numbers.to(wide), own])
        if self.mesh is not None:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        return total

    def mean(self, numbers: Sequence[float]) -> list[float]:
        """The mean of each number over the ranks: the same on all of them."""
        if self.mesh is None:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        means: list[float] = (total / dist.get_world_size()).tolist()
        return means

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.mean([0.0])

    def require_same(self, name: str, digest: str) -> None:
        """Refuse to train where ranks have read different data.

        Args:
            name: what it is.
            digest: hexadecimal digits that depend on it.

        Raises:
            RunError: on all ranks, if the digest differs between them.
        """
        number = float(int(digest[:10], 16))  # 40 bits: their sum over ranks is exact in float64
        (mean,) = self.mean([number])
        (deviation,) = self.mean([abs(number - mean)])
        if deviation:
            raise RunError(f"the {name} must be the same on all ranks. It is not.")

    @property
    def dropout_purpose(self) -> str:
        """Names the random numbers of this rank's dropout."""
        row, column = self._place
        return "dropout" if self.mesh is None else f"dropout/{row}/{column}"

    @property
    def ranks(self) -> int:
        """How many processes train together."""
        return math.prod(self._sizes)

    @property
    def data_ranks(self) -> int:
        """How many parts a batch has."""
        return self._sizes[0]

    @property
    def shares_sequences(self) -> bool:
        """Whether a sequence is on several ranks."""
        return self._sizes[1] > 1

    @property
    def _sizes(self) -> tuple[int, int]:
        """How many ranks share a batch, and how many a sequence."""
        return (1, 1) if self.mesh is None else (self.mesh.size(0), self.mesh.size(1))

    @property
    def _place(self) -> tuple[int, int]:
        """Which part of the batch, and of its sequences, is this rank's."""
        if self.mesh is None:
            return 0, 0
        return self.mesh.get_local_rank(0), self.mesh.get_local_rank(1)


class _Loss(nn.Module):
    """`LongNetLM.loss` as a forward, which is what DistributedDataParallel wraps."""

    def __init__(self, model: LongNetLM, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.model, self.group = model, group

    def forward(
        self, tokens: Tensor, targets: Tensor, positions: Tensor, cu_seqlens: Tensor | None
    ) -> Tensor:
        return self.model.loss(
            tokens, targets, positions=positions, cu_seqlens=cu_seqlens, group=self.group
        )


def join(
    device: torch.device, *, sequence_parallel: int = 1, data_parallel: DataParallel = "ddp"
) -> Parallel:
    """Train with the other processes that `torchrun` started, if it started this one.

    Args:
        device: where to compute; of several CUDA devices each process takes its own.
        sequence_parallel: how many ranks share each sequence; the others share the batch.
        data_parallel: "ddp" to have all weights on every rank, "fsdp" to have a part on each.

    Raises:
        InputError: the processes cannot be divided so, or there is only one.
    """
    if data_parallel not in get_args(DataParallel):
        raise InputError(f"data_parallel must be 'ddp' or 'fsdp'. Got {data_parallel!r}.")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if sequence_parallel > 1 and world_size == 1:
        raise InputError(
            f"--sequence-parallel {sequence_parallel} needs as many processes: "
            f"torchrun --nproc-per-node {sequence_parallel} -m dilated_factory train ..."
        )
    if data_parallel == "fsdp" and world_size == 1:
        raise InputError(
            "--data-parallel fsdp needs several processes to divide the weights among: "
            "torchrun --nproc-per-node 2 -m dilated_factory train ..."
        )
    if world_size % sequence_parallel:
        raise InputError(
            f"--sequence-parallel must divide the number of processes ({world_size}). "
            f"Got {sequence_parallel}."
        )
    if world_size == 1:
        return Parallel(device)
    if device.type not in _BACKENDS:
        raise InputError(f"device must be cpu or cuda on several processes. Got {device.type!r}.")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    let_gloo_rest_at_exit()
    if not dist.is_initialized():
        store, rank, _ = next(iter(rendezvous("env://")))
        dist.init_process_group(
            _BACKENDS[device.type],
            store=PrefixStore(_name_of_attempt(store, rank, world_size), store),
            rank=rank,
            world_size=world_size,
            device_id=device if device.type == "cuda" else None,
        )
    shape = (world_size // sequence_parallel, sequence_parallel)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "sequence"))
    return Parallel(device, mesh, data_parallel)


def _name_of_attempt(store: Store, rank: int, world_size: int) -> str:
    """A name that all processes of this attempt share, and no earlier attempt had.

    `torchrun` keeps its store when it restarts the processes, and they would find in it the
    addresses of those that are gone. It does not number the attempts alike on all nodes.
    """
    me = uuid.uuid4().hex
    greetings = [f"dilated/greeting/{r}" for r in range(world_size)]
    store.set(greetings[rank], me)
    deadline = time.monotonic() + _MEETING_SECONDS
    while time.monotonic() < deadline:
        if rank == 0:
            answers = [f"dilated/answer/{me}/{r}" for r in range(1, world_size)]
            if store.check(answers):
                return me
            if store.check(greetings):
                # Some may be of processes that are gone: repeated until the present ones answer.
                present = [store.get(greeting).decode() for greeting in greetings]
                store.set("dilated/present", json.dumps(present))
        elif store.check(["dilated/present"]):
            present = json.loads(store.get("dilated/present"))
            if len(present) == world_size and present[rank] == me:
                store.set(f"dilated/answer/{present[0]}/{rank}", "here")
                return str(present[0])
        time.sleep(0.02)
    raise TimeoutError(f"rank {rank} did not meet the other {world_size - 1} processes in time.")


def leave() -> None:
    """End the process group of a training that went well."""
    if dist.is_available() and dist.is_initialized():
        let_gloo_rest()
        dist.destroy_process_group()


def was_restarted() -> bool:
    """Whether `torchrun --max-restarts` started this process in place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
