"""Dilated attention on the CPU against torchscale's and against torch's flash operator.

All candidates do the same work in one process, in turn, so that a drifting machine hits them
alike. A time is the least of all rounds: what other work on the machine adds is not ours.

With an older commit instead, steps of its demo by its trainer and by ours, and inference of
GigaPath's slide encoder, two layers of the published width, in processes of both in turn: the
medians of a process, and of all.

    ./noxw -s bench -- cpu.py [--torchscale CHECKOUT] [--json FILE]
    ./noxw -s bench -- cpu.py --older 1c38fec [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from _machine import describe
from host import ROOT, checked_out
from torch import Tensor, nn

from dilated_core import DilatedPattern, dilated_attention

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
HEADS, HEAD_DIM = 8, 64
STEPS, UNCOUNTED = 40, 5
PATTERN = DilatedPattern([2048, 4096, 8192, 16384], [1, 2, 4, 8])


def main() -> None:
    """Run the comparisons and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torchscale", help="a checkout of torchscale to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--scaling", action="store_true", help="time per token, 16K to 256K")
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--older", help="measure beside this commit, or the folder of one")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        torch.set_num_threads(2)
        what, dtype = arguments.child.split()
        print(json.dumps(steps(dtype) if what == "steps" else slides()))
        return
    longest = max(PATTERN.segment_lengths)
    if arguments.length <= 0 or arguments.length % longest:
        parser.error(f"--length must be a multiple of {longest}. Got {arguments.length}.")
    torch.set_num_threads(2)
    machine = describe()
    print(json.dumps(machine), flush=True)
    if arguments.older:
        results = beside(arguments.older, arguments.rounds)
    else:
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


def beside(commit: str, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a demo's step and of a slide, by an older commit and by this tree."""
    results = []
    with checked_out(commit) as older:
        for what, dtypes in (("steps", ("float32", "bfloat16")), ("slides", ("float32",))):
            works = {f"older {what} float32": older}
            works |= {f"{what} {dtype}": ROOT for dtype in dtypes}
            found: dict[str, list[float]] = {name: [] for name in works}
            for _ in range(rounds):
                for name, tree in works.items():
                    found[name].append(child(tree, name.removeprefix("older ")))
            first = statistics.median(found[f"older {what} float32"])
            for name, each in found.items():
                median = statistics.median(each)
                row = {
                    "name": name, "milliseconds": round(median, 1), "least": round(min(each), 1),
                    "times_as_fast": round(first / median, 2),
                }  # fmt: skip
                results.append(row)
                print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return results


def child(tree: Path, what: str) -> float:
    """What a process says that imports the packages of a tree."""
    paths = os.pathsep.join(map(str, sorted(tree.glob("packages/*/src"))))
    command = [sys.executable, __file__, "--child", what]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def steps(dtype: str) -> float:
    """Median milliseconds of a step of 1c38fec's demo, by the trainer that is imported."""
    try:
        from dilated_factory.configs.models import LongNetConfig, TrainConfig
        from dilated_factory.room import keep_freed_memory

        keep_freed_memory()  # as the command does
    except ImportError:
        from dilated_factory.config import (  # type: ignore[import-not-found,no-redef] # older
            LongNetConfig,
            TrainConfig,
        )
    from dilated_factory.training.corpus import load_corpus
    from dilated_factory.training.loop import Trainer

    model = LongNetConfig(
        num_layers=2, segment_lengths=(64, 96, 1024, 8192), dilation_rates=(1, 1, 4, 16)
    )
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = tuple(str(library / name) for name in ("_pydecimal.py", "turtle.py"))
    config = TrainConfig(model=model, paths=texts, steps=STEPS, dtype=dtype)
    times = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer.start(f"{folder}/run", config, load_corpus(config.paths))
        trainer.train(on_step=lambda metrics: times.append(time.perf_counter()))
    counted = pairwise(times[UNCOUNTED:])
    return 1e3 * statistics.median(after - before for before, after in counted)


def slides() -> float:
    """Median milliseconds of 20,000 tiles in float32, with the embeddings of all layers."""
    from dilated_factory import SlideEncoder, SlideEncoderConfig

    config = SlideEncoderConfig(global_pool=True, num_layers=2)
    model, tiles = SlideEncoder(config).eval(), torch.arange(20_000)
    features = torch.randn(1, len(tiles), config.tile_dim)
    places = torch.stack((tiles // 400, tiles % 400), 1)[None] * float(config.tile_size)
    times = []
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            model(features, places, all_layer_embed=True)
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


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
