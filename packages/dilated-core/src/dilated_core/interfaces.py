"""Typed interfaces through which packages and modules combine; the caller wires them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class AttentionModule(Protocol):
    """Attention between projected heads, as `MultiheadDilatedAttention(attention=...)` takes it."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Query (B, N, H, D), key and value (B, M, H_kv, D) to out (B, N, H, D)."""
        ...


@runtime_checkable
class PositionEmbedding(Protocol):
    """Rotates or scales projected queries and keys by their positions (rotary, xPos ...)."""

    def __call__(
        self, query: Tensor, key: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries (B, N, H, D) and keys (B, M, H_kv, D) at positions (N,) and (M,) to new ones."""
        ...


class BufferLease(Protocol):
    """A tensor that is lent until it is released; releasing twice does nothing."""

    @property
    def tensor(self) -> Tensor:
        """The tensor, uninitialised at first."""
        ...

    def release(self) -> None:
        """Give the tensor back."""
        ...


@runtime_checkable
class BufferSource(Protocol):
    """Where communication and workspaces take their tensors from, e.g. a memory pool."""

    def borrow(
        self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str
    ) -> AbstractContextManager[Tensor]:
        """Lend an uninitialised tensor for the length of a `with` block."""
        ...

    def lease(
        self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str
    ) -> BufferLease:
        """Lend an uninitialised tensor until it is released."""
        ...
