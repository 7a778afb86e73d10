"""The dilated attention pattern: which keys a query sees, and how often."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from dilated_core import _checks, _reference
from dilated_core._branches import Branches, HeadOffsets
from dilated_core._spans import DilatedSpans


@dataclass(frozen=True, init=False, eq=False, repr=False)
class DilatedPattern(Branches):
    """LongNet's dilated attention pattern (arXiv 2307.02486), exact for any length.

    Branch k cuts the sequence into segments of `segment_lengths[k]` positions. Head h keeps the
    positions whose index inside the segment is congruent to its offset s modulo
    `dilation_rates[k]`. A kept query sees the kept keys of its own segment, and a head's output is
    one softmax over the multiset union of the keys that all branches show it.

    Shapes: query positions N, key positions M, heads H.

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

    Examples:
        >>> pattern = DilatedPattern([4, 8], [1, 2])
        >>> pattern.multiplicity(8, heads=2, is_causal=True)[0, 6]  # a row of head 0
        tensor([1, 0, 1, 0, 2, 1, 2, 0])
        >>> DilatedPattern.longnet(16384)
        DilatedPattern([2048, 4096, 8192, 16384], [1, 2, 4, 8])
    """

    @classmethod
    def longnet(
        cls,
        max_length: int,
        *,
        segment_length: int = 2048,
        growth: int = 2,
        head_offsets: HeadOffsets = "interleaved",
    ) -> Self:
        """Geometric segment lengths and dilation rates, as in the paper (section 2.3).

        Branch i has segment length `segment_length * growth**i` and dilation rate `growth**i`, up
        to the first segment that covers `max_length` positions, so the work per position stays
        below `segment_length * growth / (growth - 1)` keys.

        Raises:
            TypeError: a number is no int.
            ValueError: max_length or segment_length is below 1, growth below 2, or head_offsets is
                none of the two.
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
    def spans(self) -> DilatedSpans:
        """Attention by this pattern span by span, as sequence-parallel attention takes it."""
        return DilatedSpans(self)

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

        Raises:
            ValueError: `head_groups="split"` with fewer heads than branches.
        """
        return _reference.multiplicity(self, length, heads, is_causal, key_length)

    def zero_keys(self, length: int, heads: int, *, key_length: int | None = None) -> Tensor:
        """How many zero keys `count_padding` adds to each query of a non-causal call.

        Returns:
            int64 tensor of shape (H, N): key slots without a real row, summed over branches.

        Raises:
            ValueError: as `multiplicity`.
        """
        return _reference.zero_keys(self, length, heads, key_length)

    def flops(self, length: int, heads: int, head_dim: int, *, is_causal: bool = False) -> int:
        """Floating-point operations of one forward: 4 * head_dim per visible pair.

        A key that c branches show counts c times. Closed form: O(branches * heads).

        Raises:
            ValueError: as `multiplicity`.
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
