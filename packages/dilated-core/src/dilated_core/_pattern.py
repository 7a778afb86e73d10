"""The dilated attention pattern: which keys a query sees, and how often."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from dilated_core import _checks

if TYPE_CHECKING:
    from dilated_core.interfaces import SpanAttention

HeadOffsets = Literal["interleaved", "blocked"]
HeadGroups = Literal["shared", "split"]


class Branch(NamedTuple):
    """One (segment length, dilation rate) pair of a pattern."""

    segment_length: int
    dilation_rate: int


def validate_segment_dilation_match(
    segment_lengths: Sequence[int], dilation_rates: Sequence[int]
) -> None:
    """Raise unless both are non-empty lists of positive ints of one length."""
    lengths = _checks.positive_ints("segment_lengths", segment_lengths)
    rates = _checks.positive_ints("dilation_rates", dilation_rates)
    if len(lengths) != len(rates):
        raise ValueError(
            "segment_lengths and dilation_rates must have the same number of entries. "
            f"Got {len(lengths)} in segment_lengths={list(lengths)} "
            f"and {len(rates)} in dilation_rates={list(rates)}."
        )


@dataclass(frozen=True, init=False)
class DilatedPattern:
    """LongNet's dilated attention pattern (arXiv 2307.02486), exact for any length.

    Branch k cuts the sequence into segments of `segment_lengths[k]` positions. Head h keeps the
    positions whose index inside the segment is congruent to its offset s modulo
    `dilation_rates[k]`. A kept query sees the kept keys of its own segment, and a head's output is
    one softmax over the multiset union of the keys that all branches show it.

    Args:
        segment_lengths: segment length w of each branch, in positions.
        dilation_rates: dilation rate r of each branch.
        head_offsets: "interleaved" (the paper, s = h mod r) or "blocked" (torchscale and
            GigaPath, s = h // ceil(H / r)).
        head_groups: "shared" (every head uses every branch) or "split" (contiguous groups of
            heads use one branch each, the first groups taking the remainder).
        count_padding: in non-causal calls, keep the zero keys with which torchscale fills short
            segments in the softmax. Needed only to reproduce its checkpoints.

    Raises:
        TypeError: an entry is not an int.
        ValueError: a list is empty, has a non-positive entry, or the lists differ in length.
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offsets: HeadOffsets
    head_groups: HeadGroups
    count_padding: bool
    _code: str = field(repr=False, compare=False)

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        head_offsets: HeadOffsets = "interleaved",
        head_groups: HeadGroups = "shared",
        count_padding: bool = False,
    ) -> None:
        validate_segment_dilation_match(segment_lengths, dilation_rates)
        _checks.one_of("head_offsets", head_offsets, ("interleaved", "blocked"))
        _checks.one_of("head_groups", head_groups, ("shared", "split"))
        object.__setattr__(self, "segment_lengths", tuple(segment_lengths))
        object.__setattr__(self, "dilation_rates", tuple(dilation_rates))
        object.__setattr__(self, "head_offsets", head_offsets)
        object.__setattr__(self, "head_groups", head_groups)
        object.__setattr__(self, "count_padding", _checks.boolean("count_padding", count_padding))
        # Made once: torch.compile does not trace json.
        object.__setattr__(self, "_code", json.dumps(self.to_dict()))

    @classmethod
    def longnet(
        cls,
        max_length: int,
        *,
        segment_length: int = 2048,
        growth: int = 2,
        head_offsets: HeadOffsets = "interleaved",
    ) -> "DilatedPattern":
        """Geometric segment lengths and dilation rates, as in the paper (section 2.3).

        Branch i has segment length `segment_length * growth**i` and dilation rate `growth**i`, up
        to the first segment that covers `max_length` positions, so the work per position stays
        below `segment_length * growth / (growth - 1)` keys.
        """
        _checks.positive_int("max_length", max_length)
        _checks.positive_int("segment_length", segment_length)
        if _checks.positive_int("growth", growth) < 2:
            raise ValueError(f"growth must be at least 2. Got {growth}.")
        rates = [1]
        while segment_length * rates[-1] < max_length:
            rates.append(rates[-1] * growth)
        return cls([segment_length * r for r in rates], rates, head_offsets=head_offsets)

    @property
    def code(self) -> str:
        """The pattern as a string, the form in which custom operators take it."""
        return self._code

    @property
    def spans(self) -> "SpanAttention":
        """Attention by this pattern span by span, as sequence-parallel attention takes it."""
        from dilated_core._spans import DilatedSpans  # which computes with patterns

        return DilatedSpans(self)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The (segment length, dilation rate) pairs."""
        return tuple(map(Branch, self.segment_lengths, self.dilation_rates))

    def branch_heads(self, heads: int) -> tuple[range, ...]:
        """The heads that use each branch, one range per branch.

        Raises:
            ValueError: `head_groups="split"` with fewer heads than branches.
        """
        count = len(self.segment_lengths)
        if self.head_groups == "shared":
            return (range(heads),) * count
        if heads < count:
            raise ValueError(
                f'heads must be at least the number of branches ({count}) with head_groups="split".'
                f" Got {heads}."
            )
        base, extra = divmod(heads, count)
        starts = [k * base + min(k, extra) for k in range(count + 1)]
        return tuple(range(a, b) for a, b in pairwise(starts))

    def head_offset(self, head: int, heads: int, dilation_rate: int) -> int:
        """The offset s of a head in a branch of that dilation rate."""
        if self.head_offsets == "interleaved":
            return head % dilation_rate
        return head // -(-heads // dilation_rate)

    def multiplicity(
        self, length: int, heads: int, *, is_causal: bool = False, key_length: int | None = None
    ) -> Tensor:
        """How many branches show each key to each query: the definition, dense.

        Args:
            length: number of query positions N.
            heads: number of query heads H.
            is_causal: a query sees no key after it.
            key_length: number of key positions M, N when None. When causal the queries are the
                last N of the M positions; otherwise both count from position 0.

        Returns:
            int64 tensor of shape (H, N, M). For tests and pictures: it is as large as it looks.
        """
        key_length = length if key_length is None else key_length
        query_positions = torch.arange(length) + (key_length - length if is_causal else 0)
        key_positions = torch.arange(key_length)
        ordered = key_positions <= query_positions[:, None]
        result = torch.zeros(heads, length, key_length, dtype=torch.int64)
        for (w, r), branch_heads in zip(self.branches, self.branch_heads(heads), strict=True):
            same_segment = query_positions[:, None] // w == key_positions // w
            for head in branch_heads:
                offset = self.head_offset(head, heads, r)
                query_kept = query_positions % w % r == offset
                key_kept = key_positions % w % r == offset
                shown = same_segment & query_kept[:, None] & key_kept
                result[head] += shown & ordered if is_causal else shown
        return result

    def zero_keys(self, length: int, heads: int, *, key_length: int | None = None) -> Tensor:
        """How many zero keys `count_padding` adds to each query of a non-causal call.

        Returns:
            int64 tensor of shape (H, N): key slots without a real row, summed over branches.
        """
        key_length = length if key_length is None else key_length
        positions = torch.arange(length)
        result = torch.zeros(heads, length, dtype=torch.int64)
        if not self.count_padding:
            return result
        for (w, r), branch_heads in zip(self.branches, self.branch_heads(heads), strict=True):
            slots = -(-min(w, key_length) // r)
            segment_start = positions // w * w
            rows = (key_length - segment_start).clamp(0, w)
            for head in branch_heads:
                offset = self.head_offset(head, heads, r)
                real = (rows - offset + r - 1).clamp(min=0) // r
                result[head] += torch.where(positions % w % r == offset, slots - real, 0)
        return result

    def flops(self, length: int, heads: int, head_dim: int, *, is_causal: bool = False) -> int:
        """Floating-point operations of one forward: 4 * head_dim per visible pair.

        A key that c branches show counts c times. Closed form: O(branches * heads).
        """
        pairs = 0
        for (w, r), branch_heads in zip(self.branches, self.branch_heads(heads), strict=True):
            segments, tail = divmod(length, w)
            for head in branch_heads:
                offset = self.head_offset(head, heads, r)
                for count, rows_in in ((segments, w), (1, tail)):
                    rows = max(0, -(-(rows_in - offset) // r))
                    pairs += count * (rows * (rows + 1) // 2 if is_causal else rows * rows)
        return 4 * head_dim * pairs

    def to_dict(self) -> dict[str, Any]:
        """A plain dict (lists, strings, bools) that `from_dict` turns back into this pattern."""
        return {
            "segment_lengths": list(self.segment_lengths),
            "dilation_rates": list(self.dilation_rates),
            "head_offsets": self.head_offsets,
            "head_groups": self.head_groups,
            "count_padding": self.count_padding,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "DilatedPattern":
        """Build a pattern from `to_dict`'s form; unknown or missing keys are a ValueError."""
        known = {"segment_lengths", "dilation_rates"}
        optional = {"head_offsets", "head_groups", "count_padding"}
        if unknown := set(data) - known - optional:
            raise ValueError(
                f"data must only have the keys {sorted(known | optional)}. Got {sorted(unknown)}."
            )
        if missing := known - set(data):
            raise ValueError(f"data must have the keys {sorted(known)}. Missing {sorted(missing)}.")
        return cls(**data)

    @staticmethod
    @lru_cache(maxsize=256)
    def from_code(code: str) -> "DilatedPattern":
        """The pattern of a `code`."""
        return DilatedPattern.from_dict(json.loads(code))

    def __repr__(self) -> str:
        parts = [f"{list(self.segment_lengths)}", f"{list(self.dilation_rates)}"]
        if self.head_offsets != "interleaved":
            parts.append(f"head_offsets={self.head_offsets!r}")
        if self.head_groups != "shared":
            parts.append(f"head_groups={self.head_groups!r}")
        if self.count_padding:
            parts.append("count_padding=True")
        return f"DilatedPattern({', '.join(parts)})"
