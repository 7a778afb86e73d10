"""Held-out bits per byte against context, on the same bytes for every context.

Scored bytes are cut into chunks of half a context. A chunk is scored by one window of ``context``
bytes that ends with it, so each byte is predicted from at least context / 2 + 1 and at most
``context`` bytes before it. The scored bytes themselves are the same at every context, which makes
the numbers comparable with each other and with the Markov baselines.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_factory.errors import CorpusError, InputError
from dilated_factory.models.longnet import LongNetLM

# Bytes of input per forward call: short windows are batched up to it.
_CALL_BYTES = 16384


@dataclass(frozen=True)
class ContextScore:
    """Mean bits per byte at one context, over ``scored_bytes`` bytes."""

    context: int
    bits_per_byte: float
    scored_bytes: int


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
        raise CorpusError(f"held-out data must hold at least {shortest + 1} bytes. Got {length}.")
    return tuple(contexts)


def scored_sections(length: int, longest: int, max_bytes: int) -> list[range]:
    """Which bytes of held-out data to score: sections of longest / 2, spread evenly.

    Every section has longest / 2 + 1 bytes of history or more. About ``max_bytes`` bytes are
    scored, at least one section.

    Raises:
        CorpusError: the data is shorter than the longest context and one byte.
    """
    if length < longest + 1:
        raise CorpusError(
            f"held-out data must hold at least context + 1 = {longest + 1} bytes. Got {length}."
        )
    size = longest // 2
    first, last = size + 1, length - size
    count = max(1, min(max_bytes, last - first + size) // size)
    gap = (last - first) / (count - 1) if count > 1 else 0.0
    starts = [first + int(index * gap) for index in range(count)]
    return [range(start, start + size) for start in starts]


def evaluate_contexts(
    model: LongNetLM,
    data: Tensor,
    contexts: Sequence[int],
    *,
    max_bytes: int = 131072,
    device: torch.device | str = "cpu",
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> list[ContextScore]:
    """Score held-out ``data``, uint8 (length,), at each context; see the module for how.

    Args:
        model: what predicts.
        data: what is predicted.
        contexts: in bytes, even, each a divisor of the longest.
        max_bytes: about how many bytes are scored at each context.
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
    sections = scored_sections(len(data), longest, max_bytes)
    training = model.training
    model.eval()
    scores = []
    for done, context in enumerate(contexts):

        def show(share: float, done: int = done, context: int = context) -> None:
            on_progress(f"scoring at context {context}", (done + share) / len(contexts))

        bits = _mean_bits(model, data, sections, context, torch.device(device), show)
        scores.append(ContextScore(context, bits, len(sections) * len(sections[0])))
    model.train(training)
    return scores


@torch.no_grad()
def _mean_bits(
    model: LongNetLM,
    data: Tensor,
    sections: list[range],
    context: int,
    device: torch.device,
    on_progress: Callable[[float], None],
) -> float:
    half = context // 2
    chunks = [start for section in sections for start in section[::half]]
    starts = torch.tensor(chunks) - half - 1
    total = 0.0
    parts = torch.split(starts, max(1, _CALL_BYTES // context))
    for done, part in enumerate(parts):
        on_progress(done / len(parts))
        windows = data[part.unsqueeze(1) + torch.arange(context + 1)].to(device, torch.int64)
        logits = model.head(model.hidden_states(windows[:, :-1])[:, half:])
        nats = F.cross_entropy(
            logits.float().flatten(0, 1), windows[:, half + 1 :].flatten(), reduction="sum"
        )
        total += nats.item()
    on_progress(1.0)
    return total / math.log(2) / (len(chunks) * half)
