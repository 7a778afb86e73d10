"""Typed interfaces through which packages and modules combine; the caller wires them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypedDict, Unpack, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dilated_core._partial import Partial


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


class DecodingState(Protocol):
    """Keys and values that later queries of one layer see; `dilated_core.DilatedKVCache` is one."""

    @property
    def length(self) -> int:
        """Positions seen so far, of the batch row that has seen most."""
        ...

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, positions that each batch row has seen."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...

    @property
    def can_be_captured(self) -> bool:
        """Whether a CUDA graph can hold `attend` of one new row."""
        ...

    def next_positions(self, count: int, device: torch.device) -> Tensor:
        """Positions of the next rows: (count,) int64, or (B, count) where batch rows differ."""
        ...

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        key_padding_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Append the next rows and attend them causally to all rows so far."""
        ...

    def reorder(self, index: Tensor) -> None:
        """Take batch rows `index` (B',) int64."""
        ...

    def truncate(self, length: int | Tensor) -> None:
        """Forget the positions from `length` on."""
        ...

    def reset(self) -> None:
        """Forget everything."""
        ...

    def bookmark(self, count: int) -> Callable[[], None]:
        """What brings it back to where it is now, before `count` rows are appended."""
        ...


@runtime_checkable
class PositionEmbedding(Protocol):
    """Rotates or scales projected queries and keys by their positions (rotary, xPos ...)."""

    def __call__(
        self, query: Tensor, key: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries (B, N, H, D) and keys (B, M, H_kv, D) at positions (N,) and (M,) to new ones.

        Positions are int64, or what the embedding itself made of them (N, ...), (M, ...). They are
        (B, N) and (B, M) where batch rows are at different ones.
        """
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


@dataclass(frozen=True, eq=False)
class SpanCall:
    """What attention of one span of a sequence is asked to compute.

    Attributes:
        queries: global positions of the span.
        length: positions in the whole sequence.
        is_causal: hide the keys after each query.
        scale: factor on the scores.
        dropout_p: probability of dropping an attention weight.
        seed: of the dropout mask, the same for all spans; None without dropout.
        sequence: the number of the (first) sequence, for its dropout mask.
    """

    queries: range
    length: int
    is_causal: bool
    scale: float
    dropout_p: float = 0.0
    seed: Tensor | None = None
    sequence: int = 0


class KeyRows(NamedTuple):
    """Keys and values of a span, (B, n, H_kv, D), or packed, (B, R, D).

    Attributes:
        key: the keys.
        value: the values.
        padding: (B, n) or (B, R) bool, True = ignore, or None.
    """

    key: Tensor
    value: Tensor
    padding: Tensor | None = None


class PackedRows(Protocol):
    """Which rows of a span of keys another span of queries sees, one for each row and key head."""

    @property
    def count(self) -> int:
        """How many packed rows there are."""
        ...

    @property
    def parts(self) -> tuple[int, ...]:
        """Sizes of consecutive parts of the packed rows; no part has a row twice."""
        ...

    def index(self) -> tuple[Tensor, Tensor]:
        """The row in the span of keys, and the key head, of each packed row: int64 (count,)."""
        ...


class Clique(NamedTuple):
    """Rows of a segment that all see each other (the earlier ones only, if causal), head by head.

    Attributes:
        segment: positions of a segment, a multiple of the shard; segments begin at its multiples.
        step: distance of neighbouring rows.
        first: for each query head, its first row in a segment, or None if it has none.
    """

    segment: int
    step: int
    first: tuple[int | None, ...]


class AttendOptions(TypedDict, total=False):
    """The options of an attention function that all patterns share, as in `dilated_attention`."""

    is_causal: bool
    scale: float | None
    key_padding_mask: Tensor | None
    dropout_p: float
    enable_gqa: bool
    return_lse: bool


class SpanAttention(Protocol):
    """Attention of a pattern span by span; spans are ranges of global positions.

    The attention of a span is the merge of `attend_span` (keys in the span) and `attend_packed_`
    (the packed rows of other spans that it sees); no key belongs to both. The backward of each
    takes the merged partial of all keys, and is exact for its part. Nothing here builds a graph.
    """

    def check(self, length: int, shard: int, heads: int) -> None:
        """Raise a ValueError unless spans of `shard` of `length` positions and H heads will do."""
        ...

    def attend_whole(
        self, query: Tensor, key: Tensor, value: Tensor, **options: Unpack[AttendOptions]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The pattern's attention of a whole sequence, with gradients."""
        ...

    def visible_keys(self, queries: range, length: int, *, is_causal: bool) -> tuple[range, ...]:
        """The keys that some query of a span may see, as few spans, rising; more is no error."""
        ...

    def packed_rows(
        self, queries: range, keys: range, heads: int, kv_heads: int, *, is_causal: bool
    ) -> PackedRows:
        """The rows of a span of keys that a span of queries, which it does not meet, sees."""
        ...

    def cliques(
        self, length: int, shard: int, heads: int, *, is_causal: bool
    ) -> tuple[SpanAttention | None, tuple[Clique, ...]] | None:
        """The pattern as what spans of `shard` attend alone, if anything, and cliques.

        None where it cannot be said so.
        """
        ...

    def attend_span(self, call: SpanCall, query: Tensor, keys: KeyRows) -> Partial:
        """Attention of a span to itself: out (B, n, H, D), wide or in query's dtype, lse (B, H, n).

        Keys that have no row, as `count_padding` adds them, are all counted here.
        """
        ...

    def attend_span_backward(
        self,
        call: SpanCall,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        keys: KeyRows,
        total: Partial,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The adjoint of `attend_span`: gradients to query, key and value, wide."""
        ...

    def attend_packed_(
        self,
        call: SpanCall,
        total: Partial,
        query: Tensor,
        keys: KeyRows,
        packed: Sequence[PackedRows],
    ) -> None:
        """Merge attention of a span to packed rows, those of each of `packed` in turn."""
        ...

    def attend_packed_backward(
        self,
        call: SpanCall,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        keys: KeyRows,
        packed: Sequence[PackedRows],
        total: Partial,
        grad_keys: KeyRows,
    ) -> Callable[[Tensor], None]:
        """The adjoint of `attend_packed_`: write the wide gradients to the packed rows.

        Returns:
            A function that adds the gradient to the queries to a wide (B, n, H, D), later, so that
            the gradients of the packed rows can travel first.
        """
        ...


@runtime_checkable
class AttentionPattern(Protocol):
    """Which keys each query sees, in a form that can be computed span by span, as ranks do."""

    @property
    def code(self) -> str:
        """Names the content of the pattern: equal exactly for equal patterns."""
        ...

    @property
    def spans(self) -> SpanAttention:
        """Its attention span by span."""
        ...
