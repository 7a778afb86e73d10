"""What ranks run in the tests of training on several processes."""

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dilated_core import DilatedPattern
from dilated_factory.configs.models import LongNetConfig, TrainConfig
from dilated_factory.corpora.tokens import load_tokenizer
from dilated_factory.models.longnet import LongNetLM
from dilated_factory.training.corpus import load_corpus
from dilated_factory.training.loop import StepMetrics, Trainer
from dilated_factory.training.parallel import DataParallel, Parallel, join
from dilated_factory.training.run_folder import RunFolder
from dilated_factory.training.sharded import ShardedMuon, shard_weights, whole
from dilated_ring import RingDilatedAttention, local_positions
from process_ranks import device


def train(
    path: Path,
    config: TrainConfig,
    sequence_parallel: int,
    stop_at: int | None = None,
    data_parallel: DataParallel = "ddp",
) -> list[float]:
    """Train on all ranks, from the newest checkpoint if there is one; return the losses."""
    trainer = _trainer(path, config, sequence_parallel, data_parallel)
    return _losses(trainer, stop_at)


def train_exactly(
    path: Path,
    config: TrainConfig,
    sequence_parallel: int,
    data_parallel: DataParallel = "ddp",
    stop_at: int | None = None,
) -> list[float]:
    """Train in float64 with an optimizer that does not amplify rounding; return the losses."""
    torch.set_default_dtype(torch.float64)
    try:
        trainer = _trainer(path, config, sequence_parallel, data_parallel, optimizer=_sgd)
        return _losses(trainer, stop_at)
    finally:
        torch.set_default_dtype(torch.float32)


SMOOTHING = 0.1  # of labels
CAUSAL = DilatedPattern([4, 24], [1, 2])
LM = LongNetConfig(
    vocab_size=23, embed_dim=16, num_heads=2, num_layers=2, segment_lengths=CAUSAL.segment_lengths,
    dilation_rates=CAUSAL.dilation_rates, context=24, positions="rotary",
)  # fmt: skip


class Shares(torch.nn.Module):
    """A model whose loss is taken over the targets of all ranks of a group, or of this one."""

    def __init__(self, *, ring: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        attention = (lambda: RingDilatedAttention(CAUSAL)) if ring else None
        self.model, self.group = LongNetLM(LM, attention=attention), None
        if ring:
            self.group = dist.group.WORLD

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        positions: torch.Tensor,
        ends: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Its loss."""
        return self.model.loss(
            tokens, targets, positions=positions, group=self.group, cu_seqlens=ends,
            label_smoothing=SMOOTHING,
        )  # fmt: skip


def train_shares(
    tokens: torch.Tensor,
    targets: torch.Tensor,
    data_parallel: DataParallel,
    ends: torch.Tensor | None = None,
) -> tuple[float, list[torch.Tensor]]:
    """This rank's share of the loss, and the gradients averaged over ranks, whole."""
    torch.set_default_dtype(torch.float64)
    try:
        shares: Any = Shares(ring=True)
    finally:
        torch.set_default_dtype(torch.float32)
    parameters = list(shares.parameters())
    if data_parallel == "fsdp":
        shard_weights(
            shares, shares.model.blocks, init_device_mesh("cpu", (dist.get_world_size(),))
        )
        parameters = list(shares.parameters())
    elif dist.get_world_size() > 1:
        shares = DistributedDataParallel(shares)
    n = tokens.shape[1] // dist.get_world_size()
    here = torch.arange(n * dist.get_rank(), n * dist.get_rank() + n)
    positions = local_positions(n, cu_seqlens=ends)
    loss = shares(tokens[:, here], targets[:, here], positions, ends)
    loss.backward()
    grads = [parameter.grad for parameter in parameters]
    return loss.item(), [whole(x) if isinstance(x, DTensor) else x for x in grads]


def _traced_by(compile: Callable[..., Any]) -> Callable[..., Any]:
    """A torch.compile that makes graphs as for the compiler, and runs them as they are."""
    return lambda call, **_: compile(call, backend="aot_eager")


def train_traced(path: Path, config: TrainConfig, data_parallel: DataParallel) -> list[float]:
    """Train with blocks that are traced as for the compiler and run as they are, in float32."""
    torch._dynamo.reset()
    with mock.patch.object(torch, "compile", _traced_by(torch.compile)):
        trainer = _trainer(path, config, 1, data_parallel, compiled=True)
    graphs = counters["stats"]
    graphs.clear()
    seen: list[int] = []
    losses: list[float] = []

    def note(metrics: StepMetrics) -> None:
        losses.append(metrics.loss)
        seen.append(graphs["unique_graphs"])

    trainer.train(on_step=note)
    assert seen[0] > 0
    # The first step of FSDP makes its parameters; from the second one on nothing is traced again.
    assert seen[1:] == [seen[1]] * (len(seen) - 1), seen
    return losses


def _sgd(trainer: Trainer) -> None:
    trainer.optimizers = [torch.optim.SGD(trainer.model.parameters(), momentum=0.9)]


@dataclass(frozen=True)
class Held:
    """Bytes that this rank holds of the parameters and of the state of the optimizers."""

    parameters: int
    state: int


def held(path: Path, config: TrainConfig, data_parallel: DataParallel) -> Held:
    """Train, and tell what this rank holds afterwards."""
    trainer = _trainer(path, config, 1, data_parallel)
    _losses(trainer, None)
    state = [
        value
        for optimizer in trainer.optimizers
        for values in optimizer.state.values()
        for value in values.values()
    ]
    return Held(_bytes(trainer.model.parameters()), _bytes(state))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    here = (x.to_local() if isinstance(x, DTensor) else x for x in tensors)
    return sum(x.nbytes for x in here)


def _trainer(
    path: Path,
    config: TrainConfig,
    sequence_parallel: int,
    data_parallel: DataParallel,
    *,
    optimizer: Callable[[Trainer], None] = lambda trainer: None,
    compiled: bool = False,
) -> Trainer:
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    parallel = join(device(), sequence_parallel=sequence_parallel, data_parallel=data_parallel)
    corpus = load_corpus(
        config.paths,
        validation_fraction=config.validation_fraction,
        tokenizer=load_tokenizer(config.tokenizer),
    )
    if not (path / "config.json").exists():
        trainer = Trainer.start(path, config, corpus, parallel=parallel, compiled=compiled)
        optimizer(trainer)
        return trainer
    trainer = Trainer(RunFolder.open(path), corpus, parallel=parallel)
    optimizer(trainer)
    trainer.restore()
    return trainer


def _losses(trainer: Trainer, stop_at: int | None) -> list[float]:
    losses: list[float] = []
    # Only the last rank asks to stop, and all do.
    last = dist.get_rank() == dist.get_world_size() - 1
    trainer.train(
        on_step=lambda metrics: losses.append(metrics.loss),
        should_stop=lambda: last and trainer.step == stop_at,
    )
    return losses


def digest_of_rows(shards: Path, cache: Path) -> str:
    """The digest of a corpus of rows that all ranks put into the cache at once."""
    return load_corpus([shards], text_field="text", cache=cache, split="document").digest


def compare_digests(digests: list[str]) -> None:
    """Compare what each rank has read."""
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    join(device()).require_same("corpus", digests[dist.get_rank()])


def muon_is_the_same(shape: tuple[int, int], nesterov: bool) -> bool:
    """Whether Muon gives a matrix the same bits in parts as whole, its momentum too."""
    generator = torch.Generator().manual_seed(3)
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    start, *grads = (torch.randn(shape, generator=generator).to(device()) for _ in range(4))
    parts = torch.nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
    one = torch.nn.Parameter(start.clone())
    options: dict[str, Any] = {"lr": 0.02, "nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = ShardedMuon([parts], **options), torch.optim.Muon([one], **options)
    for grad in grads:
        parts.grad, one.grad = distribute_tensor(grad, mesh, [Shard(0)]), grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    (sharded,), (expected,) = (list(optimizer.state.values()) for optimizer in optimizers)
    momentum = sharded["momentum_buffer"]
    assert momentum.placements == (Shard(0),)
    pairs = (parts.detach(), one), (momentum, expected["momentum_buffer"])
    return all(torch.equal(whole(found), wanted) for found, wanted in pairs)


def compiled_losses(
    config: TrainConfig, sequence_parallel: int, data_parallel: DataParallel, checkpointing: Any
) -> dict[str, Any]:
    """Losses of three steps in float64, eager and compiled, and how often the latter compiled."""
    warnings.simplefilter("ignore")  # the tracer hides its own in a way that errors get through
    torch._dynamo.reset()
    counters.clear()
    shape = (dist.get_world_size() // sequence_parallel, sequence_parallel)
    mesh = init_device_mesh(device().type, shape, mesh_dim_names=("data", "sequence"))
    parallel = Parallel(device(), mesh, data_parallel)
    found: dict[str, Any] = {}
    for kind in ("eager", "compiled"):
        torch.manual_seed(0)
        model = LongNetLM(config.model, attention=parallel.attention(config), dtype=torch.float64)
        model.activation_checkpointing = checkpointing
        if kind == "compiled":
            with mock.patch.object(torch, "compile", _traced_by(torch.compile)):
                model.compile_blocks()
        loss_of_share = parallel.loss_of(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            length = config.model.context + 1
            windows = torch.randint(256, (config.batch_size, length), generator=generator)
            (share,) = parallel.shares(windows)
            loss = loss_of_share(*share.to(parallel.device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(parallel.mean([loss.item()])[0])
            if step == 0:
                graphs = counters["stats"]["unique_graphs"]
        found[kind] = losses
    found["graphs"] = graphs
    found["more"] = counters["stats"]["unique_graphs"] - graphs
    return found
