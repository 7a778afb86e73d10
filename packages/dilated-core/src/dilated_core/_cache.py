"""Decoding state whose size does not grow with the context.

A later query sees, in a branch, only the kept rows of the segment it lies in. So a branch of
segment length w and dilation rate r needs ceil(w / r) rows for each key head and offset, however
long the context is: bytes go with the sum of w / r.
B batch, L new rows, H query heads, H_kv key heads, D head_dim.
"""

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from dilated_core._call import Scores, check_call, check_lengths
from dilated_core._held_rows import HeldRows
from dilated_core._pattern import DilatedPattern


class DilatedKVCache:
    """Keys and values that later queries of one attention layer can still see.

    Memory is taken at the first call and then stays the same, and where it is. Decoding token by
    token, in chunks, or a prompt at once all equal the full causal forward. No gradients: use it
    under torch.no_grad() or torch.inference_mode().

    A CUDA graph can hold `attend` of one new row, after a first call outside of it: a replay reads
    where each batch row is from the device, and counts there. From the capture on, `length` waits
    for the device; `truncate`, `reset`, and `reorder` to as many rows leave the graph valid.

    Shapes: batch B, rows of a call L, heads H, key and value heads H_kv, width of a head D.

    Args:
        pattern: which keys a query sees.

    Examples:
        >>> pattern = DilatedPattern([8, 32], [1, 4])
        >>> q, k, v = torch.randn(3, 1, 30, 4, 16)
        >>> cache = DilatedKVCache(pattern)
        >>> prompt = cache.attend(q[:, :29], k[:, :29], v[:, :29])
        >>> token = cache.attend(q[:, 29:], k[:, 29:], v[:, 29:])
        >>> whole = dilated_attention(q, k, v, pattern, is_causal=True)
        >>> torch.allclose(token, whole[:, 29:], atol=1e-5)
        True
    """

    def __init__(self, pattern: DilatedPattern) -> None:
        if not isinstance(pattern, DilatedPattern):
            raise TypeError(f"pattern must be a DilatedPattern. Got {type(pattern).__name__}.")
        self.pattern = pattern
        self._held: HeldRows | None = None
        # The position of all rows, or None where only the device knows it, or they differ.
        self._position: int | None = 0
        # Lengths after the last truncation, and before it: what rows it left follows from both.
        self._cut: tuple[Tensor, Tensor] | None = None

    def __repr__(self) -> str:
        return f"DilatedKVCache({self.pattern!r}, length={self.length}, nbytes={self.nbytes})"

    @property
    def length(self) -> int:
        """Positions seen so far, of the batch row that has seen most."""
        if self._position is None:
            return max(self.lengths.tolist(), default=0)
        return self._position

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, positions that each batch row has seen; (0,) before the first call."""
        return torch.zeros(0, dtype=torch.int64) if self._held is None else self._held.lengths

    @property
    def nbytes(self) -> int:
        """Bytes held: 0 before the first call, then constant."""
        return 0 if self._held is None else sum(x.nbytes for x in self._held.tensors)

    @property
    def can_be_captured(self) -> bool:
        """Whether a CUDA graph can hold `attend` of one new row: a first call says of what kind."""
        return self._held is not None and self._held.has_kernel

    def next_positions(self, count: int, device: torch.device) -> Tensor:
        """Positions of the next rows: (count,) int64, or (B, count) where batch rows differ.

        In a CUDA graph, and compiled for CUDA, they are (B, count), read from the device.
        """
        if self._position is not None and not _in_graph(device):
            return torch.arange(self._position, self._position + count, device=device)
        return self.lengths[:, None] + torch.arange(count, device=device)

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
        """Append the next rows and attend them causally to all rows so far.

        Args:
            query: (B, L, H, D), the next rows: of batch row b those at positions lengths[b] and
                after it, as `lengths` of the cache says before the call.
            key: (B, L, H_kv, D).
            value: (B, L, H_kv, D).
            scale: factor on the scores; 1 / sqrt(D) when None.
            key_padding_mask: (B, L) bool, True = ignore this key now and later. It has a position
                all the same.
            lengths: (B,) int64 on query's device, 0 to L (on a GPU others count as the nearer of
                these): only so many rows of each batch row are real, the first. Of the others,
                which have no position, nothing is kept, and their output is 0. All when None.

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
        if lengths is not None:
            check_lengths("lengths", lengths, query.shape[:2], query.device)
            # On a GPU they are not looked at, since the host would wait.
            lengths = lengths.clamp(0, query.shape[1])
        held, in_graph = self._held, _in_graph(query.device)
        captured = in_graph and not torch.compiler.is_compiling()
        if held is not None:
            held.check_fits(query, key)
        elif not captured:
            held = HeldRows(self.pattern, query.shape[2], key)
        if held is None or (captured and (query.shape[1] != 1 or not held.has_kernel)):
            raise RuntimeError(
                "a CUDA graph can hold a DilatedKVCache's attend only for one row of 16 or 32 bits "
                "and a head_dim of at most 256, after a first call outside of it. "
                f"Got {query.dtype} of {tuple(query.shape)}{', the first' if held is None else ''}."
            )
        if query.shape[1] == 1 and held.has_kernel:
            out = held.decode(scores, lengths, query, key, value)
        else:
            out = self._attend(held, scores, lengths, query, key, value)
            # Nothing of the cache changes before all that may fail is done.
            held.append(self._position, lengths, key, value, key_padding_mask)
        self._held = held
        if in_graph and query.shape[1] == 1:
            self._position = None
        elif lengths is not None:
            self._position = _common(held.lengths)
        elif self._position is not None:
            self._position += query.shape[1]
        return out

    def _attend(
        self, held: HeldRows, scores: Scores, lengths: Tensor | None, query: Tensor, key: Tensor,
        value: Tensor,
    ) -> Tensor:  # fmt: skip
        count = query.shape[1]
        if self._position is not None:
            out = held.attend(slice(None), self._position, scores, query, key, value)
            out = out.to(query.dtype)
            if lengths is not None:
                padded = torch.arange(count, device=out.device) >= lengths[:, None]
                out.masked_fill_(padded[:, :, None, None], 0.0)
            return out
        # Batch rows side by side that are at one position go together.
        out, start = torch.zeros_like(query), 0
        counts = [count] * len(query) if lengths is None else lengths.tolist()
        places = zip(held.lengths.tolist(), counts, strict=True)
        for (position, real), alike in groupby(places):
            batch = slice(start, start + len(list(alike)))
            start = batch.stop
            if real:
                mask = scores.key_padding_mask
                how = (
                    scores if mask is None else scores._replace(key_padding_mask=mask[batch, :real])
                )
                rows = [x[batch, :real] for x in (query, key, value)]
                out[batch, :real] = held.attend(batch, position, how, *rows)
        return out

    def reorder(self, index: Tensor) -> None:
        """Take batch rows `index` (B',) int64, as beam search does; B' may differ from B."""
        if self._held is None:
            return
        cut = self._cut and (self._cut[0][index.cpu()], self._cut[1][index.cpu()])
        self._held.reorder(index)
        self._cut = cut

    def truncate(self, length: int | Tensor) -> None:
        """Forget the positions from `length` on.

        Of each branch the rows of one segment are held: that of the last position that was seen.

        Args:
            length: one for all batch rows, of which shorter ones stay as they are, or (B,) int64.

        Raises:
            TypeError: `length` is neither an int nor an int64 tensor.
            ValueError: `length` is negative, above the current length, or lies in a segment whose
                rows are no longer held.
        """
        now = self.lengths.tolist()
        if isinstance(length, Tensor):
            check_lengths("length", length, (len(now), None), length.device)
            given, most = length.tolist(), now
        elif isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"length must be an int or a Tensor. Got {length!r}.")
        else:
            # Before the first call there is one row to speak of, which has seen nothing.
            now = now or [0]
            given, most = [length] * len(now), [max(now)] * len(now)
        wanted, seen = list(map(min, given, now)), self._seen(now)
        for i, number in enumerate(given):
            if not 0 <= number <= most[i]:
                raise ValueError(f"length must be between 0 and {most[i]}. Got {number}.")
            for w in self.pattern.segment_lengths:
                start = max(seen[i] - 1, 0) // w * w
                if wanted[i] % w and wanted[i] // w * w != start:
                    within = f"between {start} and {now[i]}, or " if start < now[i] else ""
                    raise ValueError(
                        f"length must be {within}a multiple of segment length {w}: the rows of "
                        f"other segments are no longer held. Got {number}."
                    )
        if self._held is not None:
            self._cut = torch.tensor(wanted), torch.tensor(seen)
            self._go_to(self._cut[0])

    def _seen(self, now: list[int]) -> list[int]:
        """The length of each batch row when a row of it was last appended."""
        if self._cut is None:
            return now
        # Where the length is still that of the truncation, nothing was appended since.
        cut, before = (x.tolist() for x in self._cut)
        return [b if n == c else n for n, c, b in zip(now, cut, before, strict=True)]

    def bookmark(self, count: int) -> Callable[[], None]:
        """What brings the cache back to where it is now, for calls over several layers that fail.

        Not within a CUDA graph.

        Args:
            count: at most so many rows are appended meanwhile.

        Returns:
            A function to call at most once, and before anything but `attend`.
        """
        held, position, cut = self._held, self._position, self._cut
        if held is None:
            return self._forget
        if _in_graph(held.key.device):
            return lambda: None
        # Rows that a later segment's take the place of are lost but for a copy.
        kept = None
        if count > 1 and (
            position is None
            or any(
                position % w and position // w != (position + count - 1) // w
                for w in self.pattern.segment_lengths
            )
        ):
            kept = held.padded, [x.clone() for x in held.tensors]
        lengths = (
            held.lengths.clone() if position is None else torch.full_like(held.lengths, position)
        )

        def back() -> None:
            if kept is None:
                seen = torch.tensor(self._seen(lengths.tolist()))
                self._cut = lengths.cpu(), torch.maximum(held.lengths.cpu(), seen)
                held.lengths.copy_(lengths)
            else:
                held.padded, tensors = kept
                for mine, old in zip(held.tensors, tensors, strict=True):
                    mine.copy_(old)
                self._cut = cut
            self._position = position

        return back

    def _forget(self) -> None:
        self._held, self._position, self._cut = None, 0, None

    def reset(self) -> None:
        """Forget everything, and keep the memory for the next sequence of the same shape."""
        self._cut = None
        self._go_to(torch.zeros(len(self.lengths), dtype=torch.int64))

    def _go_to(self, lengths: Tensor) -> None:
        self.lengths.copy_(lengths)
        self._position = _common(lengths)


def _in_graph(device: torch.device) -> bool:
    """Whether a graph is being made that is to serve wherever rows are: of CUDA, or compiled."""
    if device.type != "cuda":
        return False
    return torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


def _common(lengths: Tensor) -> int | None:
    """The one length of all batch rows; None where they differ, or it would have to be awaited."""
    if not lengths.is_cpu:
        return None
    different = set(lengths.tolist())
    return different.pop() if len(different) == 1 else None if different else 0
