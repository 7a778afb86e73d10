"""LongNet attention of one sequence over all GPUs of a machine, up to a billion tokens, checked.

Each rank holds a shard of the sequence. Inputs come from a counter, so that any row of any rank can
be made again anywhere: sampled rows of out, grad_query, grad_key and grad_value, those of the
sparsest branches among them, are held against float64 sums over regenerated rows. Then the time of
forward and of forward and backward, against the same shard attended alone on one GPU, bytes on the
wire against the formula, and peak memory.

    python benchmarks/billion.py                               # one GPU, 134,217,728 tokens
    torchrun --nproc-per-node 2 benchmarks/billion.py          # two GPUs, 268,435,456 tokens
    torchrun --nproc-per-node 8 benchmarks/billion.py          # eight GPUs, 1,073,741,824 tokens
    torchrun --nproc-per-node 2 benchmarks/billion.py --device cpu --tokens-per-rank 4096
    python benchmarks/billion.py --dry-run 8                   # shapes and bytes without GPUs
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from _machine import describe
from torch import Tensor

from dilated_core import DilatedPattern, _rows, dilated_attention
from dilated_core._dropout import mix
from dilated_ring import ring_attention

# The error of a row in bfloat16, relative to its norm; what torch's fused attention loses is about
# a third of it.
ROW_ERROR = 0.01
ROWS_AT_ONCE = 1 << 18
QUERY, KEY, VALUE, UPSTREAM = 0x51, 0x4B, 0x56, 0x55


class Work(NamedTuple):
    """What is computed: N tokens in shards of n rows, H heads of D."""

    pattern: DilatedPattern
    length: int
    shard: int
    heads: int
    head_dim: int
    is_causal: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def start(self) -> int:
        """Position of this rank's first row."""
        return dist.get_rank() * self.shard

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return self.head_dim**-0.5

    def made(self, kind: int, positions: Tensor) -> Tensor:
        """Rows (n, H, D) of a tensor: uniform numbers of unit variance, from a hash."""
        state = mix(mix(positions & 0xFFFFFFFF) ^ (kind * 0x01000193))
        column = torch.arange(self.heads * self.head_dim, device=positions.device)
        bits = mix(state[:, None] ^ mix(column * 0x9E37 + kind)[None])
        unit = (bits >> 8).to(torch.float32) / 2**24
        values = ((unit - 0.5) * math.sqrt(12.0)).to(self.dtype)
        return values.view(-1, self.heads, self.head_dim)

    def shard_of(self, kind: int) -> Tensor:
        """This rank's rows of a tensor, (1, n, H, D)."""
        shape = 1, self.shard, self.heads, self.head_dim
        rows = torch.empty(shape, dtype=self.dtype, device=self.device)
        for first in range(0, self.shard, ROWS_AT_ONCE):
            last = min(self.shard, first + ROWS_AT_ONCE)
            positions = torch.arange(first, last, device=self.device) + self.start
            rows[0, first:last] = self.made(kind, positions)
        return rows

    def shown(self, position: int, head: int, *, to_key: bool = False) -> Tensor:
        """The keys that a query sees, or the queries that see a key, as often as they do."""
        found = [torch.empty(0, dtype=torch.int64)]
        for w, r in self.pattern.branches:
            segment, offset = position // w * w, self.pattern.head_offset(head, self.heads, r)
            if (position - segment) % r == offset:
                found.append(torch.arange(segment + offset, min(segment + w, self.length), r))
        rows = torch.cat(found)
        if self.is_causal:
            rows = rows[rows >= position] if to_key else rows[rows <= position]
        return rows.to(self.device)


def main() -> None:
    """Run, check, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens-per-rank", type=int, default=1 << 27)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--segment-length", type=int, default=2048, help="of the first branch")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--check-rows", type=int, default=256, help="queries held against float64")
    parser.add_argument("--check-keys", type=int, default=16, help="keys held against float64")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs; the median counts")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", type=int, metavar="RANKS", help="one rank, nothing computed")
    parser.add_argument("--json", type=Path, help="append the result to this file")
    parser.add_argument("--png", type=Path, help="draw all results of the JSON file")
    arguments = parser.parse_args()
    if arguments.dry_run:
        print_row(dry_run(arguments))
        return
    with processes(arguments.device) as device:
        row = measure(arguments, device)
        if dist.get_rank() == 0:
            print_row(row)
            write(row, arguments.json, arguments.png)


@contextmanager
def processes(kind: str) -> Iterator[torch.device]:
    """The process group that torchrun describes, or one of this process alone."""
    os.environ.setdefault("MASTER_ADDR", "localhost")
    os.environ.setdefault("MASTER_PORT", "29517")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(
        backend, rank=rank, world_size=world, device_id=device if kind == "cuda" else None
    )
    yield device
    dist.destroy_process_group()


def work_of(arguments: argparse.Namespace, world: int, device: torch.device) -> Work:
    """What the arguments ask for."""
    length = arguments.tokens_per_rank * world
    pattern = DilatedPattern.longnet(length, segment_length=arguments.segment_length)
    return Work(
        pattern, length, arguments.tokens_per_rank, arguments.heads, arguments.head_dim,
        arguments.causal, torch.bfloat16 if device.type == "cuda" else torch.float32, device,
    )  # fmt: skip


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Everything about one size, the same on all ranks."""
    work = work_of(arguments, dist.get_world_size(), device)
    trains = not arguments.forward_only
    query, key, value = (work.shard_of(kind) for kind in (QUERY, KEY, VALUE))
    for x in (query, key, value):
        x.requires_grad_(trains)
    upstream = work.shard_of(UPSTREAM) if trains else None

    def attend(*, alone: bool = False) -> tuple[Tensor, Tensor]:
        found: Any
        if alone:
            found = dilated_attention(
                query, key, value, DilatedPattern.longnet(
                    work.shard, segment_length=arguments.segment_length
                ), is_causal=work.is_causal, return_lse=True,
            )  # fmt: skip
        else:
            found = ring_attention(
                query, key, value, work.pattern, is_causal=work.is_causal, return_lse=True
            )
        return found

    def forward(*, alone: bool = False) -> None:
        with torch.no_grad():
            attend(alone=alone)

    def both(*, alone: bool = False) -> None:
        out, _ = attend(alone=alone)
        torch.autograd.grad(out, (query, key, value), upstream)

    if trains:
        with counted() as received:
            out, lse = attend()
            grads = torch.autograd.grad(out, (query, key, value), upstream)
    else:
        with torch.no_grad(), counted() as received:
            out, lse = attend()
        grads = ()
    errors = check(work, arguments, out.detach(), lse.detach(), [g[0] for g in grads])
    del out, lse, grads
    row: dict[str, Any] = {
        "gpus": dist.get_world_size(), "tokens": work.length, "heads": work.heads,
        "head_dim": work.head_dim, "is_causal": work.is_causal,
        "branches": len(work.pattern.branches),
        "machine": describe(device), "bytes received": received[0],
        "bytes by the formula": formula(work, trains=trains), **errors,
    }  # fmt: skip
    flops = work.pattern.flops(work.length, work.heads, work.head_dim, is_causal=work.is_causal)
    for name, function, factor in (("forward", forward, 1.0), ("forward+backward", both, 3.5)):
        if function is both and not trains:
            continue
        reset_peak(device)
        seconds = timed(function, arguments.rounds, device)
        peak = peak_bytes(device)
        alone = timed(lambda f=function: f(alone=True), arguments.rounds, device)
        row[name] = {
            "seconds": seconds, "tokens/s": work.length / seconds,
            "TFLOP/s per GPU": flops * factor / seconds / 1e12 / row["gpus"],
            "seconds of a shard alone": alone, "efficiency": alone / seconds,
            # All that a rank loses by not being alone, of which waiting for messages is a part.
            "exposed communication, at most": max(0.0, 1 - alone / seconds), "peak bytes": peak,
        }  # fmt: skip
    return row


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that this rank receives from others by all-to-all."""
    received, inner = [0], dist.all_to_all_single

    def count(output: Tensor, input: Tensor, *rest: Any, **named: Any) -> Any:
        rank, splits = dist.get_rank(), rest[0] if rest else named.get("output_split_sizes")
        own = splits[rank] if splits else output.shape[0] // dist.get_world_size()
        row = output[0].numel() * output.element_size() if output.shape[0] else 0
        received[0] += (output.shape[0] - own) * row
        return inner(output, input, *rest, **named)

    dist.all_to_all_single = count
    try:
        yield received
    finally:
        dist.all_to_all_single = inner


def formula(work: Work, *, trains: bool) -> int:
    """Bytes that a rank receives, rank 0 if causal: (g - 1) S for each branch as wide as g shards.

    S holds the dilated keys and values of a rank. The backward sends float32 gradients of the rows
    that this rank lent, to it.
    """
    size = torch.empty((), dtype=work.dtype).element_size()
    total = 0
    for w, r in work.pattern.branches:
        ranks = min(w, work.length) // work.shard
        if ranks > 1:
            rows = (ranks - 1) * (work.shard // r) * work.heads * work.head_dim * 2
            total += 0 if work.is_causal else rows * size  # rank 0 has nothing before it
            total += rows * max(4, size) if trains else 0
    return total


def check(
    work: Work, arguments: argparse.Namespace, out: Tensor, lse: Tensor, grads: list[Tensor]
) -> dict[str, float]:
    """The largest relative error of sampled rows over all ranks; raises where one is wrong."""
    generator = torch.Generator().manual_seed(work.length)
    rows = sample(work, arguments.check_rows, generator)
    keys = sample(work, arguments.check_keys, generator) if grads else []
    worst: dict[str, float] = {}

    def compare(name: str, actual: Tensor, exact: Tensor, terms: Tensor | None = None) -> None:
        size = exact.norm()
        # A gradient through a softmax over one key is nothing: it is held against what cancels.
        if terms is not None and size < 1e-6 * terms.norm():
            size = terms.norm()
        error = float((actual.double() - exact).norm() / size)
        if not error < ROW_ERROR:
            raise AssertionError(f"{name} has a row that is off by {error:.3g}.")
        worst[name] = max(worst.get(name, 0.0), error)

    for position, head in rows:
        local = position - work.start
        if not 0 <= local < work.shard:
            continue
        shown = work.shown(position, head)
        q = work.made(QUERY, shown.new_tensor([position]))[0, head].double()
        k, v = (work.made(kind, shown)[:, head].double() for kind in (KEY, VALUE))
        weights = torch.softmax(k @ q * work.scale, 0)
        compare("out", out[0, local, head], weights @ v)
        exact_lse = torch.logsumexp(k @ q * work.scale, 0)
        compare("lse", lse[0, head, local], exact_lse)
        if grads:
            do = work.made(UPSTREAM, shown.new_tensor([position]))[0, head].double()
            dp = v @ do
            ds = weights * (dp - weights @ dp)
            terms = (weights * dp).abs() @ k.abs() * work.scale
            compare("grad_query", grads[0][local, head], ds @ k * work.scale, terms)
    for position, head in keys:
        here = work.shown(position, head, to_key=True)
        here = here[(here >= work.start) & (here < work.start + work.shard)]
        at = torch.tensor([position], device=work.device)
        k, v = (work.made(kind, at)[0, head].double() for kind in (KEY, VALUE))
        q, do = (work.made(kind, here)[:, head].double() for kind in (QUERY, UPSTREAM))
        local = here - work.start
        p = torch.exp(q @ k * work.scale - lse[0, head, local].double())
        delta = (do * out[0, local, head].double()).sum(-1)
        dp = do @ v
        terms = (p * dp).abs() @ q.abs() * work.scale
        exact = torch.stack([(p * (dp - delta)) @ q * work.scale, p @ do, terms])
        dist.all_reduce(exact)
        if 0 <= position - work.start < work.shard:
            compare("grad_key", grads[1][position - work.start, head], exact[0], exact[2])
            compare("grad_value", grads[2][position - work.start, head], exact[1])
    names = ["out", "lse", *(["grad_query", "grad_key", "grad_value"] if grads else [])]
    found = torch.tensor([worst.get(name, 0.0) for name in names], device=work.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return {f"error of {name}": float(x) for name, x in zip(names, found, strict=True)}


def sample(work: Work, count: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """(position, head) pairs: a half anywhere, a half among rows that sparse branches keep."""
    pairs = []
    for index in range(count):
        head = int(torch.randint(work.heads, (), generator=generator))
        position = int(torch.randint(work.length, (), generator=generator))
        if index % 2:
            w, r = work.pattern.branches[-1 - index // 2 % len(work.pattern.branches)]
            offset = work.pattern.head_offset(head, work.heads, r)
            first = position // w * w
            position = min(first + (position - first) // r * r + offset, work.length - 1)
        pairs.append((position, head))
    return pairs


def timed(function: Callable[[], None], rounds: int, device: torch.device) -> float:
    """Median seconds of the slowest rank."""
    function()
    seconds = []
    for _ in range(rounds):
        wait(device)
        dist.barrier()
        start = time.perf_counter()
        function()
        wait(device)
        seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def wait(device: torch.device) -> None:
    """Until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Start to watch peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Peak memory of tensors on a rank; None where it is not counted."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def dry_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The last of many ranks with tensors that hold nothing: shapes and bytes come out right."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # What holds nothing need not be cut into pieces that fit a cache.
    _rows._CALL_ELEMENTS = 1 << 62
    world = arguments.dry_run
    dist.init_process_group("fake", rank=world - 1, world_size=world, store=FakeStore())
    with FakeTensorMode():
        work = work_of(arguments, world, torch.device("cpu"))._replace(dtype=torch.bfloat16)
        shape = 1, work.shard, work.heads, work.head_dim
        query, key, value = (
            torch.empty(shape, dtype=work.dtype, requires_grad=True) for _ in range(3)
        )
        with counted() as received:
            out: Any = ring_attention(
                query, key, value, work.pattern, is_causal=work.is_causal, validate="off"
            )
            grads = torch.autograd.grad(out, (query, key, value), torch.empty_like(out))
        assert all(x.shape == shape for x in (out, *grads))
    dist.destroy_process_group()
    held = 8 * math.prod(shape) * 2
    return {
        "gpus": world, "tokens": work.length, "heads": work.heads, "dry run of rank": world - 1,
        "bytes received": received[0], "bytes by the formula": formula(work, trains=True),
        "bytes of q, k, v, out and gradients": held,
    }  # fmt: skip


def print_row(row: dict[str, Any]) -> None:
    """One line for each figure."""
    for name, value in row.items():
        for inner, figure in value.items() if isinstance(value, dict) else [("", value)]:
            text = f"{figure:,}" if isinstance(figure, int) else figure
            text = f"{figure:.6g}" if isinstance(figure, float) else text
            print(f"{name} {inner}".ljust(46), text, flush=True)


def write(row: dict[str, Any], to_json: Path | None, to_png: Path | None) -> None:
    """Append to the file of results, and draw all of them."""
    rows = [row]
    if to_json is not None:
        if to_json.exists():
            rows = [*json.loads(to_json.read_text()), row]
        to_json.write_text(json.dumps(rows, indent=1) + "\n")
    if to_png is None:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in ("forward", "forward+backward"):
        for gpus in sorted({r["gpus"] for r in rows}):
            points = sorted(
                (r["tokens"], r[name]["seconds"] / r["tokens"] * gpus * 1e9)
                for r in rows if name in r and r["gpus"] == gpus
            )  # fmt: skip
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=f"{name}, {gpus} GPUs")
    axes.set(xscale="log", xlabel="tokens", ylabel="GPU ns per token", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(to_png, dpi=120)


if __name__ == "__main__":
    main()
