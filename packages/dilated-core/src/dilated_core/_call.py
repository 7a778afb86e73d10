"""What an attention call is asked to compute, checked once at the public edge.

Shapes: query (B, N, H, D), key and value (B, M, H_kv, D); packed sequences (total, H, D).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core import _checks
from dilated_core._branches import Branches
from dilated_core._partial import Partial, accumulate_dtype

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Scores(NamedTuple):
    """What one call does with its scores, for any pattern or layout.

    Attributes:
        is_causal: hide the keys after each query.
        scale: factor on the scores.
        key_padding_mask: (B, M) bool, True = ignore, or None.
        dropout_p: probability of dropping a weight.
        seed: () int64, of the dropout mask; None without dropout.
    """

    is_causal: bool
    scale: float
    key_padding_mask: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None

    def at_keys(self, rows: slice) -> "Scores":
        """The same for some of the keys."""
        mask = self.key_padding_mask
        return self if mask is None else self._replace(key_padding_mask=mask[:, rows])

    def seeded(self, device: torch.device) -> "Scores":
        """With a seed, if there is dropout."""
        if not self.dropout_p:
            return self
        # On query's device and from its default generator: no host sync, and checkpointing, which
        # restores that generator, draws the same mask again.
        return self._replace(seed=torch.randint(2**62, (), device=device))


class DilatedCall(NamedTuple):
    """A checked call of dilated attention, beside its tensors.

    Attributes:
        pattern: which keys a query sees.
        scores: what to do with the scores.
        cu_seqlens: (S + 1,), where the batch is 1 and the rows are S sequences, one after the
            other; else None.
    """

    pattern: Branches
    scores: Scores
    cu_seqlens: Tensor | None = None


class Upstream(NamedTuple):
    """What a backward starts from.

    Attributes:
        grad_out: (B, N, H, D).
        grad_lse: (B, H, N), or None.
        query: (B, N, H, D).
        key: (B, M, H_kv, D).
        value: (B, M, H_kv, D).
        total: the merged partial of all keys.
    """

    grad_out: Tensor
    grad_lse: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    total: Partial


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Scores:
    """Raise unless a call is valid; say what it does with its scores, without a seed as yet.

    With `cu_seqlens` query is (total, H, D), key and value are (total, H_kv, D) and the mask,
    which is returned as (1, total), is (total,).

    Raises:
        TypeError: an argument has the wrong type, or a tensor the wrong dtype.
        ValueError: shapes, heads, lengths or devices do not fit each other, or a number is out of
            range.
    """
    _checks.boolean("is_causal", is_causal)
    _checks.boolean("enable_gqa", enable_gqa)
    _checks.boolean("return_lse", return_lse)
    check_tensors(query, key, value, enable_gqa=enable_gqa, dims=4 if cu_seqlens is None else 3)
    length, key_length = query.shape[-3], key.shape[-3]
    if cu_seqlens is not None:
        if length != key_length:
            raise ValueError(f"key must have query's total {length}. Got {key_length}.")
        check_cu_seqlens(cu_seqlens, length, query.device)
        if isinstance(key_padding_mask, Tensor):
            key_padding_mask = key_padding_mask.unsqueeze(0)
    elif is_causal and length > key_length:
        raise ValueError(
            f"query length must not exceed key length when is_causal=True. "
            f"Got {length} and {key_length}."
        )
    if key_padding_mask is not None:
        batch = key.shape[0] if cu_seqlens is None else 1
        check_padding_mask(key_padding_mask, batch, key_length, query.device)
    dropout_p = _checks.fraction("dropout_p", dropout_p)
    # In units of log2 scores are multiplied by up to twice as much.
    scale = _checks.scale(scale, torch.finfo(accumulate_dtype(query.dtype)).max / 2)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    return Scores(is_causal, scale, key_padding_mask, dropout_p)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the autocast dtype where autocast is on, as torch's own attention does."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in tensors)


def check_tensors(
    query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool, dims: int
) -> None:
    """Raise unless q, k, v are (..., length, heads, head_dim) tensors that fit each other."""
    layout = "(batch, length, heads, head_dim)" if dims == 4 else "(total, heads, head_dim)"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor. Got {type(tensor).__name__}.")
        if tensor.ndim != dims:
            raise ValueError(f"{name} must have shape {layout}. Got {tuple(tensor.shape)}.")
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64. Got {tensor.dtype}."
            )
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}. Got {tensor.dtype}.")
        if tensor.device != query.device:
            raise ValueError(
                f"{name} must be on query's device {query.device}. Got {tensor.device}."
            )
    rows, key_rows = query.shape, key.shape
    if value.shape != key_rows:
        raise ValueError(
            f"value must have key's shape {tuple(key_rows)}. Got {tuple(value.shape)}."
        )
    if dims == 4 and key_rows[0] != rows[0]:
        raise ValueError(f"key must have query's batch size {rows[0]}. Got {key_rows[0]}.")
    if key_rows[-1] != rows[-1]:
        raise ValueError(f"key must have query's head_dim {rows[-1]}. Got {key_rows[-1]}.")
    if rows[-1] == 0 or rows[-2] == 0:
        raise ValueError(f"query must have at least one head and head_dim 1. Got {tuple(rows)}.")
    heads, kv_heads = rows[-2], key_rows[-2]
    if enable_gqa:
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(
                f"query heads must be a multiple of key heads with enable_gqa. "
                f"Got {heads} and {kv_heads}."
            )
    elif kv_heads != heads:
        raise ValueError(
            f"key must have query's number of heads ({heads}) unless enable_gqa=True. "
            f"Got {kv_heads}."
        )


def check_padding_mask(
    mask: Tensor | None, batch: int, key_length: int, device: torch.device
) -> None:
    """Raise unless the mask is None or a bool (B, M) tensor on the device."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"key_padding_mask must be a Tensor or None. Got {type(mask).__name__}.")
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be bool, True = ignore. Got {mask.dtype}.")
    if mask.shape != (batch, key_length):
        raise ValueError(
            f"key_padding_mask must have shape (batch, key length)={(batch, key_length)}. "
            f"Got {tuple(mask.shape)}."
        )
    if mask.device != device:
        raise ValueError(f"key_padding_mask must be on query's device {device}. Got {mask.device}.")


def check_cu_seqlens(cu_seqlens: Tensor, total: int, device: torch.device) -> None:
    """Raise unless cu_seqlens is 0 = c_0 <= c_1 <= ... = total, as int32 or int64."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64. Got {cu_seqlens.dtype}.")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens must have shape (sequences + 1,). Got {tuple(cu_seqlens.shape)}."
        )
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens must be on query's device {device}. Got {cu_seqlens.device}.")
    if device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != total or ends != sorted(ends):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the total number of rows ({total}). Got {ends}."
            )


def check_lengths(
    name: str, lengths: Tensor, sizes: tuple[int, int | None] | torch.Size, device: torch.device
) -> None:
    """Raise unless lengths is (B,) int64 on the device, on the CPU from 0 to L."""
    batch, most = sizes
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name} must be a Tensor or None. Got {type(lengths).__name__}.")
    if lengths.dtype != torch.int64:
        raise TypeError(f"{name} must be int64. Got {lengths.dtype}.")
    if lengths.shape != (batch,):
        raise ValueError(f"{name} must have shape (batch,)={(batch,)}. Got {tuple(lengths.shape)}.")
    if lengths.device != device:
        raise ValueError(f"{name} must be on query's device {device}. Got {lengths.device}.")
    if most is not None and lengths.is_cpu:
        numbers = lengths.tolist()
        if min(numbers, default=0) < 0 or max(numbers, default=0) > most:
            raise ValueError(f"{name} must be from 0 to {most}, the new rows. Got {numbers}.")
