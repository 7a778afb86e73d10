"""The memory pool: cost of a lease, threads, large temporaries, fragmentation of two workloads.

Candidates are measured in turn, round by round, so that a drifting machine hits them alike; times
are medians of the rounds, spreads the distance of the quartiles over the median, and ratios
medians of each round's ratio. The logs are recorded here from small real runs: one rank of a ring
attention, forward and backward, over several lengths, and a transformer that trains with its
activations parked in the pool. Torch computes with one thread.

    ./noxw -s bench -- pool.py [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _machine import describe
from torch import Tensor, nn

from dilated_pool import EventLog, UnifiedMemoryPool, offload_activations, replay

Row = dict[str, Any]
MIB = 1 << 20


def main() -> None:
    """Run all measurements and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", help="also write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe()
    print(json.dumps(machine))
    results: list[Row] = []
    for measure in (lease_cost, thread_scaling, temporaries, fragmentation):
        rows = list(measure(arguments.rounds))
        results += rows
        print_table(rows)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "results": results}, file, indent=1)


def lease_cost(rounds: int) -> Iterator[Row]:
    """One thread, a small tensor, a warm class."""
    pool = UnifiedMemoryPool()
    shape, dtype = (4, 256), torch.float32

    def borrow() -> None:
        with pool.borrow(shape, dtype=dtype, device="cpu"):
            pass

    def lease() -> None:
        pool.lease(shape, dtype=dtype, device="cpu").release()

    def empty() -> None:
        torch.empty(shape, dtype=dtype, device="cpu")

    times = in_turn({"empty": empty, "borrow": borrow, "lease": lease}, rounds, repeats=10_000)
    for name in ("empty", "borrow", "lease"):
        yield {
            "measure": "lease cost",
            "name": name,
            "microseconds": 1e6 * statistics.median(times[name]),
            "spread": spread(times[name]),
            "times_empty": ratio(times[name], times["empty"]),
        }


def thread_scaling(rounds: int) -> Iterator[Row]:
    """Total calls per second of several threads that share one pool."""
    pool = UnifiedMemoryPool()

    def borrow() -> None:
        with pool.borrow((4, 256)):
            pass

    def empty() -> None:
        torch.empty((4, 256))

    for name, call in (("empty", empty), ("borrow", borrow)):
        alone = 0.0
        for threads in (1, 2, 4, 8):
            rates = [throughput(call, threads) for _ in range(rounds)]
            rate = statistics.median(rates)
            alone = alone or rate
            yield {
                "measure": "threads",
                "name": name,
                "threads": threads,
                "thousand_calls_per_second": rate / 1e3,
                "spread": spread(rates),
                "times_one_thread": rate / alone,
            }


def throughput(call: Callable[[], None], threads: int, seconds: float = 0.2) -> float:
    """Return how often per second all threads together get through the call."""
    counts = [0] * threads
    start = threading.Barrier(threads + 1)
    stop = threading.Event()

    def work(index: int) -> None:
        start.wait()
        while not stop.is_set():
            for _ in range(50):
                call()
            counts[index] += 50

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    start.wait()
    began = time.perf_counter()
    time.sleep(seconds)
    stop.set()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - began)


def temporaries(rounds: int) -> Iterator[Row]:
    """A CPU tensor that is allocated, filled and dropped."""
    pool = UnifiedMemoryPool()
    for size in (1, 16, 64, 256):
        shape = (size * MIB // 4,)

        def fresh(shape: tuple[int, ...] = shape) -> None:
            torch.empty(shape).fill_(1.0)

        def pooled(shape: tuple[int, ...] = shape) -> None:
            with pool.borrow(shape) as tensor:
                tensor.fill_(1.0)

        repeats = max(1, 64 // size)
        times = in_turn({"fresh": fresh, "pooled": pooled}, rounds, repeats=repeats)
        yield {
            "measure": "temporary",
            "mebibytes": size,
            "fresh_milliseconds": 1e3 * statistics.median(times["fresh"]),
            "fresh_spread": spread(times["fresh"]),
            "pooled_milliseconds": 1e3 * statistics.median(times["pooled"]),
            "pooled_spread": spread(times["pooled"]),
            "speedup": ratio(times["fresh"], times["pooled"]),
        }


def fragmentation(_: int) -> Iterator[Row]:
    """Replay each log in a pool that keeps idle blocks within the overhead, and in one without."""
    logs = {
        "ring attention, three lengths": ring_log(),
        "training, one length": training_log((512,) * 6),
        "training, three lengths": training_log((512, 384, 640) * 2),
    }
    for name, log in logs.items():
        for overhead in (1.25, None):
            result = replay(log, UnifiedMemoryPool(overhead=overhead))
            stats = result.stats
            yield {
                "measure": "replay",
                "log": name,
                "overhead": overhead,
                "leases": stats.total_leases,
                "hit_rate": stats.hit_rate,
                "peak_live_mebibytes": stats.peak_live_bytes / MIB,
                "peak_reserved_mebibytes": stats.peak_reserved_bytes / MIB,
                "fragmentation": stats.fragmentation,
            }


def ring_log() -> EventLog:
    """Record the buffers of rank 0 of a ring of four, three lengths in turn, twice."""
    pool = UnifiedMemoryPool()
    with pool.record() as log:
        for length in (1024, 768, 1280) * 2:
            shards = [torch.randn(3, 8, length // 4, 64) for _ in range(4)]
            ring_rank(pool, shards)
    assert pool.outstanding() == ()
    return log


def ring_rank(pool: UnifiedMemoryPool, shards: list[Tensor]) -> None:
    """Attention of the first shard's queries to all shards, and its backward, with a unit upstream.

    Keys and values arrive in two buffers that take turns; their gradients travel with them.
    """
    query, rows = shards[0][0], shards[0].shape[2]
    out = pool.lease(query.shape)
    lse = pool.lease(query.shape[:-1])
    out.tensor.zero_()
    lse.tensor.fill_(-torch.inf)
    for pair in arrivals(pool, shards):
        with pool.borrow((8, rows, rows)) as scores, pool.borrow(query.shape) as part:
            torch.matmul(query, pair[0].mT, out=scores)
            part_lse = scores.logsumexp(-1)
            torch.matmul(scores.sub_(part_lse[..., None]).exp_(), pair[1], out=part)
            total = torch.logaddexp(lse.tensor, part_lse)
            out.tensor.mul_((lse.tensor - total).exp_()[..., None])
            out.tensor.add_(part.mul_((part_lse - total).exp_()[..., None]))
            lse.tensor.copy_(total)
    with pool.borrow(query.shape) as gradient:
        gradient.zero_()
        delta = out.tensor.sum(-1)
        for pair in arrivals(pool, shards):
            with (
                pool.borrow((2, *query.shape)) as pair_gradient,
                pool.borrow((8, rows, rows)) as weights,
                pool.borrow((8, rows, rows)) as scores,
            ):
                torch.matmul(query, pair[0].mT, out=weights)
                weights.sub_(lse.tensor[..., None]).exp_()
                torch.matmul(weights.mT, torch.ones_like(query), out=pair_gradient[1])
                torch.matmul(torch.ones_like(query), pair[1].mT, out=scores)
                scores.sub_(delta[..., None]).mul_(weights)
                torch.matmul(scores.mT, query, out=pair_gradient[0])
                gradient.add_(scores @ pair[0])
    out.release()
    lse.release()


def arrivals(pool: UnifiedMemoryPool, shards: list[Tensor]) -> Iterator[Tensor]:
    """Yield keys and values of all shards, the next of which arrive while one is in use."""
    shape = shards[0][1:].shape
    coming = pool.lease(shape)
    coming.tensor.copy_(shards[0][1:])
    for shard in [*shards[1:], None]:
        here = coming
        if shard is not None:
            coming = pool.lease(shape)
            coming.tensor.copy_(shard[1:])
        yield here.tensor
        here.release()


def training_log(lengths: tuple[int, ...]) -> EventLog:
    """Record what a small transformer saves for backward, one step for each length."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
    net = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(net.parameters())
    pool = UnifiedMemoryPool()
    with pool.record() as log:
        for length in lengths:
            optimizer.zero_grad()
            with offload_activations(pool, min_bytes=0):
                loss = net(torch.randn(4, length, 128)).square().mean()
            loss.backward()
            optimizer.step()
    assert pool.outstanding() == ()
    return log


def in_turn(
    calls: dict[str, Callable[[], None]], rounds: int, *, repeats: int
) -> dict[str, list[float]]:
    """Return the seconds per call of each candidate in each round, after one round unmeasured."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            if round_ > 0:
                times[name].append((time.perf_counter() - start) / repeats)
    return times


def ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median of each round's ratio."""
    pairs = zip(numerators, denominators, strict=True)
    return statistics.median(numerator / denominator for numerator, denominator in pairs)


def spread(values: list[float]) -> float:
    """Return the distance of the quartiles over the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def print_table(rows: list[Row]) -> None:
    """Print rows that have the same columns."""
    cells = [list(rows[0]), *([_short(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(map(str.rjust, line, widths)))
    print(flush=True)


def _short(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
