"""Held-out bits per byte against context, on the same bytes for every context.

Scored tokens, which by default are bytes, are cut into chunks of half a context. A chunk is scored
by one window of ``context`` tokens that ends with it, so each token is predicted from at least
context / 2 + 1 and at most ``context`` tokens before it. The scored tokens themselves are the same
at every context, which makes the numbers comparable with each other and with the Markov baselines.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_factory.errors import CorpusError, InputError
from dilated_factory.models.head_loss import head_loss
from dilated_factory.models.longnet import LongNetLM

# Tokens of input per forward call: short windows are batched up to it.
_CALL_TOKENS = 16384


@dataclass(frozen=True)
class ContextScore:
    """Mean bits per byte at one context, in tokens, over ``scored_bytes`` bytes.

    ``sections`` are the bits per byte of each of the sections that the bytes lie in, which are the
    same at each context.
    """

    context: int
    bits_per_byte: float
    scored_bytes: int
    sections: tuple[float, ...] = ()


class Gain(NamedTuple):
    """Bits per byte that a longer context saves, the mean over sections and its standard error."""

    bits_per_byte: float
    error: float


def context_gain(short: ContextScore, long: ContextScore) -> Gain:
    """What the longer of two contexts saves, section by section: these are scored at both.

    Sections are far apart, so their differences count as independent; that bytes differ in how
    hard they are is in both scores and cancels.

    Raises:
        ValueError: there are fewer than two sections, or not the same at both.

    Examples:
        >>> short = ContextScore(512, 2.0, 3000, (1.0, 2.0, 3.0))
        >>> long = ContextScore(4096, 1.5, 3000, (0.5, 1.25, 2.75))
        >>> gain = context_gain(short, long)
        >>> gain.bits_per_byte, round(gain.error, 3)
        (0.5, 0.144)
    """
    if not 2 <= len(short.sections) == len(long.sections):
        raise ValueError(
            "scores must have the same two sections or more. "
            f"Got {len(short.sections)} and {len(long.sections)}."
        )
    saved = [a - b for a, b in zip(short.sections, long.sections, strict=True)]
    return Gain(statistics.fmean(saved), statistics.stdev(saved) / math.sqrt(len(saved)))


def fitting_contexts(length: int, *, shortest: int = 512, longest: int = 16384) -> tuple[int, ...]:
    """Contexts from ``shortest`` to ``longest``, doubling, that held-out data of a length can fill.

    Raises:
        CorpusError: not even the shortest fits.
    """
    contexts = []
    context = shortest
    while context <= longest and context + 1 <= length:
        contexts.append(context)
        context *= 2
    if not contexts:
        raise CorpusError(f"held-out data must hold at least {shortest + 1} tokens. Got {length}.")
    return tuple(contexts)


def scored_sections(length: int, longest: int, max_tokens: int) -> list[range]:
    """Which tokens of held-out data to score: sections of longest / 2, spread evenly.

    Every section has longest / 2 + 1 tokens of history or more. About ``max_tokens`` tokens are
    scored, at least one section.

    Raises:
        CorpusError: the data is shorter than the longest context and one token.
    """
    if length < longest + 1:
        raise CorpusError(
            f"held-out data must hold at least context + 1 = {longest + 1} tokens. Got {length}."
        )
    size = longest // 2
    first, last = size + 1, length - size
    count = max(1, min(max_tokens, last - first + size) // size)
    gap = (last - first) / (count - 1) if count > 1 else 0.0
    starts = [first + int(index * gap) for index in range(count)]
    return [range(start, start + size) for start in starts]


def evaluate_contexts(
    model: LongNetLM,
    data: Tensor,
    contexts: Sequence[int],
    *,
    max_tokens: int = 131072,
    bytes_in: Callable[[Tensor], float] = torch.numel,
    device: torch.device | str = "cpu",
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> list[ContextScore]:
    """Score held-out ``data``, uint8 or int32 (length,), at each context; see the module for how.

    Args:
        model: what predicts.
        data: what is predicted.
        contexts: in tokens, even, each a divisor of the longest.
        max_tokens: about how many tokens are scored at each context.
        bytes_in: how many bytes some of the data stands for.
        device: where the model is.
        on_progress: is told what is scored and which share of all is done, from 0 to 1.

    Raises:
        InputError: a context is odd, or does not divide the longest one.
        CorpusError: the data is shorter than the longest context.
    """
    longest = max(contexts)
    for context in contexts:
        if context < 2 or context % 2 or longest % context:
            raise InputError(f"contexts must be even and divide the longest. Got {context}.")
    sections = scored_sections(len(data), longest, max_tokens)
    sizes = [bytes_in(data[part.start : part.stop]) for part in sections]
    scored_bytes = sum(sizes)
    training = model.training
    model.eval()
    scores = []
    for done, context in enumerate(contexts):

        def show(share: float, done: int = done, context: int = context) -> None:
            on_progress(f"scoring at context {context}", (done + share) / len(contexts))

        bits = _bits(model, data, sections, context, torch.device(device), show)
        each = tuple(x / max(1.0, size) for x, size in zip(bits, sizes, strict=True))
        mean = sum(bits) / max(1.0, scored_bytes)
        scores.append(ContextScore(context, mean, round(scored_bytes), each))
    model.train(training)
    return scores


@torch.no_grad()
def _bits(
    model: LongNetLM,
    data: Tensor,
    sections: list[range],
    context: int,
    device: torch.device,
    on_progress: Callable[[float], None],
) -> list[float]:
    """The bits of each section."""
    half = context // 2
    most = max(1, _CALL_TOKENS // context)
    found = []
    for done, section in enumerate(sections):
        on_progress(done / len(sections))
        total = 0.0
        for part in torch.split(torch.tensor(section[::half]) - half - 1, most):
            windows = data[part.unsqueeze(1) + torch.arange(context + 1)].to(device, torch.int64)
            hidden = model.hidden_states(windows[:, :-1])[:, half:].flatten(0, 1)
            total += head_loss(hidden, model.head.weight, windows[:, half + 1 :].flatten()).item()
        found.append(total / math.log(2))
    on_progress(1.0)
    return found
