"""Batches drawn by a stateless index: (seed, step) alone decides which tokens a step sees."""

import hashlib

import torch
from torch import Tensor

from dilated_factory.configs.models import TrainConfig
from dilated_factory.errors import CorpusError


def step_seed(seed: int, step: int, purpose: str) -> int:
    """A 63-bit seed for one purpose in one step, independent of every other."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def batch_offsets(length: int, *, context: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Where the windows of a step start: int64 (batch_size,), uniform over the corpus.

    A window covers ``context + 1`` tokens: ``context`` inputs and the token after each.

    Raises:
        CorpusError: the corpus of ``length`` tokens is shorter than one window.
    """
    require_window(length, context)
    generator = torch.Generator().manual_seed(step_seed(seed, step, "batch"))
    return torch.randint(length - context, (batch_size,), generator=generator)


def require_window(length: int, context: int) -> None:
    """Raise CorpusError unless a window fits into a corpus of ``length`` tokens."""
    if length < context + 1:
        raise CorpusError(
            f"the training corpus must hold at least context + 1 = {context + 1} tokens. "
            f"Got {length}."
        )


def gather_windows(data: Tensor, offsets: Tensor, size: int) -> Tensor:
    """Windows of ``size`` tokens at the offsets: int64 (len(offsets), size)."""
    return data[offsets.unsqueeze(1) + torch.arange(size)].to(torch.int64)


def document_starts(ends: Tensor, offsets: Tensor, size: int) -> list[Tensor]:
    """Where documents begin behind the first token of windows of ``size`` tokens.

    Args:
        ends: int64 (documents,), where they end, rising.
        offsets: int64 (B,), of the windows.
        size: tokens of a window.

    Returns:
        For each window, int64 from 1 to size - 1.
    """
    first = torch.searchsorted(ends, offsets, right=True)
    last = torch.searchsorted(ends, offsets + size)
    parts = zip(offsets, first.tolist(), last.tolist(), strict=True)
    # An empty file is no document.
    return [(ends[i:j] - offset).unique() for offset, i, j in parts]


def offsets_of(config: TrainConfig, length: int, step: int) -> tuple[Tensor, int]:
    """Where the windows of a step of a run start, as `batch_offsets`, and their context."""
    context = config.context_at(step)
    many = config.batch_size * (config.model.context // context)
    return batch_offsets(
        length, context=context, batch_size=many, seed=config.seed, step=step
    ), context


def windows_seen(data: Tensor, config: TrainConfig, steps: int) -> list[Tensor]:
    """The windows that the first ``steps`` steps trained on, each of data's dtype.

    Once they would amount to more than the corpus, the corpus itself is the only one.
    """
    if steps * config.batch_size * config.model.context >= len(data):
        return [data]
    drawn = (offsets_of(config, len(data), step) for step in range(steps))
    return [
        data[start : start + context + 1] for starts, context in drawn for start in starts.tolist()
    ]
