"""Sequences of transformers' models that ranks share: their parts, and what is wrong with one."""

# Shapes: B batch, N length; n rows of this rank.

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dilated_core import DilatedPattern
from dilated_core.interfaces import SpanAttention
from dilated_factory.errors import missing_package
from dilated_factory.models.head_loss import IGNORED


def shard_for_transformers(
    input_ids: Tensor,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    multiple_of: int = 1,
) -> dict[str, Any]:
    """What a model of transformers takes on this rank: ``model(**shard_for_transformers(...))``.

    For causal language models whose attention is registered with the same group. All ranks of it
    call this together, with the same sequences; what does not divide is padded and masked. With
    labels, the mean of the models' losses over the ranks is that of the whole, and so is the mean
    of their gradients, which DistributedDataParallel and FSDP take.

    Shapes: batch B, positions N, positions of this rank n.

    Args:
        input_ids: (B, N) int64, whole sequences.
        labels: (B, N) int64, as ``input_ids``, not shifted; -100 leaves a token out.
        attention_mask: (B, N), 0 = ignore; not at the start of a row.
        group: the ranks that share a sequence, as in `ring_attention`.
        multiple_of: what n is to be a multiple of, as in `shard_sequence`.

    Returns:
        ``input_ids`` (B, n), ``position_ids`` (1, n), ``use_cache``; ``attention_mask`` (B, n)
        where any token is ignored; with labels ``labels``, ``shift_labels`` (B, n) and
        ``num_items_in_batch``.

    Raises:
        RankMismatchError: the ranks hold different sequences.
        MissingPackageError: dilated-ring is not installed.

    Examples:
        >>> tokens = torch.arange(8).reshape(1, 8)
        >>> part = shard_for_transformers(tokens, labels=tokens)  # of one process, the whole
        >>> part["input_ids"].shape, part["shift_labels"].shape
        (torch.Size([1, 8]), torch.Size([1, 8]))
    """
    try:
        from dilated_ring import local_positions, shard_sequence
    except ImportError:
        raise missing_package("shard_for_transformers", "dilated-ring") from None
    cut: dict[str, Any] = {"group": group, "multiple_of": multiple_of}
    ignored = None if attention_mask is None else attention_mask == 0
    rows, padding = shard_sequence(input_ids, key_padding_mask=ignored, **cut)
    n = rows.shape[1]
    found: dict[str, Any] = {
        "input_ids": rows,
        "position_ids": local_positions(n, group=group, device=rows.device).unsqueeze(0),
        "use_cache": False,
    }
    if padding is not None:
        found["attention_mask"] = (~padding).long()
    if labels is not None:
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        # Their loss takes views.
        mine = shard_sequence(shifted, fill=IGNORED, **cut).rows.contiguous()
        count = (shifted != IGNORED).sum().clamp(min=1)
        found |= {"labels": mine, "shift_labels": mine}
        found["num_items_in_batch"] = count.double() / rank_in(group)[1]
    return found


def rank_in(group: dist.ProcessGroup | DeviceMesh | None) -> tuple[int, int]:
    """The number of this rank, and how many there are."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    ranks = group.get_group() if isinstance(group, DeviceMesh) else group
    return dist.get_rank(ranks), dist.get_world_size(ranks)


def fault_in_share(
    positions: Tensor | None, mask: Tensor | None, queries: int, keys: int, rank: int
) -> str | None:
    """What is wrong with this rank's part of a sequence, if anything is.

    Args:
        positions: (B or 1, n) of its queries, or None where the model does not hand them over.
        mask: (B, n) bool, True = attend, or None.
        queries: how many there are.
        keys: the same.
        rank: the number of this rank.

    Raises:
        ValueError: there is a cache, on all ranks.
    """
    if queries != keys:
        raise ValueError(
            "the cache must be empty over ranks, which share one sequence: pass use_cache=False. "
            f"Got {keys} keys for {queries} queries."
        )
    start = rank * queries
    if positions is not None:
        expected = torch.arange(start, start + queries, device=positions.device)
        if not bool((positions == expected).all()):
            return (
                f"position_ids must be those of this rank, {start} to {start + queries - 1}, "
                "in the whole sequence, as shard_for_transformers makes them. "
                f"Got {int(positions.min())} to {int(positions.max())}."
            )
    if rank == 0 and mask is not None and not bool(mask[:, :1].all()):
        return (
            "attention_mask must not ignore the first token of a row over ranks: pad on the right. "
            f"Got it in row {int((~mask[:, 0]).nonzero()[0])}."
        )
    return None


def refuse_share(positions: Tensor, past: int) -> None:
    """Refuse positions of a rank's part of a sequence, which attention without a group would cut.

    Raises:
        ValueError: there are several ranks, and the first position is that of a later part.
    """
    if torch.compiler.is_compiling() or rank_in(None)[1] == 1 or not positions.numel():
        return
    first = int(positions[0, 0]) - past
    if first <= 0 or first % positions.shape[1]:
        return
    raise ValueError(
        "position_ids must count from 0 where each rank has whole sequences. Got the first at "
        f"{first}; for a sequence that ranks share, register the pattern with group=..."
    )


class Misplaced:
    """A pattern whose check fails on this rank: all ranks raise one error, and none waits."""

    def __init__(self, pattern: DilatedPattern, fault: str) -> None:
        self.code, self._fault = pattern.code, fault

    @property
    def spans(self) -> SpanAttention:
        """Its attention, of which the check alone is reached."""
        return cast(SpanAttention, self)

    def check(self, length: int, shard: int, heads: int) -> None:
        """Raise a ValueError that says what is wrong."""
        raise ValueError(self._fault)
