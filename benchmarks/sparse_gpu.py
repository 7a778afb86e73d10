"""Block-sparse attention on one GPU: errors first, then time against FlexAttention and cuDNN.

bfloat16, 65536 positions, 4 heads of 64 and of 128. Two kinds of layouts at five densities: blocks
drawn at random for each head, and one sliding window. Then the time to build each layout of 2**20
positions on the GPU. TFLOP/s count the visible token pairs, and a backward 2.5 times its forward.
The break-even is where time, linear in density through the two densest layouts, meets dense.

    python benchmarks/sparse_gpu.py [--json FILE] [--png FILE] [--seconds N]

For example: python benchmarks/sparse_gpu.py --json sparse.json --png sparse.png --seconds 150
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import torch
from _machine import describe
from gpu import gradients, measure, random_inputs, sdpa, show
from sparse import MILLION, million_layouts
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dilated_sparse import BlockLayout, block_sparse_attention, layouts

LENGTH, HEADS, BLOCK = 65536, 4, 128
DENSITIES = (0.5, 0.25, 0.12, 0.06, 0.03)
BACKENDS = ("triton", "flex", "torch")
CANDIDATES = ("triton", "FlexAttention")
Row = dict[str, Any]


def main() -> None:
    """Check, measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--png", help="draw the speed against density to this file")
    parser.add_argument("--seconds", type=float, default=150, help="start no row after so long")
    arguments = parser.parse_args()
    machine = describe("cuda")
    print(json.dumps(machine), flush=True)
    deadline = time.monotonic() + arguments.seconds
    torch._dynamo.config.recompile_limit = 64
    parts: dict[str, Iterable[tuple[Row, Callable[[], Row]]]] = {
        "errors": errors(),
        "build": builds(),
        "dense": dense(),
        "layouts": compared(),
    }
    results: dict[str, list[Row]] = {}
    for name, rows in parts.items():
        results[name] = list(guarded(rows, deadline))
        save(arguments.json, machine, results)
    results["break_even"] = list(break_even(results["dense"], results["layouts"]))
    save(arguments.json, machine, results)
    if arguments.png:
        draw(results, machine, arguments.png)


def save(path: str | None, machine: Row, results: dict[str, list[Row]]) -> None:
    """Write what there is so far."""
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, **results}, file, indent=1)


def guarded(rows: Iterable[tuple[Row, Callable[[], Row]]], deadline: float) -> Iterator[Row]:
    """Each row, printed; one that fails says why and stops no other."""
    for label, measured in rows:
        if time.monotonic() > deadline:
            yield show({**label, "skipped": "out of time"})
            continue
        try:
            yield show({**label, **measured()})
        except Exception as error:
            yield show({**label, "failed": f"{type(error).__name__}: {error}"[:300]})
        torch.cuda.empty_cache()


# Errors


def errors() -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Relative errors of out and gradients against the reference in float64."""
    layout = layouts.longformer(2048, 300, 5, device="cuda") | layouts.random_blocks(
        2048, 3, heads=HEADS, device="cuda"
    )
    for head_dim in (64, 128):
        for backend in BACKENDS:
            label = {"check": "error", "head_dim": head_dim, "name": backend}
            yield label, partial(error, layout, head_dim, backend)


def error(layout: BlockLayout, head_dim: int, backend: str) -> Row:
    """The relative error of each result."""
    torch.manual_seed(0)
    inputs = random_inputs(layout.length, HEADS, head_dim)
    upstream = torch.randn_like(inputs[0])
    exact = gradients(ours(layout, "reference"), inputs, upstream, True)
    actual = gradients(ours(layout, backend), inputs, upstream, False)
    found = (
        f"{float((a.double() - b).norm() / b.norm()):.2e}"
        for a, b in zip(actual, exact, strict=True)
    )
    return dict(zip(("out", "dq", "dk", "dv"), found, strict=True))


def ours(layout: BlockLayout, backend: str) -> Callable[..., Tensor]:
    """One of our backends as a function of q, k, v."""
    return partial(block_sparse_attention, layout=layout, backend=backend)


# Time


def builds() -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Milliseconds to build each layout of 2**20 positions on the GPU, and what it stores."""
    for name, make in million_layouts("cuda").items():
        yield {"build": name, "length": MILLION}, partial(build_time, make)


def build_time(make: Callable[[], BlockLayout]) -> Row:
    """The least time of three builds, after one to warm up."""
    seconds = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        layout = make()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    per_head = 1e3 * min(seconds[1:]) / layout.heads
    return {
        "ms_per_head": round(per_head, 2), "heads": layout.heads, "nnz": layout.nnz,
        "bytes": layout.nbytes,
    }  # fmt: skip


def dense() -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Dense attention."""
    for head_dim in (64, 128):
        flops = 4 * head_dim * HEADS * LENGTH**2
        call = partial(sdpa, False, SDPBackend.CUDNN_ATTENTION)
        label = {"name": "cudnn", "head_dim": head_dim}
        yield label, partial(times, call, head_dim, flops)


def times(call: Callable[..., Tensor], head_dim: int, flops: float) -> Row:
    """Milliseconds, rates and memory of fresh inputs."""
    torch.manual_seed(0)
    found: Row = measure(call, random_inputs(LENGTH, HEADS, head_dim), flops)
    return found


def compared() -> Iterator[tuple[Row, Callable[[], Row]]]:
    """The triton backend and FlexAttention on every layout, head_dim and density."""
    for head_dim in (64, 128):
        for kind in ("random", "window"):
            for density in DENSITIES:
                layout = layout_of(kind, density)
                pairs = layout.visible_pairs() * (HEADS // layout.heads)
                candidates = {
                    "triton": ours(layout, "triton"),
                    "FlexAttention": flex(layout, window_of(density) if kind == "window" else None),
                }
                for name, call in candidates.items():
                    label = {
                        "layout": kind, "density": density, "true_density": layout.density(),
                        "head_dim": head_dim, "name": name,
                    }  # fmt: skip
                    yield label, partial(times, call, head_dim, 4 * head_dim * pairs)


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention, compiled."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def flex(layout: BlockLayout, window: int | None) -> Callable[..., Tensor]:
    """FlexAttention as its users write it: the mask as a function, blocks from the layout."""
    blocks = layout.to_block_mask(device="cuda")
    width = torch.tensor(layout.length if window is None else window, device="cuda")

    def mask_mod(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() <= width

    mask = BlockMask.from_kv_blocks(
        blocks.kv_num_blocks, blocks.kv_indices, blocks.full_kv_num_blocks, blocks.full_kv_indices,
        BLOCK_SIZE=blocks.BLOCK_SIZE, mask_mod=mask_mod, seq_lengths=blocks.seq_lengths,
    )  # fmt: skip

    def call(*inputs: Tensor) -> Tensor:
        out: Tensor = compiled_flex()(*(x.transpose(1, 2) for x in inputs), block_mask=mask)
        return out.transpose(1, 2)

    return call


def layout_of(kind: str, density: float) -> BlockLayout:
    """A layout of about that density."""
    if kind == "random":
        count = round(density * LENGTH / BLOCK)
        return layouts.random_blocks(LENGTH, count, heads=HEADS, device="cuda")
    return layouts.sliding_window(LENGTH, window_of(density), device="cuda")


def window_of(density: float) -> int:
    """A window of w to each side shows 2 w N − w² of N² pairs."""
    return round((1 - (1 - density) ** 0.5) * LENGTH)


def break_even(dense_rows: list[Row], rows: list[Row]) -> Iterator[Row]:
    """The density up to which a backend is faster than dense attention."""
    for dense_row in dense_rows:
        for kind in ("random", "window"):
            for name in CANDIDATES:
                chosen = [
                    row for row in rows
                    if (row["layout"], row["head_dim"], row["name"])
                    == (kind, dense_row["head_dim"], name) and "both_ms" in row
                ]  # fmt: skip
                if len(chosen) < 2 or "both_ms" not in dense_row:
                    continue
                label = {"break_even": name, "layout": kind, "head_dim": dense_row["head_dim"]}
                found = {
                    mode: round(meeting(chosen[0], chosen[1], dense_row, f"{mode}_ms"), 3)
                    for mode in ("forward", "both")
                }
                yield show({**label, **found})


def meeting(one: Row, two: Row, dense_row: Row, key: str) -> float:
    """Where the line through two rows reaches the dense time."""
    slope = (one[key] - two[key]) / (one["true_density"] - two["true_density"])
    return float(one["true_density"] + (dense_row[key] - one[key]) / slope)


def draw(results: dict[str, list[Row]], machine: Row, path: str) -> None:
    """How much faster than dense attention, against density, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, head_dim in zip(axes, (64, 128), strict=True):
        dense_ms = [r for r in results["dense"] if r["head_dim"] == head_dim and "both_ms" in r]
        for kind in ("random", "window"):
            for name in CANDIDATES:
                rows = [
                    row for row in results["layouts"]
                    if (row["layout"], row["head_dim"], row["name"]) == (kind, head_dim, name)
                    and "both_ms" in row
                ]  # fmt: skip
                if rows and dense_ms:
                    x = [row["true_density"] for row in rows]
                    y = [dense_ms[0]["both_ms"] / row["both_ms"] for row in rows]
                    axis.plot(x, y, "o-" if kind == "random" else "s--", label=f"{name}, {kind}")
        ideal = list(DENSITIES)
        axis.plot(ideal, [1 / x for x in ideal], ":", color="gray", label="1 / density")
        axis.set(
            xscale="log", yscale="log", xlabel="visible share of pairs",
            title=f"speed-up over cuDNN, forward + backward, head_dim {head_dim}",
        )  # fmt: skip
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(
        f"{LENGTH} positions, {HEADS} heads, {machine['device']}, torch {machine['torch']}"
    )
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
