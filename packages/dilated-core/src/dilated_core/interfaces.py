"""Typed interfaces through which packages and modules combine; the caller wires them."""

from typing import Protocol, runtime_checkable

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
