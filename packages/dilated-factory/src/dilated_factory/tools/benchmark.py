"""Timing attention side by side: the project's backends, dense attention, installed peers."""

import gc
import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_core import Backend, dilated_attention, select_backend
from dilated_factory.configs.attention import AttentionConfig
from dilated_factory.kinds.registry import Registry
from dilated_factory.tools.planning import Workload

# The reference holds all N * N scores of a head in float32 or wider.
REFERENCE_MAX_LENGTH = 4096

# Query, key and value (B, N, H, D) to the output, of the same shape.
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Contender(NamedTuple):
    """One that is timed.

    Attributes:
        name: for tables.
        make: makes its function, or says why there is none; it may fail in any way.
        by_definition: whether it computes the pattern of the workload in all heads, so that the
            operations of the definition are its own.
    """

    name: str
    make: Callable[[], Attention | str]
    by_definition: bool = False


@dataclass(frozen=True)
class Timing:
    """How long one contender took.

    Attributes:
        name: the contender.
        seconds: of each round; empty if it could not run.
        obstacle: why it could not run, in one line.
        flops: operations of a round by the definition; None where it computes something else.
    """

    name: str
    seconds: tuple[float, ...] = ()
    obstacle: str | None = None
    flops: float | None = None

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def least(self) -> float:
        """The quickest round, which other work on the machine disturbed least."""
        return min(self.seconds, default=math.nan)

    @property
    def flops_per_second(self) -> float | None:
        """In the quickest round; None where it did not run or computes something else."""
        return self.flops / self.least if self.flops is not None and self.seconds else None


def contenders(
    workload: Workload, registry: Registry, config: AttentionConfig | None = None
) -> list[Contender]:
    """All that can be timed with a workload.

    Args:
        workload: what they will compute.
        registry: builds `config`.
        config: attention to time beside the others.
    """
    found = [
        Contender(f"dilated, {backend}", partial(_backend, workload, backend), by_definition=True)
        for backend in ("triton", "torch", "reference")
    ]
    if config is not None:
        found.append(
            Contender(f"file: {config.kind}", partial(_of_file, workload, registry, config))
        )
    found.append(Contender("dense, torch SDPA", lambda: partial(_dense, workload)))
    # It computes each branch in a part of the heads only.
    found.append(Contender("dilated-attention-pytorch", partial(_peer, workload)))
    return found


def run(
    workload: Workload,
    entries: Sequence[Contender],
    *,
    rounds: int,
    on_start: Callable[[Contender], None] = lambda contender: None,
    on_done: Callable[[Timing], None] = lambda timing: None,
) -> list[Timing]:
    """Time each contender in turn: one call to warm up, then `rounds` calls.

    One that fails, while it is made or while it runs, does not stop the others.
    """
    timings = []
    for contender in entries:
        on_start(contender)
        try:
            timing = _time(contender, workload, rounds)
        except (Exception, SystemExit) as error:  # a peer may fail in any way
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            timing = Timing(contender.name, obstacle=reason)
        on_done(timing)
        timings.append(timing)
    return timings


def _time(contender: Contender, workload: Workload, rounds: int) -> Timing:
    attention = contender.make()
    if isinstance(attention, str):
        return Timing(contender.name, obstacle=attention)
    query, key, value, upstream = _tensors(workload)
    inputs = [x.requires_grad_(not workload.forward_only) for x in (query, key, value)]

    def once() -> None:
        out = attention(*inputs)
        if not workload.forward_only:
            torch.autograd.grad(out, inputs, upstream)
        if workload.device.startswith("cuda"):
            torch.cuda.synchronize(workload.device)

    once()
    gc.collect()
    flops = workload.forwards * workload.flops() if contender.by_definition else None
    return Timing(contender.name, tuple(_seconds(once) for _ in range(rounds)), flops=flops)


def _tensors(workload: Workload) -> list[Tensor]:
    """Query, key, value and the gradient of the output, (B, N, H, D) each, drawn anew."""
    shape = (workload.batch, workload.length, workload.heads, workload.head_dim)
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator).to(workload.device, workload.dtype)
        for _ in range(4)
    ]


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _backend(workload: Workload, backend: Backend) -> Attention | str:
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


def _of_file(workload: Workload, registry: Registry, config: AttentionConfig) -> Attention:
    module = registry.create(config)
    return lambda q, k, v: module(q, k, v, is_causal=workload.is_causal)


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
