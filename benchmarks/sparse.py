"""Block-sparse attention on the CPU against dense attention and FlexAttention.

All candidates run in one process, in turn, so that a drifting machine hits them alike; times are
the least of the rounds. The rate counts the operations of the visible blocks (`blocks`) or only of
the visible token pairs (`pairs`), and is compared with the rate of dense attention.

    ./noxw -s bench -- sparse.py [--flex] [--build] [--rounds N]

For example: ./noxw -s bench -- sparse.py --flex --rounds 5. On a GPU: sparse_gpu.py.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _machine import describe
from torch import Tensor

from dilated_core import DilatedPattern
from dilated_sparse import BlockLayout, block_sparse_attention, layouts

HEADS, HEAD_DIM = 8, 64
MILLION = 1 << 20


def main() -> None:
    """Run one measurement and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flex", action="store_true", help="also FlexAttention's forward")
    parser.add_argument("--build", action="store_true", help="time to build layouts of 2**20 rows")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    print(json.dumps(describe()), flush=True)
    if arguments.build:
        build()
    else:
        compare(arguments.length, arguments.rounds, arguments.flex)


def compare(length: int, rounds: int, flex: bool) -> None:
    """Forward, and forward + backward, of bigbird and a sliding window near 6% density."""
    tensors = [torch.randn(1, length, HEADS, HEAD_DIM, requires_grad=True) for _ in "qkv"]
    upstream = torch.randn(1, length, HEADS, HEAD_DIM)
    chosen = {
        "bigbird": layouts.bigbird(length, global_blocks=1, block_size=128),
        "sliding_window": layouts.sliding_window(length, length // 32),
    }
    calls: dict[str, Callable[..., Tensor]] = {"dense": dense}
    for name, layout in chosen.items():
        calls[name] = partial(block_sparse_attention, layout=layout)
    for mode, call_once in (("forward", forward), ("forward+backward", both)):
        timed = {name: partial(call_once, call, tensors, upstream) for name, call in calls.items()}
        if flex and mode == "forward":
            for name, layout in chosen.items():
                timed[f"flex {name}"] = partial(forward, flex_call(layout), tensors, upstream)
        times = in_turn(timed, rounds)
        least = {name: min(seconds) for name, seconds in times.items()}
        for name, seconds in least.items():
            row: dict[str, Any] = {"mode": mode, "name": name, "ms": round(1e3 * seconds, 1)}
            row["speedup"] = round(least["dense"] / seconds, 2)
            if name != "dense":
                layout = chosen[name.removeprefix("flex ")]
                for kind, share in (("blocks", block_density(layout)), ("pairs", layout.density())):
                    row[f"density_{kind}"] = round(share, 4)
                    row[f"rate_{kind}"] = round(least["dense"] / seconds * share, 3)
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)


def million_layouts(device: str = "cpu") -> dict[str, Callable[[], BlockLayout]]:
    """How to make each layout at 2**20 positions."""
    n = MILLION
    on: dict[str, Any] = {"device": device}
    return {
        "sliding_window": lambda: layouts.sliding_window(n, 512, **on),
        "dilated_window": lambda: layouts.dilated_window(n, 512, 4, **on),
        "strided": lambda: layouts.strided(n, 1024, **on),
        "fixed": lambda: layouts.fixed(n, 1024, 32, **on),
        "global_tokens": lambda: layouts.global_tokens(n, 128, **on),
        "random_blocks": lambda: layouts.random_blocks(n, 3, heads=8, **on),
        "bigbird": lambda: layouts.bigbird(n, block_size=128, **on),
        "longformer": lambda: layouts.longformer(n, 512, 64, **on),
        "document": lambda: layouts.document([1000] * (n // 1000) + [n % 1000], **on),
        "hierarchical": lambda: layouts.hierarchical(n, 128, 6, **on),
        "longnet": lambda: layouts.longnet(n, DilatedPattern.longnet(n), **on),
        "prefix": lambda: layouts.prefix(n, 4096, **on),
        "fixed_uneven": lambda: layouts.fixed(n, 1000, 8, **on),
        "longnet_8_heads": lambda: layouts.longnet(n, DilatedPattern.longnet(n), heads=8, **on),
    }


def build() -> None:
    """Seconds (least of three), entries and bytes of each layout, and the peak of memory."""
    for name, make in million_layouts().items():
        seconds = math.inf
        for _ in range(3):
            start = time.perf_counter()
            layout = make()
            seconds = min(seconds, time.perf_counter() - start)
        # The peak of this process so far; macOS counts bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20
        print(
            f"name={name}  seconds={seconds:.2f}  nnz={layout.nnz}  bytes={layout.nbytes}"
            f"  peak_rss_mib={peak}",
            flush=True,
        )


def block_density(layout: BlockLayout) -> float:
    """The share of the blocks that is visible."""
    return layout.nnz / (layout.heads * layout.grid.rows * layout.grid.columns)


def in_turn(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, called in turn, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_:
                times[name].append(time.perf_counter() - start)
    return times


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Torch's fused dense attention."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def flex_call(layout: BlockLayout) -> Callable[..., Tensor]:
    """FlexAttention, compiled, over the same layout."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled, block_mask = torch.compile(flex_attention), layout.to_block_mask()

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.detach().transpose(1, 2) for x in (query, key, value))
        out: Tensor = compiled(q, k, v, block_mask=block_mask)
        return out

    return call


def forward(call: Callable[..., Tensor], tensors: list[Tensor], _upstream: Tensor) -> None:
    """One forward without autograd."""
    with torch.no_grad():
        call(*tensors)


def both(call: Callable[..., Tensor], tensors: list[Tensor], upstream: Tensor) -> None:
    """One forward and backward."""
    torch.autograd.grad(call(*tensors), tensors, upstream)


if __name__ == "__main__":
    main()
