"""Decoding state whose size does not grow with the context.

A later query sees, in a branch, only the kept rows of the segment it lies in. So a branch of
segment length w and dilation rate r needs ceil(w / r) rows for each key head and offset, however
long the context is: bytes go with the sum of w / r.
B batch, L new rows, H query heads, H_kv key heads, D head_dim.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core._call import DilatedCall, check_call
from dilated_core._partial import Partial, merge_
from dilated_core._pattern import DilatedPattern
from dilated_core._schedules.runs import head_strides
from dilated_core._torch import dense
from dilated_core._torch.engine import attend_wide


class DilatedKVCache:
    """Keys and values that later queries of one attention layer can still see.

    Memory is taken at the first call and then stays the same. Decoding token by token, in chunks,
    or a prompt at once all equal the full causal forward. No gradients: use it under
    torch.no_grad() or torch.inference_mode().

    Args:
        pattern: which keys a query sees.

    Attributes:
        length: positions seen so far.
    """

    def __init__(self, pattern: DilatedPattern) -> None:
        if not isinstance(pattern, DilatedPattern):
            raise TypeError(f"pattern must be a DilatedPattern. Got {type(pattern).__name__}.")
        self.pattern = pattern
        self.length = 0
        self._branches: list[_BranchCache] = []
        self._heads = 0

    def __repr__(self) -> str:
        return f"DilatedKVCache({self.pattern!r}, length={self.length}, nbytes={self.nbytes})"

    @property
    def nbytes(self) -> int:
        """Bytes held: 0 before the first call, then constant."""
        return sum(x.nbytes for branch in self._branches for x in branch.tensors)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Append the next rows and attend them causally to all rows so far.

        Args:
            query: (B, L, H, D), the rows at positions length ... length + L - 1.
            key: (B, L, H_kv, D).
            value: (B, L, H_kv, D).
            scale: factor on the scores; 1 / sqrt(D) when None.
            key_padding_mask: (B, L) bool, True = ignore this key now and later.

        Returns:
            (B, L, H, D) in query's dtype.

        Raises:
            TypeError, ValueError: naming the argument, what it must be, and what it was.
            RuntimeError: an input requires gradients.
        """
        scores = check_call(
            query, key, value, scale=scale, key_padding_mask=key_padding_mask, enable_gqa=True
        )._replace(is_causal=True)
        if query.shape[1] != key.shape[1]:
            raise ValueError(f"key must have query's length {query.shape[1]}. Got {key.shape[1]}.")
        self.pattern.branch_heads(query.shape[2])
        if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
            raise RuntimeError(
                "a DilatedKVCache gives no gradients: use torch.no_grad() or inference_mode()."
            )
        if self._branches:
            self._check_fits(query, key)
        call = DilatedCall(self.pattern, scores)
        total = attend_wide(call, query, key, value, start=self.length)
        for branch in self._branches:
            branch.attend(self.length, query, scores.scale, total)
        out = total.out.to(query.dtype)
        # Nothing of the cache changes before all that may fail is done.
        if not self._branches:
            self._branches = list(_allocate(self.pattern, query.shape[2], key))
            self._heads = query.shape[2]
        for branch in self._branches:
            branch.append(self.length, key, value, key_padding_mask)
        self.length += query.shape[1]
        return out

    def _check_fits(self, query: Tensor, key: Tensor) -> None:
        if query.shape[2] != self._heads:
            raise ValueError(
                f"query must have the cache's {self._heads} heads. Got {query.shape[2]}."
            )
        self._branches[0].check_fits(key)

    def reorder(self, index: Tensor) -> None:
        """Take batch rows `index` (B',) int64, as beam search does; B' may differ from B."""
        with torch.inference_mode(False):
            chosen = [
                [x.index_select(0, index) for x in branch.tensors] for branch in self._branches
            ]
        for branch, tensors in zip(self._branches, chosen, strict=True):
            branch.key, branch.value, branch.padding = tensors

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on.

        Of each branch the rows of one segment are held: that of the last position that was seen.

        Raises:
            TypeError: `length` is no int.
            ValueError: `length` is negative, above the current length, or lies in a segment whose
                rows are no longer held.
        """
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"length must be an int. Got {length!r}.")
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be between 0 and {self.length}. Got {length}.")
        for branch in self._branches:
            if not branch.can_continue(length):
                w, held = branch.segment_length, branch.held
                within = f"between {held.start} and {held.stop}, or " if held else ""
                raise ValueError(
                    f"length must be {within}a multiple of segment length {w}: the rows of other "
                    f"segments are no longer held. Got {length}."
                )
        self._forget(length)

    def reset(self) -> None:
        """Forget everything, and keep the memory for the next sequence of the same shape."""
        self._forget(0)

    def _forget(self, length: int) -> None:
        for branch in self._branches:
            branch.held = range(branch.held.start, min(branch.held.stop, length))
        self.length = length


class _Streams(NamedTuple):
    """The streams of one offset: `rows` of the branch's buffers, one for each of `kv_heads`."""

    offset: int
    rows: range
    kv_heads: tuple[int, ...]
    heads: tuple[int, ...]


class _BranchCache:
    """The rows of one segment of one branch: streams (B, S, ceil(w / r), D).

    One stream for each offset and key head that a query head of that offset reads.

    Attributes:
        held: the positions whose rows are there, from the first of a segment on.
    """

    def __init__(self, w: int, r: int, group: int, streams: Sequence[_Streams], key: Tensor):
        self.segment_length, self.dilation_rate, self.group = w, r, group
        self.streams = streams
        count = streams[-1].rows.stop if streams else 0
        shape = (key.shape[0], count, -(-w // r), key.shape[3])
        self.kv_heads = key.shape[2]
        # Tensors made in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            self.key, self.value = key.new_zeros(shape), key.new_zeros(shape)
            self.padding = torch.zeros(shape[:3], dtype=torch.bool, device=key.device)
        self.has_padding = False
        self.held = range(0)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.key, self.value, self.padding

    def check_fits(self, key: Tensor) -> None:
        expected = (self.key.shape[0], self.kv_heads, self.key.shape[3])
        actual = (key.shape[0], key.shape[2], key.shape[3])
        if actual != expected or key.dtype != self.key.dtype or key.device != self.key.device:
            raise ValueError(
                "key must have the cache's (batch, key heads, head_dim), dtype and device "
                f"{expected}, {self.key.dtype}, {self.key.device}. "
                f"Got {actual}, {key.dtype}, {key.device}."
            )

    def can_continue(self, length: int) -> bool:
        """Whether all rows are there that a query at position `length` would see."""
        segment = length // self.segment_length * self.segment_length
        return length == segment or (self.held.start == segment and length <= self.held.stop)

    def _before(self, offset: int, position: int) -> int:
        """Rows of that offset before `position` in its segment."""
        inside = position % self.segment_length
        return max(0, -(-(inside - offset) // self.dilation_rate))

    def _kept(self, offset: int, start: int, stop: int) -> slice:
        """Rows, counted from `start`, that the offset keeps in the segment of `start`."""
        segment = start // self.segment_length * self.segment_length
        first = segment + offset + self._before(offset, start) * self.dilation_rate
        stop = min(stop, segment + self.segment_length)
        return slice(first - start, max(first, stop) - start, self.dilation_rate)

    def attend(self, position: int, query: Tensor, scale: float, total: Partial) -> None:
        """Merge attention of the new rows at `position` to the rows held before them."""
        for offset, rows, kv_heads, heads in self.streams:
            held, kept = (
                self._before(offset, position),
                self._kept(offset, position, position + query.shape[1]),
            )
            if not held or kept.start >= kept.stop:
                continue
            for stride in head_strides(list(heads), self.group):
                h = slice(
                    stride.start, stride.start + (stride.count - 1) * stride.step + 1, stride.step
                )
                wanted = [
                    kv_heads.index(stride.kv_start + i * stride.kv_step)
                    for i in range(stride.count)
                ]
                stream = _pick(wanted, rows.start)
                call = dense.RowAttention(scale, is_causal=False)
                q = query[:, kept, h].transpose(1, 2)
                k, v = self.key[:, stream, :held], self.value[:, stream, :held]
                if self.has_padding:
                    call = call._replace(key_mask=self.padding[:, rows.start, :held])
                part = dense.attend(call, q, k, v)
                views = Partial(total.out[:, kept, h].transpose(1, 2), total.lse[:, h, kept])
                merge_(views, part)

    def append(
        self, position: int, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> None:
        """Keep those of the new rows that lie in the segment of the last one.

        Where they complete it, no later query sees them; they are for `truncate`.
        """
        stop = position + key.shape[1]
        if key_padding_mask is not None:
            self.has_padding = True
        if position == stop:
            return
        segment = (stop - 1) // self.segment_length * self.segment_length
        start = max(position, segment)
        self.held = range(segment, stop)
        new = slice(start - position, None)
        for offset, rows, kv_heads, _ in self.streams:
            held, kept = self._before(offset, start), self._kept(offset, start, stop)
            taken = key[:, new][:, kept]
            at = slice(held, held + taken.shape[1])
            picked = _pick(list(kv_heads), 0)
            streams = slice(rows.start, rows.stop)
            self.key[:, streams, at] = taken[:, :, picked].transpose(1, 2)
            self.value[:, streams, at] = value[:, new][:, kept][:, :, picked].transpose(1, 2)
            if key_padding_mask is not None:
                self.padding[:, streams, at] = key_padding_mask[:, None, new][:, :, kept]
            elif self.has_padding:
                self.padding[:, streams, at] = False


def _pick(indices: list[int], start: int) -> slice | list[int]:
    """An index of evenly spaced entries as a slice, which is a view; otherwise as a list."""
    indices = [i + start for i in indices]
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    if step > 0 and indices == list(range(indices[0], indices[-1] + 1, step)):
        return slice(indices[0], indices[-1] + 1, step)
    return indices


def _allocate(pattern: DilatedPattern, heads: int, key: Tensor) -> Iterator[_BranchCache]:
    group = heads // key.shape[2]
    for (w, r), members in zip(pattern.branches, pattern.branch_heads(heads), strict=True):
        streams: list[_Streams] = []
        for offset in range(min(r, w)):
            kept = tuple(h for h in members if pattern.head_offset(h, heads, r) == offset)
            kv_heads = tuple(sorted({h // group for h in kept}))
            start = streams[-1].rows.stop if streams else 0
            if kept:
                streams.append(
                    _Streams(offset, range(start, start + len(kv_heads)), kv_heads, kept)
                )
        yield _BranchCache(w, r, group, streams, key)
