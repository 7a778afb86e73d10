"""Ring attention on several ranks: weak scaling, exposed communication, bytes on the wire.

    torchrun --standalone --nproc-per-node 2 benchmarks/ring.py
    torchrun --standalone --nproc-per-node 2 benchmarks/ring.py --device cpu --tokens 8192 --heads 4

Every rank has the same number of tokens. Candidates, each a forward and a backward:

- alone: one rank's tokens by `dilated_attention`, with the LongNet pattern of that length.
- local: the same with the LongNet pattern of the whole length, which has more branches: what a rank
  does without the others.
- ring: `ring_attention` of all ranks' tokens, with the LongNet pattern of the whole length.
- no exchange: the same, but nothing moves and what should arrive is garbage.
- all-gather: the same, but all keys and values are gathered before, and all their gradients, in
  float32, scattered after: what a rank pays that does not know its pattern.
- dense ring and, with --lucidrains, that of `ring_attention_pytorch`: every token sees every token,
  at fewer tokens, since that work grows with their square.

Weak scaling is alone / ring; exposed is 1 - no exchange / ring. A time is that of the slowest rank;
the candidates of a row take turns, and the least of the rounds counts. Rows are written as they
come, the ones of weak scaling first.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from _machine import describe
from torch import Tensor

from dilated_core import DilatedPattern, dilated_attention
from dilated_ring import ring_attention
from dilated_ring._exchange import Wire

Inputs = tuple[Tensor, Tensor, Tensor]
Candidate = Callable[[], None]


def main() -> None:
    """Measure, and print a table on rank 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, default=1 << 20, help="of each rank")
    parser.add_argument("--dense-tokens", type=int, default=1 << 14, help="of each rank; 0: none")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument(
        "--lucidrains",
        action="store_true",
        help="also its ring, which ends the process where its kernels do not compile",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="write the results to this file")
    arguments = parser.parse_args()
    device = start(arguments.device)
    world_size = dist.get_world_size()
    machine = describe(device) | {"ranks": world_size, "backend": dist.get_backend()}
    say(json.dumps(machine))
    rows: list[dict[str, Any]] = []
    for row in measure(arguments, device):
        say("  ".join(f"{name}={value}" for name, value in row.items()))
        rows.append(row)
        if arguments.json and dist.get_rank() == 0:
            with open(arguments.json, "w", encoding="utf-8") as file:
                json.dump({"machine": machine, "rows": rows}, file, indent=1)
    dist.destroy_process_group()


def start(kind: str) -> torch.device:
    """Form the process group; return this rank's device."""
    if kind == "cpu":
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    # So that what is to be sent does not wait behind a kernel that fills the GPU.
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    dist.init_process_group("nccl", device_id=device, pg_options=options)
    return device


def say(text: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """The rows of the table."""
    kinds = [weak_scaling]
    if dist.get_world_size() > 1:
        kinds += [against_all_gather, *[dense] * (arguments.dense_tokens > 0)]
    for kind in kinds:
        for is_causal in (False, True):
            yield {"row": kind.__name__, "causal": is_causal} | kind(arguments, device, is_causal)


def dilated(
    arguments: argparse.Namespace, device: torch.device, is_causal: bool
) -> tuple[Inputs, DilatedPattern, Candidate]:
    """This rank's inputs, the pattern of the whole length, and ring attention of both."""
    inputs = random_inputs(arguments, arguments.tokens, device)
    whole = DilatedPattern.longnet(arguments.tokens * dist.get_world_size())
    ring = partial(
        train, ring_attention, inputs, whole, is_causal=is_causal, strategy=arguments.strategy
    )
    return inputs, whole, ring


def weak_scaling(
    arguments: argparse.Namespace, device: torch.device, is_causal: bool
) -> dict[str, Any]:
    """One rank's work alone, by all ranks, and without what moves between them."""
    tokens, world_size = arguments.tokens, dist.get_world_size()
    inputs, whole, ring = dilated(arguments, device, is_causal)
    one = DilatedPattern.longnet(tokens)
    candidates: dict[str, Candidate] = {
        "alone": partial(train, dilated_attention, inputs, one, is_causal=is_causal),
        "ring": ring,
    }
    if world_size > 1:
        candidates["no exchange"] = partial(without_exchange, ring)
        candidates["local"] = partial(train, dilated_attention, inputs, whole, is_causal=is_causal)
    milliseconds = times(candidates, arguments.rounds, device)
    row: dict[str, Any] = {"tokens a rank": tokens} | written(milliseconds)
    row["alone / ring"] = round(milliseconds["alone"] / milliseconds["ring"], 4)
    if world_size > 1:
        row["local / ring"] = round(milliseconds["local"] / milliseconds["ring"], 4)
        row["exposed"] = round(1 - milliseconds["no exchange"] / milliseconds["ring"], 4)
        row["bytes"] = counted_bytes(ring)
        row["formula"] = formula(arguments, whole, inputs[0], is_causal)
    return row


def against_all_gather(
    arguments: argparse.Namespace, device: torch.device, is_causal: bool
) -> dict[str, Any]:
    """Ring attention, and what it takes with all keys and values gathered."""
    inputs, _, ring = dilated(arguments, device, is_causal)
    candidates: dict[str, Candidate] = {
        "ring": ring,
        "all-gather": partial(with_all_gather, inputs, ring),
    }
    milliseconds = times(candidates, arguments.rounds, device)
    return {"tokens a rank": arguments.tokens} | written(milliseconds)


def dense(arguments: argparse.Namespace, device: torch.device, is_causal: bool) -> dict[str, Any]:
    """Every token sees every token."""
    candidates = dense_candidates(arguments, device, is_causal)
    milliseconds = times(candidates, arguments.rounds, device)
    return {"tokens a rank": arguments.dense_tokens} | written(milliseconds)


def written(milliseconds: dict[str, float]) -> dict[str, float]:
    """Times as columns of a row."""
    return {f"{name} ms": round(ms, 3) for name, ms in milliseconds.items()}


def random_inputs(arguments: argparse.Namespace, tokens: int, device: torch.device) -> Inputs:
    """Fresh q, k, v (1, n, H, D) that require gradients."""
    shape = 1, tokens, arguments.heads, arguments.head_dim
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(dist.get_rank())
    query, key, value = (
        torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in "qkv"
    )
    return query, key, value


def train(function: Callable[..., Any], inputs: Inputs, *arguments: Any, **options: Any) -> None:
    """A forward and a backward."""
    out = function(*inputs, *arguments, **options)
    torch.autograd.grad(out, inputs, out.detach())


class _Done:
    """A collective that had nothing to do."""

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


@contextmanager
def replaced_swap(swap: Callable[..., Any]) -> Iterator[None]:
    """Exchange rows by another function than ring attention's."""
    exact = Wire.swap
    Wire.swap = swap  # type: ignore[method-assign]  # what the other function is there for
    try:
        yield
    finally:
        Wire.swap = exact  # type: ignore[method-assign]  # as above


def without_exchange(ring: Candidate) -> None:
    """Ring attention in which nothing moves."""
    with replaced_swap(lambda *_: _Done()):
        ring()


def with_all_gather(inputs: Inputs, ring: Candidate) -> None:
    """Gather all keys and values first, and scatter all their gradients last."""
    world_size = dist.get_world_size()
    for x in inputs[1:]:
        dist.all_gather([torch.empty_like(x) for _ in range(world_size)], x.detach())
    without_exchange(ring)
    for x in inputs[1:]:
        grads = x.new_empty((world_size, *x.shape), dtype=torch.float32)
        parts = torch.empty_like(grads)
        dist.all_to_all_single(parts, grads)
        parts.sum(0)


def dense_candidates(
    arguments: argparse.Namespace, device: torch.device, is_causal: bool
) -> dict[str, Candidate]:
    """Dense attention by our ring and, if asked for, by lucidrains'."""
    tokens = arguments.dense_tokens
    inputs = random_inputs(arguments, tokens, device)
    pattern = DilatedPattern([tokens * dist.get_world_size()], [1])
    found: dict[str, Candidate] = {
        "dense ring": partial(
            train, ring_attention, inputs, pattern, is_causal=is_causal, strategy="ring"
        )
    }
    if arguments.lucidrains:
        if device.type == "cuda":
            from ring_attention_pytorch.ring_flash_attention_cuda import (
                ring_flash_attn_cuda as other,
            )
        else:
            from ring_attention_pytorch.ring_flash_attention import ring_flash_attn as other
        found["lucidrains"] = partial(
            train, other, inputs, None, is_causal, min(1024, tokens), ring_reduce_col=True
        )
    return found


def times(candidates: dict[str, Candidate], rounds: int, device: torch.device) -> dict[str, float]:
    """Least milliseconds of each, on the slowest rank; the first round only warms up.

    Every other round goes backwards: what ran just before leaves caches and memory behind.
    """
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, candidate in list(candidates.items())[:: -1 if number % 2 else 1]:
            wait_for_all(device)
            started = time.perf_counter()
            candidate()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken = torch.tensor(time.perf_counter() - started, device=device)
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            if number:
                found[name].append(1e3 * float(taken))
    return {name: min(taken) for name, taken in found.items()}


def wait_for_all(device: torch.device) -> None:
    """Start together."""
    dist.all_reduce(torch.zeros((), device=device))
    if device.type == "cuda":
        torch.cuda.synchronize()


def counted_bytes(ring: Candidate) -> int:
    """Bytes that the last rank, which receives most, gets in a forward and a backward."""
    counted = 0
    exact = Wire.swap

    def swap(wire: Wire, received: Tensor, sent: Tensor, rows: list[int], *rest: Any) -> Any:
        nonlocal counted
        others = sum(rows) - rows[dist.get_rank()]
        counted += others * received[:1].nbytes if others else 0
        return exact(wire, received, sent, rows, *rest)

    with replaced_swap(swap):
        ring()
    return from_last_rank(counted)


def from_last_rank(number: int) -> int:
    """The last rank's number, on all ranks."""
    numbers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return int(numbers[-1])


def formula(
    arguments: argparse.Namespace, pattern: DilatedPattern, query: Tensor, is_causal: bool
) -> int:
    """Bytes of "gather" on the last rank: (g - 1) S a branch, and gradients of as many in float32.

    When causal, the last rank gets no gradients: it is the first of no segment.
    """
    tokens, world_size = query.shape[1], dist.get_world_size()
    vectors = 0
    for width, rate in pattern.branches:
        ranks = min(width // tokens, world_size)
        if ranks > 1:
            kept = sum(
                -(-(tokens - pattern.head_offset(head, arguments.heads, rate)) // rate)
                for head in range(arguments.heads)
            )
            vectors += 2 * (ranks - 1) * kept * arguments.head_dim
    return vectors * (query.element_size() + (0 if is_causal else 4))


if __name__ == "__main__":
    main()
