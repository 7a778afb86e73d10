"""Byte Markov models, the baselines that a language model has to beat."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_COUNTED_AT_ONCE = 2**22


class MarkovModel:
    """Predicts a byte from the ``order`` bytes before it, counted in training data.

    Interpolated Witten-Bell smoothing (Witten & Bell 1991): with c(h) occurrences of history h,
    followed by t(h) different bytes, P(b | h) = (c(h, b) + t(h) P'(b | h')) / (c(h) + t(h)), where
    h' is h without its first byte; below order 0 is the uniform distribution.

    Args:
        order: 0, 1 or 2.
        windows: uint8 tensors (..., length); each row is counted on its own, so no history
            crosses from one window into another. Several where lengths differ.
    """

    def __init__(self, order: int, windows: Tensor | Sequence[Tensor]) -> None:
        if order not in (0, 1, 2):
            raise ValueError(f"order must be 0, 1 or 2. Got {order}.")
        self.order = order
        given = [windows] if isinstance(windows, Tensor) else windows
        rows = [each.reshape(-1, each.shape[-1]) for each in given]
        probabilities = torch.full((1, 256), 1 / 256)
        for k in range(order + 1):
            probabilities = _interpolate(_counts(rows, k), probabilities)
        self._bits = -probabilities.log2()

    def bits_per_byte(self, data: Tensor, sections: Iterable[range]) -> float:
        """Mean bits of the bytes of ``data``, uint8 (length,), that the sections cover.

        The first ``order`` bytes of the data have no full history and must not be covered.
        """
        total, count = 0.0, 0
        for section in sections:
            if section.start < self.order:
                raise ValueError(f"sections must start at {self.order} or later. Got {section}.")
            row = data[section.start - self.order : section.stop].unsqueeze(0)
            total += self._bits.flatten()[_codes(row, self.order)].sum(dtype=torch.float64).item()
            count += len(section)
        return total / max(1, count)


def _interpolate(counts: Tensor, lower: Tensor) -> Tensor:
    """Smooth counts (256 ** k, 256) with the probabilities of the order below."""
    seen = counts.sum(dim=1, keepdim=True)
    kinds = (counts > 0).sum(dim=1, keepdim=True)
    # Row h of the order below is h without its first byte: h modulo the number of its rows.
    prior = lower.repeat(len(counts) // len(lower), 1)
    smoothed = (counts + kinds * prior) / (seen + kinds).clamp(min=1)
    return torch.where(seen > 0, smoothed, prior)


def _counts(windows: Sequence[Tensor], order: int) -> Tensor:
    """How often each byte follows each history: float32 (256 ** order, 256)."""
    total = torch.zeros(256 ** (order + 1), dtype=torch.int64)
    parts = (part for rows in windows for part in rows.split(1024) if part.shape[1] > order)
    pending: list[Tensor] = []
    for part in parts:
        pending.append(_codes(part, order).flatten())
        # Counting passes over all of the table, so short windows are counted together.
        if sum(map(len, pending)) >= _COUNTED_AT_ONCE:
            total += torch.bincount(torch.cat(pending), minlength=len(total))
            pending = []
    if pending:
        total += torch.bincount(torch.cat(pending), minlength=len(total))
    return total.view(-1, 256).to(torch.float32)


def _codes(rows: Tensor, order: int) -> Tensor:
    """Each run of ``order + 1`` bytes as one number, the oldest byte most significant."""
    length = rows.shape[1] - order
    codes = torch.zeros(rows.shape[0], length, dtype=torch.int64)
    for k in range(order + 1):
        codes = codes * 256 + rows[:, k : k + length]
    return codes
