"""Between a whole sequence and the shards of ranks: contiguous, of one length, padded at the end.

P ranks, N positions, n = ceil(N / P) rows of a shard, rounded up to `multiple_of`.
"""

import hashlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from dilated_core.extending import uncompiled
from dilated_ring._agreement import Fact, agree, problem_of, refuse_alike
from dilated_ring._documents import read_ends
from dilated_ring._faults import Call
from dilated_ring._topology import Ring, device_of, find_ring


class Shard(NamedTuple):
    """This rank's rows of a sequence.

    Shapes: batch B, rows of this rank n.

    Attributes:
        rows: n of them along the sharded dimension; the last ranks may have rows of padding.
        key_padding_mask: (B, n) bool, True = padding, or None on all ranks if there is none.

    Examples:
        >>> rows, padding = shard_sequence(torch.zeros(1, 50, 8), multiple_of=32)
        >>> rows.shape, int(padding.sum())
        (torch.Size([1, 64, 8]), 14)
    """

    rows: Tensor
    key_padding_mask: Tensor | None


@uncompiled
def shard_sequence(
    x: Tensor,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    dim: int = 1,
    multiple_of: int = 1,
    key_padding_mask: Tensor | None = None,
    fill: float = 0,
    validate: Literal["always", "off"] = "always",
) -> Shard:
    """This rank's rows of a sequence that every rank has; padded where it is too short.

    All ranks of the group call it together, each with the same sequence, bit for bit: a sampler or
    loader that gives each rank a batch of its own is for groups of ranks, not for ranks of one.

    Shapes: batch B, positions N, width of a row E.

    Args:
        x: the whole sequence, batch first, e.g. token numbers (B, N) or embeddings (B, N, E).
        group: as in `ring_attention`; alone, a rank gets all rows.
        dim: the dimension of the N positions.
        multiple_of: what n is to be a multiple of; with the pattern's smallest segment length, the
            branches that fit in a shard need no rows of other ranks.
        key_padding_mask: (B, N) bool, True = ignore.
        fill: what the padding holds; for targets, the number that leaves one out.
        validate: compare the arguments of all ranks, by digests of what they hold ("always"), or
            not ("off").

    Returns:
        The rows, and the mask for `ring_attention`, with the padding masked.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
        RankMismatchError: the ranks hold different sequences; the same on every rank.

    Examples:
        >>> rows, padding = shard_sequence(torch.zeros(1, 50, 8), multiple_of=16)
        >>> rows.shape  # 50 rows, padded to 64
        torch.Size([1, 64, 8])
    """
    if validate not in ("always", "off"):
        raise ValueError(f"validate must be 'always' or 'off'. Got {validate!r}.")
    ring = find_ring(group)
    compared = ring if validate == "always" else None
    problem = problem_of(_check_whole, x, dim, multiple_of, key_padding_mask, fill)
    if problem is not None:
        refuse_alike(compared, x, "shard_sequence", problem)
    dim, length = dim % x.ndim, x.shape[dim]
    if compared is not None:
        facts: dict[str, Fact] = {"multiple_of": multiple_of, "dim": dim, "fill": fill}
        facts |= _facts("x", x)
        facts["key_padding_mask"] = "none"
        if key_padding_mask is not None:
            facts |= _facts("key_padding_mask", key_padding_mask)
        with Call(compared.group, device_of(compared.group, x), "shard_sequence") as call:
            agree(call, facts)
    rank, world_size = (ring.rank, ring.world_size) if ring else (0, 1)
    n = -(-length // (world_size * multiple_of)) * multiple_of
    if key_padding_mask is None and n * world_size != length:
        key_padding_mask = torch.zeros(x.shape[0], length, dtype=torch.bool, device=x.device)
    start = rank * n
    rows = _rows(x, dim, start, n, fill)
    if key_padding_mask is not None:
        key_padding_mask = _rows(key_padding_mask, 1, start, n, 1)
    return Shard(rows, key_padding_mask)


@uncompiled
def unshard_sequence(
    x: Tensor,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    dim: int = 1,
    length: int | None = None,
) -> Tensor:
    """The whole sequence, on every rank, from the rows of each; the inverse of `shard_sequence`.

    The gradient of a rank's rows is the sum over ranks of what each sends back, the true one where
    the loss is the sum of the losses of all ranks.

    Args:
        x: this rank's rows, as many on each.
        group: as in `ring_attention`.
        dim: the dimension of the rows.
        length: positions N, to cut off the padding; all rows when None.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
        RankMismatchError: the rows differ in shape or dtype by rank.
        RingError: a rank failed, died or stalled.

    Examples:
        >>> rows, _ = shard_sequence(torch.arange(6.0).reshape(1, 6), multiple_of=4)
        >>> unshard_sequence(rows, length=6)
        tensor([[0., 1., 2., 3., 4., 5.]])
    """
    ring = find_ring(group)
    problem = problem_of(_check_rows, x, dim, length, ring.world_size if ring else 1)
    if problem is not None:
        refuse_alike(ring, x, "unshard_sequence", problem)
    if ring is not None:
        gather: Callable[..., Tensor] = _Unshard.apply
        x = gather(x.movedim(dim, 0), ring).movedim(0, dim)
    return x if length is None else x.narrow(dim, 0, length)


def local_positions(
    length: int,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    device: torch.device | str | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The positions in the whole sequence of this rank's `length` rows, (n,) int64.

    Shapes: rows of this rank n.

    Args:
        length: rows of this rank, as many on each.
        group: as in `ring_attention`.
        device: of the positions.
        cu_seqlens: as in `ring_attention`: positions then begin at 0 in each document, and in the
            padding behind them.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.

    Examples:
        >>> local_positions(5)  # of rank 0, or of one process
        tensor([0, 1, 2, 3, 4])
        >>> local_positions(5, cu_seqlens=torch.tensor([0, 3, 5]))
        tensor([0, 1, 2, 0, 1])
    """
    ring = find_ring(group)
    rank, world_size = (ring.rank, ring.world_size) if ring else (0, 1)
    return positions_of(rank, world_size, length, device, cu_seqlens)


def positions_of(
    rank: int,
    world_size: int,
    length: int,
    device: torch.device | str | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """The positions of a rank's rows, in the documents of the sequence if it has any."""
    _integer("length", length)
    if length < 0:
        raise ValueError(f"length must not be negative. Got {length}.")
    positions = torch.arange(rank * length, (rank + 1) * length, device=device)
    if cu_seqlens is None:
        return positions
    ends = torch.tensor(read_ends(cu_seqlens, world_size * length), device=positions.device)
    return positions - ends[torch.searchsorted(ends, positions, right=True) - 1]


def _check_whole(x: Tensor, dim: int, multiple_of: int, mask: Tensor | None, fill: float) -> None:
    """Raise unless a sequence can be cut."""
    if not isinstance(fill, int | float):
        raise TypeError(f"fill must be a number. Got {fill!r}.")
    _integer("multiple_of", multiple_of)
    if multiple_of <= 0:
        raise ValueError(f"multiple_of must be positive. Got {multiple_of}.")
    _check_dim(x, dim)
    if dim % x.ndim == 0:
        raise ValueError(f"dim must not be the batch dimension 0. Got {dim}.")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"key_padding_mask must be a bool Tensor. Got {got}.")
    if mask.shape != (x.shape[0], x.shape[dim]):
        raise ValueError(
            f"key_padding_mask must have shape {(x.shape[0], x.shape[dim])}. "
            f"Got {tuple(mask.shape)}."
        )


def _check_rows(x: Tensor, dim: int, length: int | None, world_size: int) -> None:
    """Raise unless rows can be put together."""
    _check_dim(x, dim)
    rows = x.shape[dim] * world_size
    if length is None:
        return
    _integer("length", length)
    if not 0 <= length <= rows:
        raise ValueError(f"length must be between 0 and {rows}. Got {length}.")


def _check_dim(x: Tensor, dim: int) -> None:
    """Raise unless it is a tensor that has the dimension."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor. Got {type(x).__name__}.")
    _integer("dim", dim)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim must be one of the {x.ndim} dimensions of x. Got {dim}.")


def _integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int. Got {value!r}.")


def _rows(x: Tensor, dim: int, start: int, count: int, fill: float) -> Tensor:
    """Rows from `start`, filled up behind the last one."""
    held = max(0, min(count, x.shape[dim] - start))
    rows = x.narrow(dim, min(start, x.shape[dim]), held)
    if held == count:
        return rows
    shape = list(x.shape)
    shape[dim] = count - held
    return torch.cat([rows, x.new_full(shape, fill)], dim)


def _facts(name: str, x: Tensor) -> dict[str, Fact]:
    """What tells a tensor from others."""
    return {
        f"shape of {name}": tuple(x.shape),
        f"dtype of {name}": str(x.dtype),
        f"digest of {name}": digest(x),
    }


_BLOCK = 1 << 12


def digest(x: Tensor) -> str:
    """16 hexadecimal digits that differ where any bit of a tensor does, by all odds."""
    x = x.detach().contiguous()
    bits = x.flatten().view(torch.uint8)
    bits = torch.cat([bits, bits.new_zeros(-len(bits) % (8 * _BLOCK))]).view(torch.int64)
    place = torch.arange(_BLOCK, device=x.device)
    # Integers wrap alike everywhere, so every device finds the same sums.
    place = (place + 1) * -7046029254386353131
    weights = (place ^ (place >> 29)) * -4658895280553007687 | 1
    sums = (bits.view(-1, _BLOCK) * weights).sum(1)
    return hashlib.sha256(str(sums.tolist()).encode()).hexdigest()[:16]


class _Unshard(torch.autograd.Function):
    """Gather rows (n, ...) of all ranks to (P * n, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ring: Ring) -> Tensor:
        ctx.ring = ring
        whole = x.new_empty((ring.world_size * x.shape[0], *x.shape[1:]))
        with Call(ring.group, x.device, "unshard_sequence") as call:
            agree(call, {"shape of x": tuple(x.shape), "dtype of x": str(x.dtype)})
            call.step = "gather"
            parts = list(whole.unflatten(0, (ring.world_size, x.shape[0])).unbind())
            work = dist.all_gather(parts, x.contiguous(), group=ring.group, async_op=True)
            assert work is not None
            call.wait(work)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ring: Ring = ctx.ring
        parts = torch.empty_like(grad, memory_format=torch.contiguous_format)
        with Call(ring.group, grad.device, "gradient of unshard_sequence") as call:
            agree(call, {"shape of gradient": tuple(grad.shape)})
            call.step = "exchange"
            work = dist.all_to_all_single(parts, grad.contiguous(), group=ring.group, async_op=True)
            assert work is not None
            call.wait(work)
        return parts.unflatten(0, (ring.world_size, len(parts) // ring.world_size)).sum(0), None
