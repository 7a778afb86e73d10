"""What ranks run in the tests of shards, modules, buffers and the compiler."""

from __future__ import annotations

import copy
import gc
import io
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dilated_core import (
    DilatedAttention,
    DilatedPattern,
    MultiheadDilatedAttention,
    dilated_attention_varlen,
)
from dilated_ring import (
    RingDilatedAttention,
    RingError,
    RingMultiheadDilatedAttention,
    _faults,
    _functional,
    local_positions,
    ring_attention,
    shard_sequence,
    shared_loss,
    unshard_sequence,
)
from dilated_ring._topology import Nodes, Ring
from process_ranks import device
from ring_fault_programs import FaultyPattern

EMBED, HEADS, KV_HEADS = 48, 6, 3
PATTERN = DilatedPattern([5, 17, 1000], [1, 2, 3])


class Rotation:
    """A position embedding that must get the positions in the whole sequence."""

    def __call__(
        self, query: Tensor, key: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scale rows by their positions."""

        def scaled(x: Tensor, positions: Tensor) -> Tensor:
            return x * (1 + 0.1 * positions.to(x.dtype).cos())[:, None, None]

        return scaled(query, query_positions), scaled(key, key_positions)


def reference_layer() -> MultiheadDilatedAttention:
    """The layer of one process."""
    torch.manual_seed(7)
    return MultiheadDilatedAttention(
        EMBED, HEADS, PATTERN, num_kv_heads=KV_HEADS, position_embedding=Rotation()
    ).double()


def inputs(length: int) -> tuple[Tensor, Tensor]:
    """A whole input (2, length, EMBED) and a gradient of its output."""
    generator = torch.Generator().manual_seed(11)
    shape = 2, length, EMBED
    x, grad = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in "xg")
    return x, grad


def train_layer(length: int, ring_size: int | None = None, how: str = "plain") -> dict[str, Any]:
    """Output and input gradient of all rows, and the sum over ranks of parameter gradients."""
    reference = reference_layer()
    layer = RingMultiheadDilatedAttention(
        EMBED, HEADS, PATTERN, num_kv_heads=KV_HEADS, position_embedding=Rotation(),
        ring_size=ring_size,
    ).to(device(), torch.float64)  # fmt: skip
    layer.load_state_dict(reference.state_dict())
    assert copy.deepcopy(layer).state_dict().keys() == reference.state_dict().keys()
    x, grad = (t.to(device()) for t in inputs(length))
    x.requires_grad_()
    group = layer.attention.ranks.group
    shard = shard_sequence(x, group=group, multiple_of=5)
    run: Any = layer
    if how == "compiled":
        run = torch.compile(layer, backend="aot_eager")
    if how == "checkpointed":
        run = partial(checkpoint, layer, use_reentrant=False)
    # The compiler looks at the `.grad` of its inputs, which warns where they are no leaves.
    warnings.filterwarnings("ignore", message="The .grad attribute", category=UserWarning)
    out, _ = run(shard.rows, is_causal=True, key_padding_mask=shard.key_padding_mask)
    whole = unshard_sequence(out, group=group, length=length)
    # Each rank takes the same loss, so their mean is the loss.
    (whole * grad).sum().div(dist.get_world_size(group)).backward()
    assert x.grad is not None
    gradients = [x.grad, *(p.grad for p in layer.parameters())]
    for part in gradients:
        dist.all_reduce(part, group=group)
    names = ("x", *(name for name, _ in layer.named_parameters()))
    found = dict(zip(names, (g.cpu() for g in gradients), strict=True))
    return {"out": whole.detach().cpu(), **found}


def positions(length: int, ends: list[int] | None = None) -> list[int]:
    """This rank's positions, maybe in documents."""
    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32, device=device())
    return local_positions(length, device=device(), cu_seqlens=cu_seqlens).tolist()


def attend_documents(ring_size: int | None) -> float:
    """How far documents that a module attends are off; a ring of one has them all."""
    torch.manual_seed(0)
    ends = torch.tensor([0, 7, 7, 20], device=device())
    x = torch.randn(1, 24, HEADS, 5, dtype=torch.float64, device=device())
    filled = torch.tensor([0, 7, 20, 24], device=device())
    whole = dilated_attention_varlen(x[0], x[0], x[0], filled, PATTERN, is_causal=True)
    module = RingDilatedAttention(PATTERN, ring_size=ring_size)
    size = 1 if ring_size == 1 else dist.get_world_size()
    n, rank = 24 // size, dist.get_rank() % size
    rows = x[:, n * rank : n * rank + n]
    out = module(rows, rows, rows, is_causal=True, cu_seqlens=ends)
    at = module.positions(n, cu_seqlens=ends)
    assert at.tolist() == [*range(7), *range(13), *range(4)][n * rank : n * rank + n]
    assert isinstance(whole, Tensor)
    return (out[0] - whole[n * rank : n * rank + n]).abs().max().item()


def shards(length: int, multiple_of: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """This rank's rows and mask, and the sequence put together again."""
    x = torch.arange(2 * length, device=device()).view(2, length)
    shard = shard_sequence(x, multiple_of=multiple_of)
    mask = None if shard.key_padding_mask is None else shard.key_padding_mask.cpu()
    return shard.rows.cpu(), mask, unshard_sequence(shard.rows, length=length).cpu()


def sampled(what: str) -> Tensor:
    """This rank's rows of a batch, which may be one that a loader gave to it alone."""
    rank, world = dist.get_rank(), dist.get_world_size()
    numbers = torch.arange(8 * world, device=device()).view(world, 8)
    loader = DataLoader(TensorDataset(numbers), batch_size=1, sampler=DistributedSampler(numbers))
    (own,) = next(iter(loader))
    x, mask = numbers[:1], torch.zeros(1, 8, dtype=torch.bool, device=device())
    if what == "another sequence":
        x = own
    last = rank == world - 1
    if what == "one bit" and last:
        x = x.clone()
        x[0, 7] += 1
    if what == "another mask" and last:
        mask[0, 3] = True
    if what == "another length" and last:
        x, mask = x[:, 1:], mask[:, 1:]
    if what == "floats":
        x = x / 3 + (1e-7 if last else 0)
    validate = "off" if what == "not compared" else "always"
    rows, _ = shard_sequence(
        own if what == "not compared" else x, key_padding_mask=mask, validate=validate
    )
    return rows.cpu()


def share_loss(x: Tensor, holders: str) -> tuple[float, Tensor]:
    """This rank's share of a loss, and the gradient to its rows."""
    rank, world = dist.get_rank(), dist.get_world_size()
    n = x.shape[1] // world
    rows = x[:, rank * n : rank * n + n].to(device()).requires_grad_()
    out = RingDilatedAttention(PATTERN)(rows, rows, rows, is_causal=True)
    loss, weight = None, 1
    if holders == "last" and rank == world - 1:
        loss, weight = out[:, -1].square().sum(), 3
    if holders == "all":
        loss, weight = out.square().sum() * (rank + 1), rank + 1
    if holders == "none":
        loss, weight = out.square().sum(), 0
    share = shared_loss(loss, out, weight=weight)
    share.backward()
    assert rows.grad is not None
    return share.item(), rows.grad.cpu()


def loss_of_recipe(tokens: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """This rank's loss and gradient to the embedding, as the README of ring says it."""
    rows, padding = shard_sequence(tokens.to(device()), multiple_of=3)
    targets = shard_sequence(labels.to(device()), multiple_of=3, fill=-100).rows
    table, hidden = recipe_model(rows, padding)
    logits = (hidden @ table.T).flatten(0, 1)
    summed = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    share = shared_loss(summed, hidden, weight=(targets != -100).sum())
    share.backward()
    assert table.grad is not None
    return share.item(), table.grad.cpu()


def recipe_model(rows: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """An embedding, which is the head too, and what is attended of it."""
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(7, 10, dtype=torch.float64, generator=generator)
    table = table.to(rows.device).requires_grad_()
    x = table[rows].unflatten(2, (2, 5))
    attended = RingDilatedAttention(PATTERN)(x, x, x, key_padding_mask=padding)
    return table, attended.flatten(2)


def through_a_file(how: str) -> tuple[str, float]:
    """What a module from a file says without a group, and how far it is off with one."""
    world = dist.get_world_size()
    size = {"ring of one": 1, "ring": world}.get(how)
    group = {"world": dist.group.WORLD}.get(how)
    if how == "group":
        group = dist.new_group(list(range(world)))
    module = RingMultiheadDilatedAttention(
        EMBED, HEADS, PATTERN, num_kv_heads=KV_HEADS, ring_size=size, group=group
    ).to(device())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    found = torch.load(file, weights_only=False)
    x = torch.randn(
        1, 4, EMBED, device=device(), generator=torch.Generator(device()).manual_seed(1)
    )
    said = ""
    try:
        found(x)
    except RuntimeError as error:
        said = str(error)
        found.attention.use_group(group)
    return said, (found(x)[0] - module(x)[0]).abs().max().item()


def outside() -> str:
    """What ring attention says on a rank that `new_group` leaves out."""
    group = dist.new_group([0, 1])
    x = torch.randn(1, 4, 2, 8, device=device())
    try:
        ring_attention(x, x, x, PATTERN, group=group)
    except ValueError as error:
        return str(error)
    return ""


def whole_mesh(names: tuple[str, str] | None) -> str:
    """What ring attention says of a mesh of two dimensions."""
    shape = 2, dist.get_world_size() // 2
    mesh = init_device_mesh(device().type, shape, mesh_dim_names=names)
    x = torch.randn(1, 4, 2, 8, device=device())
    try:
        ring_attention(x, x, x, PATTERN, group=mesh)
    except ValueError as error:
        return str(error)
    return ""


def too_large_ring() -> str:
    """The message about a ring larger than the world."""
    try:
        RingDilatedAttention(PATTERN, ring_size=8)
    except ValueError as error:
        return str(error)
    return ""


def ring_of_one() -> bool:
    """Whether a ring of one rank gives what the module of one process gives."""
    torch.manual_seed(dist.get_rank())
    x = torch.randn(2, 11, 6, 8, device=device())
    alone = RingDilatedAttention(PATTERN, ring_size=1)
    counted = alone.positions(11, device=x.device).tolist() == list(range(11))
    return counted and torch.equal(alone(x, x, x), DilatedAttention(PATTERN)(x, x, x))


def destroy_groups(mesh: bool, how: str) -> tuple[list[str], int]:
    """Which groups outlive their use and their end, and how many more groups ring knows."""
    known = len(_faults._LINES)
    size = dist.get_world_size()
    x = torch.randn(2, 12, 4, 3, device=device(), requires_grad=True)
    group: Any = dist.new_group(list(range(size)))
    groups = {"flat": group}
    if mesh:
        # Without a mesh of torch's, which keeps groups itself.
        pairs = [dist.new_group([start, start + 1]) for start in range(0, size, 2)]
        places = [dist.new_group(list(range(place, size, 2))) for place in range(2)]
        groups["inside"] = pairs[dist.get_rank() // 2]
        groups["across"] = places[dist.get_rank() % 2]
    nodes = Nodes(groups["across"], groups["inside"], 2) if mesh else None
    ring = Ring(group, dist.get_rank(), size, nodes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_functional, "find_ring", {None: ring}.get)
        if how == "refused":
            with pytest.raises(ValueError, match="query must have shape"):
                ring_attention(x[0], x, x, PATTERN)
        elif how == "broken":
            with pytest.raises(RingError, match="seven is not prime"):
                ring_attention(x, x, x, FaultyPattern(PATTERN, "attend_span", "exception"))
        else:
            ring_attention(x, x, x, PATTERN, strategy=how).sum().backward()
    seen = {name: weakref.ref(each) for name, each in groups.items()}
    for each in groups.values():
        dist.destroy_process_group(each)
    del group, groups, nodes, ring, each, x
    if mesh:
        del pairs, places
    gc.collect()
    left = [name for name, each in seen.items() if each() is not None]
    return left, len(_faults._LINES) - known


class Recorder:
    """A buffer source that remembers what it lent; what it lends is full of NaN."""

    def __init__(self) -> None:
        self.lent: list[Recorder.Lease] = []

    class Lease:
        """One tensor that was lent."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor, self.released = tensor, False

        def release(self) -> None:
            """Spoil the tensor."""
            self.released = True
            if self.tensor.is_floating_point():
                self.tensor.fill_(torch.nan)

    def lease(
        self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str
    ) -> Lease:
        """Lend a tensor."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
        if dtype.is_floating_point:
            tensor.fill_(torch.nan)
        self.lent.append(self.Lease(tensor))
        return self.lent[-1]

    @contextmanager
    def borrow(
        self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str
    ) -> Iterator[Tensor]:
        """Lend a tensor for the length of a block."""
        lease = self.lease(shape, dtype=dtype, device=device)
        yield lease.tensor
        lease.release()


def use_buffers(strategy: str) -> tuple[int, bool, bool]:
    """How many buffers were lent, whether all came back, and whether results are untouched."""
    torch.manual_seed(dist.get_rank())
    query, key, value = (
        torch.randn(2, 12, 4, 3, dtype=torch.float64, device=device(), requires_grad=True)
        for _ in "qkv"
    )
    found = []
    recorder = Recorder()
    for buffers in (None, recorder):
        out = ring_attention(
            query, key, value, PATTERN, is_causal=strategy == "lend", strategy=strategy,
            buffers=buffers,
        )  # fmt: skip
        grads = torch.autograd.grad(out.square().sum(), (query, key, value))
        found.append([out, *grads])
    same = all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    return len(recorder.lent), all(lease.released for lease in recorder.lent), same
