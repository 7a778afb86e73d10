"""Sampling from a language model, with decoding state that does not grow with the context."""

# Shapes: B batch, N length of the prompt, V vocab_size.

from collections.abc import Sequence

import torch
from torch import Tensor

from dilated_core import DilatedKVCache
from dilated_factory.configs.models import XPOS_MAX_SPAN, LongNetConfig
from dilated_factory.errors import InputError
from dilated_factory.models.longnet import LongNetLM

# Tokens of a prompt that go through the model at once.
PREFILL_CHUNK = 65536


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

    The same arguments give the same bytes; they are those of `generate_tokens`.

    Raises:
        InputError: (a ValueError) an argument is out of its range.
    """
    if not prompt:
        raise InputError("prompt must hold at least one byte. Got none.")
    if model.config.vocab_size != 256:
        raise InputError(
            f"model must have a vocabulary of 256 bytes. Got {model.config.vocab_size}."
        )
    if max_bytes < 0:
        raise InputError(f"max_bytes must not be negative. Got {max_bytes}.")
    added = generate_tokens(
        model,
        torch.tensor([list(prompt)]),
        max_new_tokens=max_bytes,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    return bytes(added[0].tolist())


@torch.no_grad()
def generate_tokens(
    model: LongNetLM,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> Tensor:
    """Continue sequences of tokens; return int64 (B, max_new_tokens), on the device of ``tokens``.

    The same arguments give the same tokens. The model sees all tokens so far, those past
    ``config.context`` too: a query looks no farther back than its longest segment.

    Args:
        model: predicts tokens.
        tokens: the prompts, (B, N) int64 with N >= 1.
        max_new_tokens: how many tokens to add, 0 or more.
        temperature: 0 takes the likeliest token; below 1 is more careful than the model.
        top_k: sample among the k likeliest tokens only; None means all.
        seed: of the draws, 0 to 2**63 - 1.
        use_cache: keep decoding state, so that a token costs one position; it needs dilated
            attention. False computes the whole sequence again for each token, with any attention.

    Raises:
        InputError: (a ValueError) an argument is out of its range.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 1 or tokens.dtype != torch.int64:
        raise InputError(
            "tokens must be int64 of shape (B, N) with N >= 1. "
            f"Got {tokens.dtype} of {tuple(tokens.shape)}."
        )
    _check(max_new_tokens, temperature, top_k, seed)
    _check_span(model.config, tokens.shape[1] + max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    caches = model.new_caches() if use_cache else None
    training = model.training
    model.eval()
    try:
        seen = unread = tokens.to(next(model.parameters()).device)
        for _ in range(max_new_tokens):
            state = _last_state(model, unread if use_cache else seen, caches)
            logits = model.head(state).double().cpu()
            if not logits.isfinite().all():
                raise InputError("model must predict finite logits. Got NaN or infinite ones.")
            unread = _sample(logits, temperature, top_k, generator).to(seen.device)
            seen = torch.cat((seen, unread), dim=1)
    finally:
        model.train(training)
    return seen[:, tokens.shape[1] :].to(tokens.device)


def _last_state(
    model: LongNetLM, tokens: Tensor, caches: Sequence[DilatedKVCache] | None
) -> Tensor:
    """The state (B, E) of the last token; a long prompt goes into the caches chunk by chunk."""
    if caches is None:
        return model.hidden_states(tokens)[:, -1]
    states = [
        model.hidden_states(part, caches=caches)[:, -1]
        for part in tokens.split(PREFILL_CHUNK, dim=1)
    ]
    return states[-1]


def _check(max_new_tokens: int, temperature: float, top_k: int | None, seed: int) -> None:
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens must not be negative. Got {max_new_tokens}.")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature must be finite and not negative. Got {temperature}.")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1. Got {top_k}.")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must be in [0, 2**63). Got {seed}.")


def _check_span(config: LongNetConfig, length: int) -> None:
    """Raise where the factors of xPos, made for the middle of the context, would leave float32."""
    limit = config.context // 2 + XPOS_MAX_SPAN * config.xpos_scale_base // 2
    if config.positions == "xpos" and length > limit:
        raise InputError(
            f"tokens and max_new_tokens must be at most {limit} together with this model's xPos "
            f"(xpos_scale_base={config.xpos_scale_base}). Got {length}."
        )


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> Tensor:
    """Draw from logits (B, V): int64 (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    # Subtracting the maximum first: a tiny temperature must not overflow.
    shifted = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    return torch.multinomial(shifted.softmax(-1), 1, generator=generator)
