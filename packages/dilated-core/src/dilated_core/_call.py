"""What one attention call is asked to compute, checked once at the public edge."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_core import _checks
from dilated_core._pattern import DilatedPattern

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Options:
    """Everything about a call but its tensors q, k, v."""

    pattern: DilatedPattern
    is_causal: bool
    scale: float
    key_padding_mask: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None


def shape(tensor: Tensor) -> tuple[int, ...]:
    """A shape as a tuple, for messages."""
    return tuple(tensor.shape)


def check_tensors(
    query: Tensor, key: Tensor, value: Tensor, *, enable_gqa: bool, dims: int
) -> None:
    """Raise unless q, k, v are (..., length, heads, head_dim) tensors that fit each other."""
    layout = "(batch, length, heads, head_dim)" if dims == 4 else "(total, heads, head_dim)"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor. Got {type(tensor).__name__}.")
        if tensor.ndim != dims:
            raise ValueError(f"{name} must have shape {layout}. Got {shape(tensor)}.")
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
    if value.shape != key.shape:
        raise ValueError(f"value must have key's shape {shape(key)}. Got {shape(value)}.")
    if dims == 4 and key.shape[0] != query.shape[0]:
        raise ValueError(f"key must have query's batch size {query.shape[0]}. Got {key.shape[0]}.")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have query's head_dim {query.shape[-1]}. Got {key.shape[-1]}.")
    if query.shape[-1] == 0 or query.shape[-2] == 0:
        raise ValueError(f"query must have at least one head and head_dim 1. Got {shape(query)}.")
    heads, kv_heads = query.shape[-2], key.shape[-2]
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


def check_options(
    query: Tensor,
    pattern: DilatedPattern,
    *,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    enable_gqa: bool,
    return_lse: bool,
) -> float:
    """Raise unless the options are valid; return the scale to use."""
    if not isinstance(pattern, DilatedPattern):
        raise TypeError(f"pattern must be a DilatedPattern. Got {type(pattern).__name__}.")
    for name, flag in (
        ("is_causal", is_causal),
        ("enable_gqa", enable_gqa),
        ("return_lse", return_lse),
    ):
        _checks.boolean(name, flag)
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, float | int):
        raise TypeError(f"dropout_p must be a float. Got {dropout_p!r}.")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1). Got {dropout_p}.")
    pattern.branch_heads(query.shape[-2])
    if scale is None:
        return 1.0 / math.sqrt(query.shape[-1])
    if isinstance(scale, bool) or not isinstance(scale, float | int):
        raise TypeError(f"scale must be a float or None. Got {scale!r}.")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite. Got {scale}.")
    return float(scale)


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
            f"Got {shape(mask)}."
        )
    if mask.device != device:
        raise ValueError(f"key_padding_mask must be on query's device {device}. Got {mask.device}.")


def check_cu_seqlens(cu_seqlens: Tensor, total: int, device: torch.device) -> None:
    """Raise unless cu_seqlens is 0 = c_0 <= c_1 <= ... = total, as int32 or int64."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a Tensor. Got {type(cu_seqlens).__name__}.")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64. Got {cu_seqlens.dtype}.")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (sequences + 1,). Got {shape(cu_seqlens)}.")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens must be on query's device {device}. Got {cu_seqlens.device}.")
    if device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != total or ends != sorted(ends):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the total number of rows ({total}). Got {ends}."
            )
