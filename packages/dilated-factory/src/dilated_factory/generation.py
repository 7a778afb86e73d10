"""Sampling bytes from a language model."""

import torch
from torch import Tensor

from dilated_factory.errors import InputError
from dilated_factory.longnet import LongNetLM


@torch.no_grad()
def generate(
    model: LongNetLM,
    prompt: bytes,
    *,
    max_bytes: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> bytes:
    """Continue ``prompt`` by ``max_bytes`` bytes; return the continuation.

    The same arguments give the same bytes. The model sees the last ``config.context`` bytes.
    Each byte costs a forward pass over all of them.

    Args:
        model: predicts bytes.
        prompt: at least one byte.
        max_bytes: how many bytes to add, 0 or more.
        temperature: 0 takes the likeliest byte; below 1 is more careful than the model.
        top_k: sample among the k likeliest bytes only; None means all.
        seed: of the draws, 0 to 2**63 - 1.

    Raises:
        InputError: (a ValueError) an argument is out of its range.
    """
    _check(prompt, max_bytes, temperature, top_k, seed)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    tokens = list(prompt)
    for _ in range(max_bytes):
        window = torch.tensor([tokens[-model.config.context :]], device=device)
        logits = model.head(model.hidden_states(window)[0, -1]).double().cpu()
        tokens.append(_sample(logits, temperature, top_k, generator))
    model.train(training)
    return bytes(tokens[len(prompt) :])


def _check(prompt: bytes, max_bytes: int, temperature: float, top_k: int | None, seed: int) -> None:
    if not prompt:
        raise InputError("prompt must hold at least one byte. Got none.")
    if max_bytes < 0:
        raise InputError(f"max_bytes must not be negative. Got {max_bytes}.")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature must be finite and not negative. Got {temperature}.")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1. Got {top_k}.")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must be in [0, 2**63). Got {seed}.")


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    # Subtracting the maximum first: a tiny temperature must not overflow.
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
