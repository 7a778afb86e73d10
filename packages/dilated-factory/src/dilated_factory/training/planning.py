"""What training a model takes on each device, counted before anything is run: bytes, operations."""

# Shapes: T tokens that a rank has at once, E embed_dim, F hidden_dim, H heads, V vocab_size.

import importlib.util
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

from dilated_factory.configs.models import LongNetConfig, TrainConfig
from dilated_factory.errors import InputError, missing_package
from dilated_factory.models.head_loss import LOSS_BYTES
from dilated_factory.models.longnet import LongNetLM
from dilated_factory.models.norms import MOST_FEATURES
from dilated_factory.training.flops import attention_flops, model_flops
from dilated_factory.training.parallel import DataParallel, require_shares

Recomputed = Literal["none", "pointwise", "feed_forward", "all"]

_FLOAT, _INDEX = 4, 8  # bytes of float32 and int64
_MOMENTS = 8  # mean and deviation of a row that a norm keeps


class Setup(NamedTuple):
    """Where and how a configuration is trained.

    Attributes:
        device: "cuda" or "cpu".
        compiled: whether the blocks go through torch.compile.
        ranks: processes, one a device.
        sequence_parallel: how many of them share each sequence.
        data_parallel: "ddp" or "fsdp", where there are several.
    """

    device: Literal["cuda", "cpu"] = "cuda"
    compiled: bool = True
    ranks: int = 1
    sequence_parallel: int = 1
    data_parallel: DataParallel = "ddp"


ON_CUDA = Setup()


class WeightCounts(NamedTuple):
    """The weights of a model, without making it.

    Attributes:
        matrices: how many there are of each shape in the blocks; the optimizer of choice has them.
        others: the same of all other parameters, which AdamW has.
        layer: numbers in one block.
        head: numbers in the matrix of the head.
    """

    matrices: Counter[torch.Size]
    others: Counter[torch.Size]
    layer: int
    head: int

    @property
    def numbers(self) -> int:
        """Numbers in all."""
        return _numbers(self.matrices) + _numbers(self.others)


class Facts(NamedTuple):
    """What is the same however a model is trained on some ranks, and takes time to count.

    Attributes:
        weights: of the model.
        attention: operations of the forward of one layer's attention, for each token.
        held: bytes of other ranks' rows that a block keeps, for each sequence.
        messages: the most of such bytes that are on their way, for each sequence.
    """

    weights: WeightCounts
    attention: float
    held: int
    messages: int


@dataclass(frozen=True)
class TrainingNeeds:
    """What a rank needs for a step; all but the last four in bytes on its device.

    Attributes:
        weights: float32, or its part of them.
        optimizer: the state that Muon and AdamW keep.
        gradients: float32, as the weights.
        buckets: in which DistributedDataParallel averages gradients.
        whole: weights of the layers that are whole while they run, and their gradients; fsdp only.
        layers: what the blocks keep for backward, of one micro batch.
        ends: what embedding, last norm and loss keep.
        inputs: tokens, targets, positions, and the table that a position embedding makes of them.
        logits: those that exist at once, with their gradients.
        again: what backward makes anew in one block, and works with there.
        messages: rows of other ranks on their way, beside those that `layers` holds.
        update: what the optimizers work with.
        accumulates: whether gradients of earlier micro batches lie there when one begins.
        layer: of `layers`, the bytes of one block.
        parameters: numbers in the whole model.
        host_bytes: windows of this step and the next, in the memory of the host.
        flops: operations of the model in a step, of this rank; as `dilated train` counts them.
        flops_again: what is computed a second time, beside them.
    """

    weights: int
    optimizer: int
    gradients: int
    buckets: int
    whole: int
    layers: int
    ends: int
    inputs: int
    logits: int
    again: int
    messages: int
    update: int
    accumulates: bool
    layer: int
    parameters: int
    host_bytes: int
    flops: float
    flops_again: float

    @property
    def activations(self) -> int:
        """What backward needs of a forward."""
        return self.layers + self.ends

    @property
    def peak(self) -> int:
        """The most at once: with the loss, in the last block's or first block's backward, or after.

        An estimate: what lies between allocations and the device's own are not in it.
        """
        held = self.weights + self.optimizer + self.buckets
        running = held + self.inputs + self.whole
        before = running + (self.gradients if self.accumulates else 0)
        return max(
            before + self.activations + self.logits,
            before + self.layers + self.again + self.messages,
            running + self.gradients + self.layer + self.again + self.messages,
            held + self.gradients + self.update,
        )


def count_weights(shape: LongNetConfig) -> WeightCounts:
    """Count the weights of a model: one layer is made, on no device, and the others are like it."""
    one = LongNetLM(shape.model_copy(update={"num_layers": 1}), device="meta")
    layer = list(one.blocks.parameters())
    inside = {id(p) for p in layer}
    matrices, others = Counter[torch.Size](), Counter[torch.Size]()
    for parameter in one.parameters():
        is_block = id(parameter) in inside
        kind = matrices if is_block and parameter.ndim == 2 else others
        kind[parameter.shape] += shape.num_layers if is_block else 1
    return WeightCounts(matrices, others, sum(p.numel() for p in layer), one.head.weight.numel())


def count_facts(config: TrainConfig, setup: Setup) -> Facts:
    """Count what `plan_training` needs; only shape, dtype and ranks matter.

    Raises:
        InputError, MissingPackageError: as `plan_training`.
    """
    attention = attention_flops(config.model)
    return Facts(count_weights(config.model), attention, *_messages(config, setup))


def plan_training(
    config: TrainConfig, setup: Setup = ON_CUDA, facts: Facts | None = None
) -> TrainingNeeds:
    """Plan the training of a model.

    Args:
        config: of the run.
        setup: where it runs.
        facts: of `count_facts`, where they are known already.

    Raises:
        InputError: ranks cannot share the batch or its sequences.
        MissingPackageError: ranks share sequences, and dilated-ring is not installed.
    """
    shape = config.model
    data = _check(config, setup)
    facts = count_facts(config, setup) if facts is None else facts
    weights = facts.weights
    share = config.batch_size // data
    rows = config.micro_batch_size or share
    n = shape.context // setup.sequence_parallel
    tokens = rows * n
    kept = _SavedBytes(config, setup, tokens)
    parts = setup.ranks if setup.data_parallel == "fsdp" else 1
    own_matrices, own_others = (
        _numbers(kind, parts) for kind in (weights.matrices, weights.others)
    )
    own = _FLOAT * (own_matrices + own_others)
    counted = sum(weights.others.values())
    state = 2 * own_others * _FLOAT + _FLOAT * counted
    if config.optimizer == "muon":
        state += own_matrices * _FLOAT
    else:
        state += 2 * own_matrices * _FLOAT + _FLOAT * sum(weights.matrices.values())
    held = rows * facts.held
    layer = kept.layer(config.recompute) + (0 if config.recompute == "all" else held)
    again = kept.layer("none") - kept.layer(config.recompute)
    wide = max(kept.item, _FLOAT)
    chunk = min(tokens, max(1, LOSS_BYTES // (shape.vocab_size * wide)))
    narrow = 0 if kept.item == wide else kept.item
    # Their log-sum-exp takes as much again as they do.
    logits = chunk * (2 * shape.vocab_size * wide + shape.embed_dim * narrow)
    backward = tokens * shape.embed_dim * (2 * _FLOAT + narrow)
    step_tokens = config.batch_size * shape.context / setup.ranks
    matrix = weights.head + _numbers(weights.matrices)
    return TrainingNeeds(
        weights=own,
        optimizer=state,
        gradients=own,
        buckets=own if setup.ranks > 1 and parts == 1 else 0,
        # Two layers' weights, since the next comes while one runs; a gradient and its copy to send.
        whole=0 if parts == 1 else _FLOAT * (4 * weights.layer + weights.head),
        layers=layer * shape.num_layers,
        ends=kept.ends(),
        inputs=2 * _INDEX * tokens + _INDEX * n + kept.table(n),
        logits=max(logits + tokens * shape.embed_dim * _FLOAT, backward),
        again=again + kept.backward(),
        messages=rows * facts.messages + (held if config.recompute == "all" else 0),
        update=_update(config, weights, parts, setup.device),
        accumulates=rows < share,
        layer=layer,
        parameters=weights.numbers,
        host_bytes=2 * _INDEX * config.batch_size * (shape.context + 1),
        flops=step_tokens * model_flops(shape, matrix, facts.attention),
        flops_again=step_tokens
        * shape.num_layers
        * kept.operations(config.recompute, facts.attention),
    )


class Way(NamedTuple):
    """Options with which a training fits."""

    recompute: Recomputed
    micro_batch: int
    data_parallel: DataParallel
    needs: TrainingNeeds


def ways_to_fit(config: TrainConfig, setup: Setup, limit: int) -> Iterator[Way]:
    """Options that fit into so many bytes, those that compute least again first.

    Of each `recompute` the largest micro batch, with fsdp only where nothing fits without.
    """
    facts = count_facts(config, setup)
    share = config.batch_size // _check(config, setup)
    sizes = [share // part for part in _divisors(share)]
    kinds: list[DataParallel] = [setup.data_parallel]
    if setup.ranks > 1 and setup.data_parallel == "ddp":
        kinds.append("fsdp")
    for recompute in get_args(Recomputed):
        for kind, size in itertools.product(kinds, sizes):
            tried = config.model_copy(update={"recompute": recompute, "micro_batch_size": size})
            needs = plan_training(tried, setup._replace(data_parallel=kind), facts)
            if needs.peak <= limit:
                yield Way(recompute, size, kind, needs)
                break


@dataclass(frozen=True)
class _SavedBytes:
    """What one forward keeps for its backward, in bytes."""

    config: TrainConfig
    setup: Setup
    tokens: int

    @property
    def item(self) -> int:
        """Bytes of a number in products."""
        return 2 if self.config.dtype == "bfloat16" else _FLOAT

    def layer(self, recompute: Recomputed) -> int:
        """One block's; as tests count it, exact but for some bytes of random states."""
        shape, b, compiled = self.config.model, self.item, self.setup.compiled
        width, hidden = shape.embed_dim, shape.hidden_dim
        entering = _FLOAT * width
        if recompute == "all":
            return self.tokens * entering
        # On CPUs attention is float32, and its output is cast.
        upcast = self.setup.device == "cpu" and b == 2
        attention = 4 * (_FLOAT if upcast else b) * width + _FLOAT * shape.num_heads
        one_kernel = (
            self.setup.device == "cuda" and b == 2 and shape.activation == "gelu"
            and hidden <= MOST_FEATURES
        )  # fmt: skip
        part = 1 if compiled or self.setup.device == "cuda" else b
        dropped = width * part if shape.dropout else 0
        masks = dropped * (1 if recompute == "feed_forward" else 2)
        if compiled:
            row = entering + attention + b * width + masks
            if recompute == "pointwise":
                row += b * hidden
            elif recompute == "none":
                inner = _MOMENTS if one_kernel else 2 * b
                row += 3 * b * width + 2 * b * hidden + 2 * _MOMENTS + 2 * b + inner
        else:
            row = 2 * entering + attention + 2 * b * width + 2 * _MOMENTS + masks
            row += b * width if upcast else 0
            if self.setup.device == "cuda" and b == 2 and width > MOST_FEATURES:
                row += _FLOAT * width  # autocast widens what the norm behind attention takes
            if recompute != "feed_forward":
                row += b * width + _MOMENTS + 2 * b * hidden
            if recompute == "none":
                row += _MOMENTS + (b * hidden if shape.activation != "relu" else 0)
                row -= b * hidden if one_kernel else 0
        narrow = 4 * width**2 + (0 if recompute == "feed_forward" else 2 * width * hidden)
        seed = _INDEX if shape.dropout else 0
        return self.tokens * row + seed + (b * narrow if b == 2 else 0)

    def ends(self) -> int:
        """What is kept before the first block and after the last one."""
        shape, t, width = self.config.model, self.tokens, self.config.model.embed_dim
        normed = t * (_FLOAT * width + _MOMENTS)
        part = _FLOAT if self.setup.device == "cpu" else 1
        return (
            normed * (2 if shape.embedding_norm else 1)
            + (part * t * width if shape.dropout else 0)
            + self.item * t * width
            + _FLOAT * shape.vocab_size * width
            + _INDEX
        )

    def table(self, positions: int) -> int:
        """What a position embedding makes of positions, for all layers."""
        turned = _FLOAT * self.config.model.head_dim
        each = {"rotary": turned, "xpos": 2 * turned, "learned": _INDEX}
        return positions * each.get(self.config.model.positions, 0)

    def backward(self) -> int:
        """What a block's backward holds beside what was kept: gradients on their way."""
        shape, b = self.config.model, self.item
        wide = b * max(shape.hidden_dim, 4 * shape.embed_dim)
        if not self.setup.compiled and self.config.recompute == "none":
            wide += b * shape.hidden_dim
        return self.tokens * ((_FLOAT + b) * shape.embed_dim + wide)

    def operations(self, recompute: Recomputed, attention: float) -> float:
        """What a block computes a second time for each token; its last product it never does."""
        width, hidden = self.config.model.embed_dim, self.config.model.hidden_dim
        if recompute == "all":
            return 2 * (4 * width**2 + width * hidden) + attention
        return 2 * width * hidden if recompute == "feed_forward" else 0


def _check(config: TrainConfig, setup: Setup) -> int:
    """The parts of the batch that ranks have."""
    data, left = divmod(setup.ranks, setup.sequence_parallel)
    if left:
        raise InputError(
            f"--sequence-parallel must divide the processes ({setup.ranks}). "
            f"Got {setup.sequence_parallel}."
        )
    require_shares(config, data, setup.sequence_parallel)
    return data


def _numbers(shapes: Counter[torch.Size], parts: int = 1) -> int:
    """Numbers in so many tensors, or in the largest of the parts that ranks have of each."""
    return sum(
        count * -(-shape[0] // parts) * math.prod(shape[1:]) for shape, count in shapes.items()
    )


def _update(config: TrainConfig, weights: WeightCounts, parts: int, device: str) -> int:
    """What the optimizers hold while they step, beside their state."""
    if config.optimizer == "adamw":
        return 0 if device == "cuda" else 3 * _FLOAT * max(map(math.prod, weights.matrices))
    # Muon works in bfloat16 on all matrices of a shape at once; of shards, on one matrix.
    wide = 0 if parts > 1 else _FLOAT * _numbers(weights.matrices)
    return wide + max(
        (count if parts == 1 else 1) * (6 * math.prod(shape) + 4 * min(shape) ** 2)
        for shape, count in weights.matrices.items()
    )


def _messages(config: TrainConfig, setup: Setup) -> tuple[int, int]:
    """Rows of other ranks: those that a block keeps, and the most that are on their way."""
    _check(config, setup)
    if setup.sequence_parallel == 1:
        return 0, 0
    if importlib.util.find_spec("dilated_ring") is None:
        raise missing_package("a plan for ranks that share sequences", "dilated-ring")
    import dilated_ring

    shape = config.model
    try:
        memory = dilated_ring.plan(
            shape.pattern,
            length=shape.context,
            world_size=setup.sequence_parallel,
            heads=shape.num_heads,
            head_dim=shape.head_dim,
            dtype=torch.bfloat16 if config.dtype == "bfloat16" else torch.float32,
            is_causal=True,
        ).memory
    except ValueError as error:
        raise InputError(str(error)) from None
    return memory.kept, max(memory.forward_messages, memory.backward_messages)


def _divisors(number: int) -> list[int]:
    """Divisors, smallest first."""
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})
