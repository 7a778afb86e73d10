"""Timing attention side by side: the project's backends, dense attention, installed peers."""

import gc
import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_core import DilatedPattern, dilated_attention, select_backend
from dilated_factory.configs.attention import AttentionConfig
from dilated_factory.registry import Registry

# The reference holds all N * N scores of a head in float32 or wider.
REFERENCE_MAX_LENGTH = 4096

# Query, key and value (B, N, H, D) to the output, of the same shape.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Workload:
    """What is timed: one call, and its backward unless `forward_only`."""

    pattern: DilatedPattern
    length: int
    heads: int
    head_dim: int
    batch: int = 1
    is_causal: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    forward_only: bool = False

    def tensors(self) -> list[Tensor]:
        """Query, key, value and the gradient of the output, (B, N, H, D) each, drawn anew."""
        shape = (self.batch, self.length, self.heads, self.head_dim)
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn(shape, generator=generator).to(self.device, self.dtype) for _ in range(4)
        ]

    def flops(self) -> int:
        """Operations of one forward, by the definition of the pattern."""
        one = self.pattern.flops(self.length, self.heads, self.head_dim, is_causal=self.is_causal)
        return self.batch * one


@dataclass(frozen=True)
class Timing:
    """How long one contender took.

    Attributes:
        name: the contender.
        seconds: of each round; empty if it could not run.
        obstacle: why it could not run.
    """

    name: str
    seconds: tuple[float, ...] = ()
    obstacle: str | None = None

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def least(self) -> float:
        """The quickest round, which other work on the machine disturbed least."""
        return min(self.seconds, default=math.nan)


def contenders(
    workload: Workload, registry: Registry, config: AttentionConfig | None = None
) -> Iterator[tuple[str, Attention | str]]:
    """Name and function of each contender, or why there is none.

    Args:
        workload: what they will compute.
        registry: builds `config`.
        config: attention to time beside the others.
    """
    for backend in ("triton", "torch", "reference"):
        yield f"dilated, {backend}", _backend(workload, backend)
    if config is not None:
        module = registry.create(config)
        yield (
            f"file: {config.kind}",
            lambda q, k, v: module(q, k, v, is_causal=workload.is_causal),
        )
    yield "dense, torch SDPA", lambda q, k, v: _dense(workload, q, k, v)
    yield "dilated-attention-pytorch", _peer(workload)


def run(
    workload: Workload,
    entries: Iterator[tuple[str, Attention | str]],
    *,
    rounds: int,
    on_done: Callable[[Timing], None] = lambda timing: None,
) -> list[Timing]:
    """Time each contender in turn: one call to warm up, then `rounds` calls."""
    timings = []
    for name, attention in entries:
        if isinstance(attention, str):
            timing = Timing(name, obstacle=attention)
        else:
            timing = _time(name, attention, workload, rounds)
        on_done(timing)
        timings.append(timing)
    return timings


def _time(name: str, attention: Attention, workload: Workload, rounds: int) -> Timing:
    query, key, value, upstream = workload.tensors()
    inputs = [x.requires_grad_(not workload.forward_only) for x in (query, key, value)]

    def once() -> None:
        out = attention(*inputs)
        if not workload.forward_only:
            torch.autograd.grad(out, inputs, upstream)
        if workload.device.startswith("cuda"):
            torch.cuda.synchronize(workload.device)

    try:
        once()
        gc.collect()
        return Timing(name, tuple(_seconds(once) for _ in range(rounds)))
    except Exception as error:  # a peer may fail in any way; the others still count
        return Timing(name, obstacle=f"{type(error).__name__}: {error}")


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _backend(workload: Workload, backend: str) -> Attention | str:
    if backend == "reference" and workload.length > REFERENCE_MAX_LENGTH:
        return f"it holds all scores: only up to {REFERENCE_MAX_LENGTH} positions"

    if backend == "triton":
        query = torch.empty(
            1, 1, 1, workload.head_dim, dtype=workload.dtype, device=workload.device
        )
        why_not = dict(select_backend(query, query).rejected).get("triton")
        if why_not is not None:
            return why_not

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = dilated_attention(
            query, key, value, workload.pattern, is_causal=workload.is_causal, backend=backend
        )
        assert isinstance(out, Tensor)
        return out

    return attend


def _dense(workload: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=workload.is_causal).transpose(1, 2)


def _peer(workload: Workload) -> Attention | str:
    if importlib.util.find_spec("dilated_attention_pytorch") is None:
        return "not installed"
    peer = importlib.import_module("dilated_attention_pytorch.dilated_attention")
    module = peer.DilatedAttention(
        list(workload.pattern.segment_lengths), list(workload.pattern.dilation_rates)
    )
    return lambda q, k, v: module(q, k, v, is_causal=workload.is_causal)
