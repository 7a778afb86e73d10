"""Dilated attention on the CPU against torchscale's and against torch's flash operator.

All candidates do the same work in one process, in turn, so that a drifting machine hits them
alike. A time is the least of all rounds: what other work on the machine adds is not ours.

    ./noxw -s bench -- cpu.py [--torchscale CHECKOUT] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from _machine import describe
from torch import Tensor, nn

from dilated_core import DilatedPattern, dilated_attention

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
HEADS, HEAD_DIM = 8, 64
PATTERN = DilatedPattern([2048, 4096, 8192, 16384], [1, 2, 4, 8])


def main() -> None:
    """Run the comparisons and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torchscale", help="a checkout of torchscale to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--scaling", action="store_true", help="time per token, 16K to 256K")
    parser.add_argument("--json", help="also write the results to this file")
    arguments = parser.parse_args()
    longest = max(PATTERN.segment_lengths)
    if arguments.length <= 0 or arguments.length % longest:
        parser.error(f"--length must be a multiple of {longest}. Got {arguments.length}.")
    torch.set_num_threads(2)
    machine = describe()
    print(json.dumps(machine), flush=True)
    results = scaling(arguments.rounds) if arguments.scaling else compare(arguments)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "results": results}, file, indent=1)


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Ours, torchscale's and bare flash calls of the same FLOPs: forward, forward + backward."""
    length = arguments.length
    tensors = [torch.randn(1, length, HEADS, HEAD_DIM, requires_grad=True) for _ in "qkv"]
    upstream = torch.randn(1, length, HEADS, HEAD_DIM)
    results = []
    for is_causal in (False, True):
        calls: dict[str, Callable[..., Tensor]] = {
            "ours": partial(dilated_attention, pattern=PATTERN, is_causal=is_causal),
            "flash": partial(flash_of_the_same_flops, is_causal=is_causal),
        }
        if arguments.torchscale:
            calls["torchscale"] = torchscale(arguments.torchscale, is_causal)
        flops = PATTERN.flops(length, HEADS, HEAD_DIM, is_causal=is_causal)
        for mode, factor in (("forward", 1.0), ("forward+backward", 3.5)):
            timed = {
                name: partial(forward if mode == "forward" else both, call, tensors, upstream)
                for name, call in calls.items()
            }
            times = in_turn(timed, arguments.rounds)
            for name, seconds in times.items():
                best = min(seconds)
                row = {
                    "causal": is_causal, "mode": mode, "name": name,
                    "milliseconds": round(1e3 * best, 1),
                    "gflops": round(factor * flops / best / 1e9, 1),
                    "times_ours": round(best / min(times["ours"]), 3),
                }  # fmt: skip
                results.append(row)
                print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return results


def scaling(rounds: int) -> list[dict[str, Any]]:
    """Time per token of forward and forward + backward with fixed w and r."""
    results = []
    for length in (16384, 32768, 65536, 131072, 262144):
        tensors = [torch.randn(1, length, HEADS, HEAD_DIM, requires_grad=True) for _ in "qkv"]
        upstream = torch.randn(1, length, HEADS, HEAD_DIM)
        call = partial(dilated_attention, pattern=PATTERN)
        timed = {
            "forward": partial(forward, call, tensors, upstream),
            "forward+backward": partial(both, call, tensors, upstream),
        }
        for mode, seconds in in_turn(timed, rounds).items():
            row = {
                "length": length,
                "mode": mode,
                "microseconds_per_token": round(1e6 * min(seconds) / length, 2),
            }
            results.append(row)
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return results


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


def forward(call: Callable[..., Tensor], tensors: list[Tensor], _upstream: Tensor) -> None:
    """One forward without autograd."""
    with torch.no_grad():
        call(*tensors)


def both(call: Callable[..., Tensor], tensors: list[Tensor], upstream: Tensor) -> None:
    """One forward and backward."""
    out = call(*tensors)
    torch.autograd.grad(out, tensors, upstream.reshape(out.shape))


def flash_of_the_same_flops(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool
) -> Tensor:
    """Torch's flash operator on contiguous rows, once per branch: the ceiling, not the result."""
    outs = []
    for w, r in PATTERN.branches:
        rows = w // r
        # As many blocks of w / r rows as the branch has, taken without any dilation.
        q, k, v = (
            x[:, : x.shape[1] // r].reshape(-1, rows, HEADS, HEAD_DIM).transpose(1, 2)
            for x in (query, key, value)
        )
        outs.append(FLASH(q, k, v, 0.0, is_causal)[0].transpose(1, 2).reshape(-1, HEADS, HEAD_DIM))
    # The shape of a result, so that the backward of every branch runs.
    return torch.cat(outs)[: query.shape[1]]


def torchscale(checkout: str, is_causal: bool) -> Callable[..., Tensor]:
    """Its DilatedAttention with torch's flash operator in it and no projections."""
    sys.path.insert(0, checkout)
    from torchscale.component import multihead_attention
    from torchscale.component.dilated_attention import (
        DilatedAttention,
    )

    def flash(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        _dropout, _bias, scale, causal = rest
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = FLASH(q, k, v, 0.0, causal, scale=scale)
        return out.transpose(1, 2), lse

    multihead_attention.flash_attn_func = flash
    args = SimpleNamespace(
        flash_attention=True, multiway=False, xpos_rel_pos=False, layernorm_eps=1e-5,
        segment_length=list(PATTERN.segment_lengths), dilated_ratio=list(PATTERN.dilation_rates),
        seq_parallel=False,
    )  # fmt: skip
    layer = DilatedAttention(args, HEADS * HEAD_DIM, HEADS, self_attention=True)
    layer.q_proj = layer.k_proj = layer.v_proj = layer.out_proj = nn.Identity()

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, _ = layer(*(x.flatten(2) for x in (query, key, value)), is_causal=is_causal)
        return out

    return call


if __name__ == "__main__":
    main()
