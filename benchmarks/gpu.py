"""Dilated attention on one GPU: errors first, then time, TFLOP/s and memory of every candidate.

Candidates: our triton backend; torchscale's DilatedAttention, with torch's flash operator in it, if
a checkout is given; torch's flash operator per branch on strided views; and, for their rate only,
dense attention by cuDNN and by flash. TFLOP/s count the operations of the definition: a key that
two branches show counts twice, and a backward 2.5 times its forward.

    python benchmarks/gpu.py [--torchscale CHECKOUT] [--json FILE] [--png FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from _machine import describe
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dilated_core import DilatedPattern
from dilated_core._call import DilatedCall, Scores
from dilated_core._triton import attend

FLASH = torch.ops.aten._scaled_dot_product_flash_attention
DOUBLING = DilatedPattern([2048 * 2**k for k in range(5)], [2**k for k in range(5)])
PAPER = DilatedPattern([2048 * 2**k for k in range(5)], [1, 2, 4, 6, 12])
GIGAPATH = DilatedPattern(
    [1024, 5792, 32768, 185363, 1048576], [1, 2, 4, 8, 16], head_offsets="blocked"
)
# As `DilatedPattern.longnet` makes it: the longest branch is as long as the sequence.
LONGNET = DilatedPattern.longnet(1 << 20)
# Rounds of a measurement, and about how long all of them may take.
MOST_ROUNDS, LEAST_ROUNDS, MILLISECONDS = 15, 3, 500
Row = dict[str, Any]
Candidate = Callable[..., Tensor]


def main() -> None:
    """Check, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torchscale", help="a checkout of torchscale to compare with")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--png", help="draw time, TFLOP/s and memory against length to this file")
    parser.add_argument("--quick", action="store_true", help="skip the longest lengths")
    arguments = parser.parse_args()
    machine = describe("cuda")
    print(json.dumps(machine), flush=True)
    parts = {
        "errors": errors(),
        "dense": dense_rates(),
        "patterns": patterns(arguments.torchscale),
        "lengths": lengths(arguments.torchscale, quick=arguments.quick),
    }
    results: dict[str, list[Row]] = {}
    for name, rows in parts.items():
        results[name] = list(rows)
        if arguments.json:
            with open(arguments.json, "w", encoding="utf-8") as file:
                json.dump({"machine": machine, **results}, file, indent=1)
    if arguments.png:
        draw(results["lengths"], machine, arguments.png)


def show(row: Row) -> Row:
    """Print a row and pass it on."""
    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return row


def random_inputs(length: int, heads: int, head_dim: int) -> list[Tensor]:
    """Fresh q, k, v (1, N, H, D) in bfloat16 that require gradients."""
    shape = (1, length, heads, head_dim)
    return [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"
    ]


def ours(pattern: DilatedPattern, is_causal: bool, *inputs: Tensor) -> Tensor:
    """Our out (1, N, H, D)."""
    scores = Scores(is_causal, inputs[0].shape[-1] ** -0.5)
    return attend(DilatedCall(pattern, scores), *inputs).out


# Errors


def errors() -> Iterator[Row]:
    """Relative errors of out and gradients, ours and those of flash attention, against float64.

    The pattern is one dense branch, so that both compute the same function; the checks of all
    other patterns are tests.
    """
    for head_dim in (48, 64, 128):
        for is_causal in (False, True):
            pattern = DilatedPattern([2048], [1])
            inputs = random_inputs(2048, 4, head_dim)
            upstream = torch.randn_like(inputs[0])
            exact = gradients(partial(sdpa, is_causal, SDPBackend.MATH), inputs, upstream, True)
            for name, function in (
                ("ours", partial(ours, pattern, is_causal)),
                ("flash", partial(sdpa, is_causal, SDPBackend.FLASH_ATTENTION)),
            ):
                actual = gradients(function, inputs, upstream, False)
                found = [
                    f"{float((a.double() - b).norm() / b.norm()):.2e}"
                    for a, b in zip(actual, exact, strict=True)
                ]
                labels = zip(("out", "dq", "dk", "dv"), found, strict=True)
                yield show(
                    {"head_dim": head_dim, "causal": is_causal, "name": name, **dict(labels)}
                )


def gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor, wide: bool
) -> list[Tensor]:
    """Out and the gradients to q, k, v; in float64 if `wide`."""
    kind = torch.float64 if wide else inputs[0].dtype
    tensors = [x.detach().to(kind).requires_grad_() for x in inputs]
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, upstream.to(kind))]


def sdpa(is_causal: bool, backend: SDPBackend, *inputs: Tensor) -> Tensor:
    """Dense attention by one of torch's backends, (1, N, H, D)."""
    with sdpa_kernel(backend):
        query, key, value = (x.transpose(1, 2) for x in inputs)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    return out.transpose(1, 2)


# Time


def milliseconds(function: Callable[[], Any]) -> float:
    """The median time of a call on the device."""
    function()
    rounds = int(MILLISECONDS / times(function, 1)[0])
    return statistics.median(times(function, max(LEAST_ROUNDS, min(MOST_ROUNDS, rounds))))


def times(function: Callable[[], Any], rounds: int) -> list[float]:
    """Times of calls on the device, in milliseconds; the host runs ahead of it."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(rounds)]
    for start, stop in events:
        start.record()
        function()
        stop.record()
    torch.cuda.synchronize()
    return [float(start.elapsed_time(stop)) for start, stop in events]


def measure(function: Callable[..., Tensor], inputs: list[Tensor], flops: float) -> Row:
    """Times of forward and forward + backward, their rates, and the peak memory of both.

    Memory is what both need at once above inputs, outputs and gradients.
    """

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    upstream = torch.randn_like(inputs[0]).view_as(forward())

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs), inputs, upstream)

    forward_ms = milliseconds(forward)
    both_ms = milliseconds(both)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    size = sum(x.numel() * x.element_size() for x in inputs)
    # Out is as large as query, and the gradients are as large as the inputs.
    results = size + inputs[0].numel() * inputs[0].element_size()
    extra = torch.cuda.max_memory_allocated() - before - results
    return {
        "forward_ms": round(forward_ms, 3),
        "both_ms": round(both_ms, 3),
        "forward_tflops": round(flops / forward_ms / 1e9, 1),
        "backward_tflops": round(2.5 * flops / (both_ms - forward_ms) / 1e9, 1),
        "extra_memory": f"{100 * extra / size:.1f}%",
    }


def dense_rates() -> Iterator[Row]:
    """The rates of dense attention."""
    for head_dim in (64, 128):
        for is_causal in (False, True):
            inputs = random_inputs(32768, 4, head_dim)
            flops = 4 * head_dim * 4 * 32768**2 / (2 if is_causal else 1)
            for name, backend in (
                ("cudnn", SDPBackend.CUDNN_ATTENTION),
                ("flash", SDPBackend.FLASH_ATTENTION),
            ):
                found = measure(partial(sdpa, is_causal, backend), inputs, flops)
                del found["extra_memory"]
                yield show({"dense": name, "head_dim": head_dim, "causal": is_causal, **found})


def patterns(checkout: str | None) -> Iterator[Row]:
    """Every candidate on the patterns that people use."""
    cases = [
        ("doubling", DOUBLING, 262144, 12, 64, False),
        ("doubling", DOUBLING, 262144, 12, 64, True),
        ("doubling", DOUBLING, 1 << 20, 12, 64, False),
        ("doubling", DOUBLING, 1 << 20, 12, 64, True),
        ("doubling", DOUBLING, 262144, 8, 80, False),
        ("doubling", DOUBLING, 262144, 8, 96, False),
        ("doubling", DOUBLING, 262144, 8, 128, False),
        ("doubling", DOUBLING, 1 << 20, 8, 128, False),
        ("doubling", DOUBLING, 1 << 20, 8, 128, True),
        ("paper", PAPER, 262144, 12, 64, False),
        ("paper", PAPER, 262144, 12, 64, True),
        ("gigapath", GIGAPATH, 262144, 16, 48, False),
        ("gigapath", GIGAPATH, 1 << 20, 16, 48, False),
        ("longnet", LONGNET, 1 << 20, 12, 64, False),
        ("longnet", LONGNET, 1 << 20, 12, 64, True),
        ("longnet", LONGNET, 1 << 20, 8, 128, False),
    ]
    for name, pattern, length, heads, head_dim, is_causal in cases:
        flops = pattern.flops(length, heads, head_dim, is_causal=is_causal)
        inputs = random_inputs(length, heads, head_dim)
        candidates: dict[str, Candidate] = {"ours": partial(ours, pattern, is_causal)}
        if checkout and length <= 262144:
            candidates["torchscale"] = torchscale(checkout, pattern, is_causal, inputs[0])
        label = {
            "pattern": name, "length": length, "heads": heads, "head_dim": head_dim,
            "causal": is_causal,
        }  # fmt: skip
        baseline: Row = {}
        for candidate, function in candidates.items():
            found = measure(function, inputs, flops)
            baseline = baseline or found
            ratios = {
                f"{mode}_of_ours": round(found[f"{mode}_ms"] / baseline[f"{mode}_ms"], 2)
                for mode in ("forward", "both")
            }
            yield show({**label, "name": candidate, **found, **ratios})
        if length <= 262144 and not is_causal and name == "doubling":
            with torch.no_grad():
                ms = milliseconds(partial(per_branch, pattern, *inputs))
            ratio = round(ms / baseline["forward_ms"], 2)
            yield show({
                **label, "name": "flash per branch", "forward_ms": round(ms, 3),
                "forward_tflops": round(flops / ms / 1e9, 1), "forward_of_ours": ratio,
            })  # fmt: skip
        del inputs, candidates
        torch.cuda.empty_cache()


def lengths(checkout: str | None, *, quick: bool) -> Iterator[Row]:
    """Ours, and torchscale's while it fits well, against length."""
    for exponent in range(16, 21 if quick else 24):
        length, heads, head_dim = 1 << exponent, 12, 64
        inputs = random_inputs(length, heads, head_dim)
        flops = DOUBLING.flops(length, heads, head_dim)
        candidates: dict[str, Candidate] = {"ours": partial(ours, DOUBLING, False)}
        if checkout and length <= 1 << 18:
            candidates["torchscale"] = torchscale(checkout, DOUBLING, False, inputs[0])
        for name, function in candidates.items():
            found = measure(function, inputs, flops)
            per_token = {
                f"{mode}_ns_per_token": round(1e6 * found[f"{mode}_ms"] / length, 2)
                for mode in ("forward", "both")
            }
            yield show({"length": length, "name": name, **found, **per_token})
        del inputs, candidates
        torch.cuda.empty_cache()


# The others


def torchscale(
    checkout: str, pattern: DilatedPattern, is_causal: bool, like: Tensor
) -> Callable[..., Tensor]:
    """Its DilatedAttention with torch's flash operator in it and no projections."""
    sys.path.insert(0, checkout)
    from torchscale.component import multihead_attention  # type: ignore[import-not-found]  # a checkout
    from torchscale.component.dilated_attention import (  # type: ignore[import-not-found]
        DilatedAttention,
    )

    def flash(
        q: Tensor, k: Tensor, v: Tensor, _p: float, _bias: None, scale: None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = FLASH(q, k, v, 0.0, causal, scale=scale)
        return out.transpose(1, 2), lse

    multihead_attention.flash_attn_func = flash
    heads, head_dim = like.shape[-2:]
    settings = SimpleNamespace(
        flash_attention=True, multiway=False, xpos_rel_pos=False, layernorm_eps=1e-5,
        segment_length=list(pattern.segment_lengths), dilated_ratio=list(pattern.dilation_rates),
        seq_parallel=False,
    )  # fmt: skip
    layer = DilatedAttention(settings, heads * head_dim, heads, self_attention=True)
    layer.q_proj = layer.k_proj = layer.v_proj = layer.out_proj = nn.Identity()

    def call(*inputs: Tensor) -> Tensor:
        out: Tensor = layer(*(x.flatten(2) for x in inputs), is_causal=is_causal)[0]
        return out.view_as(like)

    return call


def per_branch(pattern: DilatedPattern, *inputs: Tensor) -> Tensor:
    """Torch's flash operator on strided views, branch by branch, merged in float32.

    For lengths that all segments divide.
    """
    length, heads, head_dim = inputs[0].shape[1:]
    out = torch.zeros(inputs[0].shape[1:], device="cuda")
    lse = torch.full((length, heads, 1), -math.inf, device="cuda")
    for w, r in pattern.branches:
        for offset in range(min(r, heads)):
            views = [
                x.view(-1, w // r, r, heads, head_dim)[:, :, offset, offset::r].transpose(1, 2)
                for x in (*inputs, out)
            ]
            part, part_lse, *_ = FLASH(*views[:3], 0.0, False)
            total = lse.view(-1, w // r, r, heads, 1)[:, :, offset, offset::r].transpose(1, 2)
            merged = torch.logaddexp(total, part_lse.unsqueeze(-1))
            views[3].lerp_(part.float(), (part_lse.unsqueeze(-1) - merged).exp())
            total.copy_(merged)
    return out.to(inputs[0].dtype)


def draw(rows: list[Row], machine: Row, path: str) -> None:
    """Time, rate and memory against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    panels = (
        ("milliseconds, forward + backward", lambda row: row["both_ms"]),
        ("effective TFLOP/s, forward", lambda row: row["forward_tflops"]),
        ("memory above results, % of inputs", lambda row: float(row["extra_memory"].rstrip("%"))),
    )
    for axis, (title, value) in zip(axes, panels, strict=True):
        for name in dict.fromkeys(row["name"] for row in rows):
            chosen = [row for row in rows if row["name"] == name]
            axis.plot([r["length"] for r in chosen], list(map(value, chosen)), "o-", label=name)
        axis.set(xscale="log", xlabel="length in tokens", title=title)
        ticks = sorted({row["length"] for row in rows})
        axis.set_xticks(ticks, [f"{n >> 10}K" if n < 1 << 20 else f"{n >> 20}M" for n in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[2].set_yscale("log")
    axes[0].legend()
    figure.suptitle(f"12 heads of 64, {machine['device']}, torch {machine['torch']}")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
