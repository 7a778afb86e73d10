"""Sampling from a language model, with decoding state that does not grow with the context."""

# Shapes: B batch, N length of the prompt, V vocab_size.

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_core.extending import check_padding_mask
from dilated_factory.configs.models import XPOS_MAX_SPAN, LongNetConfig
from dilated_factory.corpora.tokens import BYTES, Bytes, Tokenizer
from dilated_factory.errors import InputError
from dilated_factory.models.longnet import LeftAligned, LongNetLM
from dilated_factory.models.row_step import RowStep

# Tokens of a prompt that go through the model at once.
PREFILL_CHUNK = 65536
# Fewer steps are done before a CUDA graph of one would be there.
_STEPS_WORTH_A_GRAPH = 8
# How often the host asks a GPU whether all rows have stopped.
_STEPS_BETWEEN_LOOKS = 16


def generate(
    model: LongNetLM,
    prompt: bytes,
    *,
    max_bytes: int,
    tokenizer: Tokenizer = BYTES,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> bytes:
    """Continue ``prompt`` by at most ``max_bytes`` bytes; return the continuation.

    It is shorter where the model ends the document. The same arguments give the same bytes; they
    are those of `generate_tokens`, and the tokenizer is that of the model.

    Raises:
        InputError: (a ValueError) an argument is out of its range.

    Examples:
        >>> shape = LongNetConfig(embed_dim=16, num_heads=2, num_layers=1, context=32)
        >>> len(generate(LongNetLM(shape), b"Any ", max_bytes=8))
        8
    """
    steps = stream_texts(
        model, [prompt], max_bytes=max_bytes, tokenizer=tokenizer, temperature=temperature,
        top_k=top_k, top_p=top_p, seed=seed,
    )  # fmt: skip
    return b"".join(added or b"" for (added,) in steps)


def stream_texts(
    model: LongNetLM,
    prompts: Sequence[bytes],
    *,
    max_bytes: int,
    tokenizer: Tokenizer = BYTES,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[list[bytes | None]]:
    """Continue prompts of any lengths together; yield the bytes of each one's next token.

    They may be a part of a character. None stands for a text that is over: the model ended the
    document, or ``max_bytes`` are there, to which the last token is cut. Tokens that stand for
    nothing are not drawn.

    Raises:
        InputError: (a ValueError) an argument is out of its range.

    Examples:
        >>> model = LongNetLM(LongNetConfig(embed_dim=32, num_heads=4, num_layers=1, context=64))
        >>> len(generate(model, b"def ", max_bytes=5, seed=1))
        5
    """
    if max_bytes < 0:
        raise InputError(f"max_bytes must not be negative. Got {max_bytes}.")
    if not prompts or not all(prompts):
        raise InputError("prompt must hold at least one byte. Got none.")
    size = model.config.vocab_size
    if isinstance(tokenizer, Bytes) and size != 256:
        raise InputError(f"model must have a vocabulary of 256 bytes. Got {size}.")
    if size < tokenizer.vocab_size:
        raise InputError(
            f"model must have the vocabulary of the tokenizer ({tokenizer.vocab_size}). Got {size}."
        )
    rows = tokenizer.encode(prompts)
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise InputError(f"prompt must hold a token of the tokenizer. Got {prompt[:80]!r}.")
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    padding = torch.tensor([[i < longest - len(row) for i in range(longest)] for row in rows])
    stops = () if tokenizer.end_of_document is None else (tokenizer.end_of_document,)
    draw = Draw(temperature, top_k, top_p, _allowed(tokenizer, model))
    steps = stream_tokens(
        model, tokens, padding if padding.any() else None, max_bytes, draw, stops, seed,
        use_cache=True,
    )  # fmt: skip
    left = [max_bytes] * len(rows)
    for step in steps:
        added: list[bytes | None] = []
        for index, token in enumerate(step.tolist()):
            left[index] *= token not in stops
            added.append(tokenizer.tokens[token][: left[index]] if left[index] else None)
            left[index] -= len(added[-1] or b"")
        yield added
        if not any(left):
            return


def drawable(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Which tokens of a model stand for something or end a document, bool (V,)."""
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    allowed[: tokenizer.vocab_size] = tokenizer.sizes > 0
    if tokenizer.end_of_document is not None:
        allowed[tokenizer.end_of_document] = True
    return allowed


def _allowed(tokenizer: Tokenizer, model: LongNetLM) -> Tensor | None:
    allowed = drawable(tokenizer, model.config.vocab_size)
    return None if allowed.all() else allowed.to(next(model.parameters()).device)


@torch.no_grad()
def generate_tokens(
    model: LongNetLM,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    key_padding_mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
    use_cache: bool | None = None,
) -> Tensor:
    """Continue sequences of tokens; return int64 (B, max_new_tokens), on the device of ``tokens``.

    The same arguments give the same tokens. The model sees all tokens so far, those past
    ``config.context`` too: a query looks no farther back than its longest segment.

    On a GPU a CUDA graph of a step, model and draw, is made and replayed, where the kernels of
    decoding serve the model's dtype and head_dim.

    Shapes: batch B, positions N.

    Args:
        model: predicts tokens.
        tokens: the prompts, (B, N) int64 with N >= 1.
        max_new_tokens: how many tokens to add, 0 or more.
        key_padding_mask: (B, N) bool, True = padding; each row is continued from its own end, and
            as it is alone, but for the draws.
        temperature: 0 takes the likeliest token; below 1 is more careful than the model.
        top_k: sample among the k likeliest tokens only; None means all.
        top_p: sample among the likeliest tokens that together have this probability, above 0 and
            at most 1; None means all.
        stop_tokens: a row ends with the first of these; it is repeated to the end of the row.
        seed: of the draws, 0 to 2**63 - 1.
        use_cache: keep decoding state, so that a token costs one position; it needs dilated or
            block-sparse attention. False computes the whole sequence again for each token, with
            any attention. None keeps state where it can be.

    Raises:
        InputError: (a ValueError) an argument is out of its range.

    Examples:
        >>> model = LongNetLM(LongNetConfig(embed_dim=32, num_heads=4, num_layers=1, context=64))
        >>> prompts = torch.randint(256, (2, 10))
        >>> generate_tokens(model, prompts, max_new_tokens=3, temperature=0).shape
        torch.Size([2, 3])
    """
    steps = stream_tokens(
        model, tokens, key_padding_mask, max_new_tokens, Draw(temperature, top_k, top_p),
        stop_tokens, seed, use_cache=model.can_cache if use_cache is None else use_cache,
    )  # fmt: skip
    # Copies: a graph writes each step to the same place.
    added = [step.clone() for step in steps]
    if not added:
        return tokens.new_empty(len(tokens), 0)
    added += [added[-1]] * (max_new_tokens - len(added))
    return torch.stack(added, dim=1).to(tokens.device)


@torch.no_grad()
def stream_tokens(
    model: LongNetLM,
    tokens: Tensor,
    key_padding_mask: Tensor | None,
    max_new_tokens: int,
    draw: "Draw",
    stop_tokens: Sequence[int],
    seed: int,
    *,
    use_cache: bool,
) -> Iterator[Tensor]:
    """`generate_tokens` step by step: the next token of each row, (B,) int64 on the model's device.

    It is over when all rows have stopped; on a GPU a few steps later. What is yielded holds only
    until the next step.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 1 or tokens.dtype != torch.int64:
        raise InputError(
            "tokens must be int64 of shape (B, N) with N >= 1. "
            f"Got {tokens.dtype} of {tuple(tokens.shape)}."
        )
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens must not be negative. Got {max_new_tokens}.")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must be in [0, 2**63). Got {seed}.")
    vocab_size = model.config.vocab_size
    if wrong := [token for token in stop_tokens if not 0 <= token < vocab_size]:
        raise InputError(f"stop_tokens must be in [0, {vocab_size}). Got {wrong[0]}.")
    batch, length = tokens.shape
    check_padding_mask(key_padding_mask, batch, length, tokens.device)
    if key_padding_mask is not None and key_padding_mask.all(1).any():
        raise InputError("key_padding_mask must leave a token in each row. Got a row of padding.")
    _check_span(model.config, length + max_new_tokens)
    generator = torch.Generator().manual_seed(seed)
    chances = torch.rand(max_new_tokens, len(tokens), dtype=torch.float64, generator=generator)
    training = model.training
    model.eval()
    try:
        kind = _Cached if use_cache else _Whole
        continuation = kind(model, tokens, key_padding_mask, draw, stop_tokens, chances)
        yield from continuation.steps()
    finally:
        model.train(training)


@dataclass(frozen=True)
class Draw:
    """How a token is drawn from logits; the first arguments are those of `generate_tokens`.

    Args:
        temperature, top_k, top_p: as there.
        allowed: bool (V,) on the logits' device, tokens that may be drawn; None means all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    allowed: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(
                f"temperature must be finite and not negative. Got {self.temperature}."
            )
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k must be at least 1. Got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1. Got {self.top_p}.")

    def __call__(self, logits: Tensor, chances: Tensor) -> Tensor:
        """Tokens (B,) int64 from logits (B, V) and uniform chances (B,), in chances' dtype."""
        if self.allowed is not None:
            logits = logits.masked_fill(~self.allowed, -torch.inf)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits.to(chances.dtype)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        # Subtracting the maximum first: a tiny temperature must not overflow.
        weights = ((logits - logits.amax(dim=-1, keepdim=True)) / self.temperature).softmax(-1)
        if self.top_p is not None:
            ordered, _ = weights.sort(dim=-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            least = ordered.masked_fill(before >= self.top_p, torch.inf).amin(-1, keepdim=True)
            weights = weights.masked_fill(weights < least, 0.0)
        # One chance a token, the same on every device. Below one it stays below it when rounded.
        ends = weights.cumsum(-1)
        at = ends[:, -1:] * chances[:, None] * (1 - 8 * torch.finfo(chances.dtype).eps)
        return (ends <= at).sum(-1)


class _Continuation:
    """What continues prompts, step by step."""

    def __init__(
        self,
        model: LongNetLM,
        tokens: Tensor,
        key_padding_mask: Tensor | None,
        draw: Draw,
        stop_tokens: Sequence[int],
        chances: Tensor,
    ) -> None:
        self.model, self.draw = model, draw
        device = next(model.parameters()).device
        self.tokens = tokens.to(device)
        self.lengths = torch.full((len(tokens),), tokens.shape[1], device=device)
        self.between: Tensor | None = None
        self.ragged = key_padding_mask is not None
        if key_padding_mask is not None:
            rows = LeftAligned(key_padding_mask.to(device))
            self.tokens = self.tokens.gather(1, rows.index)
            self.lengths = rows.lengths
            # Worth one wait: without it kernels need not look at a mask, now and at every token.
            if rows.between is not None and rows.between.any():
                self.between = rows.between
        # Apple's GPUs have no float64.
        self.chances = chances.to(device, torch.float32 if device.type == "mps" else torch.float64)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.last = torch.zeros(len(tokens), dtype=torch.int64, device=device)
        self.stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
        self.alive = torch.ones(len(tokens), dtype=torch.bool, device=device)
        self.fine = torch.ones((), dtype=torch.bool, device=device)

    def take(self, state: Tensor) -> None:
        """Draw the next token of each row from its last state (B, E)."""
        logits = self.model.head(state)
        drawn = self.draw(logits, self.chances.index_select(0, self.step)[0])
        self.last.copy_(torch.where(self.alive, drawn, self.last))
        self.step += 1
        self.fine &= logits.isfinite().all()
        if len(self.stops):
            self.alive &= (self.last[:, None] != self.stops).all(1)

    def steps(self) -> Iterator[Tensor]:
        """The next token of each row, (B,)."""
        on_cpu, count = self.last.is_cpu, len(self.chances)
        for index, advance in enumerate(self.advances(count)):
            advance()
            look = on_cpu or index == count - 1 or index % _STEPS_BETWEEN_LOOKS == 0
            if look and not self.fine:
                raise InputError("model must predict finite logits. Got NaN or infinite ones.")
            yield self.last
            if look and len(self.stops) and not self.alive.any():
                return

    def advances(self, count: int) -> Iterator[Callable[[], object]]:
        """What brings each of `count` tokens."""
        raise NotImplementedError


class _Whole(_Continuation):
    """Computes the whole sequence again for each token."""

    def advances(self, count: int) -> Iterator[Callable[[], object]]:
        return iter([self._advance] * count)

    def _advance(self) -> None:
        states = self.model.hidden_states(self.tokens, key_padding_mask=self._mask())
        at = (self.lengths - 1)[:, None, None].expand(-1, 1, states.shape[2])
        self.take(states.gather(1, at)[:, 0])
        self.tokens = torch.cat((self.tokens, self.last[:, None]), dim=1)
        self.tokens.scatter_(1, self.lengths[:, None], self.last[:, None])
        self.lengths = self.lengths + 1

    def _mask(self) -> Tensor | None:
        if not self.ragged:
            return None
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        mask = columns >= self.lengths[:, None]
        if self.between is not None:
            mask[:, : self.between.shape[1]] |= self.between
        return mask


class _Cached(_Continuation):
    """Keeps decoding state, so that a token costs one position."""

    def advances(self, count: int) -> Iterator[Callable[[], object]]:
        if not count:
            return
        self.caches = self.model.new_caches(self.tokens.shape[1] + count)
        self.row_step = self._row_step(on="cpu")
        yield self._prefill
        first = 0
        if count - 1 >= _STEPS_WORTH_A_GRAPH and self._fits_a_graph():
            self.row_step = self._row_step(on="cuda")
            # The first step makes what a graph cannot: compiled kernels, workspaces.
            yield lambda: _aside(self._advance)
            first = 1
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._advance()
            advance = graph.replay
        else:
            advance = self._advance
        for _ in range(first, count - 1):
            yield advance

    def _row_step(self, on: str) -> RowStep | None:
        """The model as a step, which copies weights, if it is there and of known modules."""
        fits = self.tokens.device.type == on and RowStep.can_serve(self.model)
        return RowStep(self.model) if fits else None

    def _fits_a_graph(self) -> bool:
        attends = [cache.can_be_captured for cache in self.caches]
        return self.last.is_cuda and all(attends)

    def _prefill(self) -> None:
        """Read the prompts; a long one goes into the caches chunk by chunk."""
        last, start = None, 0
        for part in self.tokens.split(PREFILL_CHUNK, dim=1):
            between = self.between
            if between is not None:
                between = between[:, start : start + part.shape[1]]
            real = (self.lengths - start).clamp(0, part.shape[1]) if self.ragged else None
            states = self.model.hidden_states(
                part, caches=self.caches, key_padding_mask=between, lengths=real
            )
            if real is None:
                last = states[:, -1]
            else:
                at = (real - 1).clamp_(min=0)[:, None, None].expand(-1, 1, states.shape[2])
                here = states.gather(1, at)[:, 0]
                last = here if last is None else torch.where(real[:, None] > 0, here, last)
            start += part.shape[1]
        assert last is not None
        self.take(last)

    def _advance(self) -> None:
        alive = self.alive.long() if len(self.stops) else None
        if self.row_step is not None:
            with torch.inference_mode():
                self.take(self.row_step(self.last[:, None], self.caches, alive))
            return
        state = self.model.hidden_states(self.last[:, None], caches=self.caches, lengths=alive)
        self.take(state[:, 0])


def _aside(function: Callable[[], None]) -> None:
    """Call it on a stream of its own, as a first call before a CUDA graph is to be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)


def _check_span(config: LongNetConfig, length: int) -> None:
    """Raise where the factors of xPos, made for the middle of the context, would leave float32."""
    limit = config.context // 2 + XPOS_MAX_SPAN * config.xpos_scale_base // 2
    if config.positions == "xpos" and length > limit:
        raise InputError(
            f"tokens and max_new_tokens must be at most {limit} together with this model's xPos "
            f"(xpos_scale_base={config.xpos_scale_base}). Got {length}."
        )
