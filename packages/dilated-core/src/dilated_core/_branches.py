"""What a dilated pattern is made of, as data, and which heads keep which rows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Self

from dilated_core import _checks
from dilated_core._caches import remembered

HeadOffsets = Literal["interleaved", "blocked"]
HeadGroups = Literal["shared", "split"]


class Branch(NamedTuple):
    """One (segment length, dilation rate) pair of a pattern.

    Examples:
        >>> DilatedPattern([64, 256], [1, 4]).branches[1]
        Branch(segment_length=256, dilation_rate=4)
    """

    segment_length: int
    dilation_rate: int


class Stream(NamedTuple):
    """The heads of a branch that keep the same rows.

    Attributes:
        offset: the residue modulo the dilation rate, inside a segment, of the rows they keep.
        heads: the query heads, rising.
    """

    offset: int
    heads: tuple[int, ...]


def validate_segment_dilation_match(
    segment_lengths: Sequence[int], dilation_rates: Sequence[int]
) -> None:
    """Raise unless both are non-empty lists of positive ints of one length.

    Examples:
        >>> validate_segment_dilation_match([64, 256], [1, 4])
        >>> validate_segment_dilation_match([64, 256], [1])
        Traceback (most recent call last):
        ValueError: ...
    """
    lengths = _checks.positive_ints("segment_lengths", segment_lengths)
    rates = _checks.positive_ints("dilation_rates", dilation_rates)
    if len(lengths) != len(rates):
        raise ValueError(
            "segment_lengths and dilation_rates must have the same number of entries. "
            f"Got {len(lengths)} in segment_lengths={list(lengths)} "
            f"and {len(rates)} in dilation_rates={list(rates)}."
        )


@dataclass(frozen=True, init=False, eq=False)
class Branches:
    """The facts of a pattern, for code below `DilatedPattern`, which says what they mean.

    Two are equal, and hash alike, where their codes are.
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    head_offsets: HeadOffsets
    head_groups: HeadGroups
    count_padding: bool
    _code: str = field(repr=False)

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

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Branches):
            return NotImplemented
        return self._code == other._code

    def __hash__(self) -> int:
        return hash(self._code)

    @property
    def code(self) -> str:
        """The pattern as a string, the form in which custom operators take it."""
        return self._code

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

    def streams(self, heads: int) -> tuple[tuple[Stream, ...], ...]:
        """For each branch, the heads that keep the same rows, offsets rising.

        Heads that keep no row, because their offset lies beyond the segment, are in none.
        """
        found = []
        for (w, r), users in zip(self.branches, self.branch_heads(heads), strict=True):
            kept: dict[int, list[int]] = {}
            for head in users:
                kept.setdefault(self.head_offset(head, heads, r), []).append(head)
            found.append(tuple(Stream(s, tuple(kept[s])) for s in sorted(kept) if s < w))
        return tuple(found)

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
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
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

    @classmethod
    @remembered(256)
    def from_code(cls, code: str) -> Self:
        """The pattern of a `code`."""
        return cls.from_dict(json.loads(code))

    def __repr__(self) -> str:
        parts = [f"{list(self.segment_lengths)}", f"{list(self.dilation_rates)}"]
        if self.head_offsets != "interleaved":
            parts.append(f"head_offsets={self.head_offsets!r}")
        if self.head_groups != "shared":
            parts.append(f"head_groups={self.head_groups!r}")
        if self.count_padding:
            parts.append("count_padding=True")
        return f"{type(self).__name__}({', '.join(parts)})"
