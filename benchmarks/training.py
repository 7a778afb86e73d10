"""A training step of whole models on one device: time, tokens/s, FLOP utilisation, memory, kernels.

A step is a forward and a backward in bfloat16 autocast with float32 weights, over the bytes of a
batch. Candidates: our LongNetLM eagerly, compiled, and compiled with parts recomputed;
compiled with clipping and optimizers, as `dilated train` steps; torchscale's LongNetDecoder with
torch's flash operator in it, if a checkout is given; and a plain compiled GPT with torch's fused
attention. Utilisation counts the operations of the model, nothing that is computed again: six a
weight of a matrix and token, and 3.5 times those of the attention's forward.

    python benchmarks/training.py [--torchscale CHECKOUT] [--json FILE] [--png FILE]
    python benchmarks/training.py --device cpu --small
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _machine import describe
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from dilated_core import DilatedPattern
from dilated_factory import LongNetConfig, LongNetLM, TrainConfig
from dilated_factory.models.stack import Checkpointing
from dilated_factory.training.optimizer import build_optimizers

VOCABULARY = 256
PATTERN = DilatedPattern([2048 * 2**k for k in range(5)], [2**k for k in range(5)])
# Dense bfloat16, from the data sheets, in TFLOP/s.
PEAKS = {"H200": 989.5, "H100": 989.5, "A100": 312.0}
SECONDS = 2.0  # of measuring a row, about
IN_A_ROW = 3  # steps without waiting for the device, as trainers take them
# What the name of a kernel says; the first that fits.
KINDS = {
    "norms, fused": r"^_norm_(backward_)?kernel",
    "attention": r"forward_kernel|query_gradient|key_gradient|flash|fmha|sdpa|attention|triton::",
    "products": r"gemm|cutlass|nvjet|cublas|xmma|splitk|addmm|aten::mm|aten::bmm",
    "fused, rows": r"^triton_(red|per)_",
    "fused, pointwise": r"^triton_|cpp_fused",
    "norms": r"layer_?norm|gammabeta",
    "copies": r"memcpy|memset|copy",
    "pointwise": r"elementwise|vectorized|unrolled|index|gather|scatter|cat",
}
Row = dict[str, Any]
Loss = Callable[[Tensor], Tensor]


class Setting(NamedTuple):
    """A model and a batch."""

    length: int
    batch: int
    num_layers: int
    embed_dim: int
    num_heads: int


LARGE = (
    Setting(65536, 1, 12, 768, 12),
    Setting(2048, 32, 12, 768, 12),
    Setting(32768, 4, 8, 512, 8),
)
SMALL = (Setting(2048, 1, 2, 64, 4),)


def main() -> None:
    """Measure each candidate in each setting; one that fails leaves the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torchscale", help="a checkout of torchscale to compare with")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="one small model, to try the script")
    parser.add_argument("--only", default="", help="only candidates whose name this pattern finds")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--png", help="draw tokens/s and memory to this file")
    arguments = parser.parse_args()
    machine = describe(arguments.device)
    print(json.dumps(machine), flush=True)
    rows: list[Row] = []
    for setting in SMALL if arguments.small else LARGE:
        for name, build in candidates(arguments.torchscale, arguments.device).items():
            if not re.search(arguments.only, name):
                continue
            row: Row = {**setting._asdict(), "name": name}
            try:
                row |= measure(setting, build, name == "GPT, compiled", arguments.device)
            except Exception as error:
                traceback.print_exc()
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(row)
            print("  ".join(f"{k}={v}" for k, v in row.items() if k != "kernels"), flush=True)
            for kind, ms in row.get("kernels", {}).items():
                print("     ", kind, ms, flush=True)
            torch._dynamo.reset()
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
            if arguments.json:
                with open(arguments.json, "w", encoding="utf-8") as file:
                    json.dump({"machine": machine, "steps": rows}, file, indent=1)
    if arguments.png:
        draw(rows, machine, arguments.png)


# Candidates


def candidates(
    checkout: str | None, device: str
) -> dict[str, Callable[[Setting], tuple[nn.Module, Callable[[Tensor], None]]]]:
    """What makes a model and its step on tokens (B, N + 1)."""
    found = {
        "ours, compiled": lambda s: ours(s, device, compiled=True),
        "ours, compiled, selective": lambda s: ours(s, device, compiled=True, again="selective"),
        "ours, compiled, pointwise": lambda s: ours(s, device, compiled=True, again="pointwise"),
        "ours, eager": lambda s: ours(s, device),
        "ours, compiled, with optimizers": lambda s: ours(s, device, compiled=True, updates=True),
        "GPT, compiled": lambda s: gpt(s, device),
    }
    if checkout:
        found["torchscale"] = lambda s: torchscale(s, device, checkout)
    return found


def ours(
    setting: Setting,
    device: str,
    *,
    compiled: bool = False,
    again: Checkpointing = False,
    updates: bool = False,
) -> tuple[nn.Module, Callable[[Tensor], None]]:
    """LongNetLM."""
    config = LongNetConfig(
        vocab_size=VOCABULARY, embed_dim=setting.embed_dim, num_heads=setting.num_heads,
        num_layers=setting.num_layers, segment_lengths=PATTERN.segment_lengths,
        dilation_rates=PATTERN.dilation_rates, context=setting.length,
    )  # fmt: skip
    model = LongNetLM(config, activation_checkpointing=again, device=device)
    if compiled:
        model.compile_blocks()
    run = stepper(model, model.loss, device)
    optimizers = build_optimizers(model, TrainConfig(model=config, steps=1)) if updates else []

    def step(tokens: Tensor) -> None:
        run(tokens)
        if optimizers:
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        for optimizer in optimizers:
            optimizer.step()

    return model, step


class GPTBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, E) to (B, N, E)."""
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        q, k, v = heads.unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        mixed: Tensor = self.outer(F.gelu(self.inner(self.norms[1](x))))
        return x + mixed


def gpt(setting: Setting, device: str) -> tuple[nn.Module, Callable[[Tensor], None]]:
    """A GPT as one would write it, its blocks compiled."""
    width = setting.embed_dim
    with torch.device(device):
        blocks = [GPTBlock(width, setting.num_heads) for _ in range(setting.num_layers)]
        model = nn.ModuleDict({
            "tokens": nn.Embedding(VOCABULARY, width),
            "positions": nn.Embedding(setting.length, width),
            "blocks": nn.Sequential(*blocks),
            "norm": nn.LayerNorm(width),
            "head": nn.Linear(width, VOCABULARY, bias=False),
        })  # fmt: skip
    for block in blocks:
        block.compile()

    def loss(tokens: Tensor) -> Tensor:
        x = model["tokens"](tokens[:, :-1]) + model["positions"].weight  # type: ignore[operator] # a module
        logits = model["head"](model["norm"](model["blocks"](x)))
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    return model, stepper(model, loss, device)


def torchscale(
    setting: Setting, device: str, checkout: str
) -> tuple[nn.Module, Callable[[Tensor], None]]:
    """LongNetDecoder with torch's flash operator where it calls flash-attn's."""
    sys.path.insert(0, checkout)
    # It imports them, and uses them only where layers are dropped or spread.
    for name in ("fairscale", "fairscale.nn", "timm", "timm.models", "timm.models.layers"):
        module = sys.modules.setdefault(name, ModuleType(name))
        module.__dict__.update(checkpoint_wrapper=None, wrap=None, drop_path=None)
    from torchscale.architecture.config import DecoderConfig  # type: ignore[import-not-found]
    from torchscale.component import multihead_attention  # type: ignore[import-not-found]
    from torchscale.model.LongNet import LongNetDecoder  # type: ignore[import-not-found]

    def flash(
        q: Tensor, k: Tensor, v: Tensor, _p: float, _bias: None, scale: None, causal: bool
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        suffix = "" if q.is_cuda else "_for_cpu"
        operator = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{suffix}")
        out, lse, *_ = operator(q, k, v, 0.0, causal, scale=scale)
        return out.transpose(1, 2), lse

    multihead_attention.flash_attn_func = flash
    width = setting.embed_dim
    settings = DecoderConfig(
        decoder_embed_dim=width, decoder_attention_heads=setting.num_heads,
        decoder_ffn_embed_dim=4 * width, decoder_layers=setting.num_layers,
        vocab_size=VOCABULARY, flash_attention=True, share_decoder_input_output_embed=True,
        segment_length=str(list(PATTERN.segment_lengths)),
        dilated_ratio=str(list(PATTERN.dilation_rates)),
    )  # fmt: skip
    model = LongNetDecoder(settings, embed_tokens=nn.Embedding(VOCABULARY, width)).to(device)

    def loss(tokens: Tensor) -> Tensor:
        logits = model(tokens[:, :-1])[0]
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    return model, stepper(model, loss, device)


def stepper(model: nn.Module, loss: Loss, device: str) -> Callable[[Tensor], None]:
    """A forward and a backward in mixed precision."""

    def step(tokens: Tensor) -> None:
        model.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            total = loss(tokens)
        total.backward()

    return step


# Measurement


def measure(
    setting: Setting,
    build: Callable[[Setting], tuple[nn.Module, Callable[[Tensor], None]]],
    dense: bool,
    device: str,
) -> Row:
    """Milliseconds of a step (median, least, most), rates, memory, and a table of kernels."""
    torch.manual_seed(0)
    is_cuda = device == "cuda"
    synchronize = torch.cuda.synchronize if is_cuda else lambda: None
    model, step = build(setting)
    tokens = torch.randint(VOCABULARY, (setting.batch, setting.length + 1), device=device)
    started = time.perf_counter()
    step(tokens)
    synchronize()
    first = time.perf_counter() - started
    step(tokens)
    if is_cuda:
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < 3 or (sum(times) * IN_A_ROW < SECONDS and len(times) < 20):
        synchronize()
        started = time.perf_counter()
        for _ in range(IN_A_ROW):
            step(tokens)
        synchronize()
        times.append((time.perf_counter() - started) / IN_A_ROW)
    seconds, count = statistics.median(times), setting.batch * setting.length
    flops = operations(setting, model, dense)
    peak = next((p for name, p in PEAKS.items() if name in describe(device)["device"]), None)  # type: ignore[operator]
    return {
        "ms": round(1e3 * seconds, 2),
        "least_ms": round(1e3 * min(times), 2),
        "most_ms": round(1e3 * max(times), 2),
        "first_step_s": round(first, 1),
        "tokens_per_s": round(count / seconds),
        "tflops": round(flops / seconds / 1e12, 1),
        "utilisation": peak and round(flops / seconds / 1e12 / peak, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if is_cuda else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "kernels": kernels(lambda: step(tokens), is_cuda),
    }


def operations(setting: Setting, model: nn.Module, dense: bool) -> float:
    """Floating-point operations of the model in a step."""
    length, batch, num_layers, width, heads = setting
    ends = r"embed|tokens|positions|head|output_projection"
    matrices = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim == 2 and not re.search(ends, name)
    )
    if dense:
        attention = 4.0 * width * length**2 / 2
    else:
        attention = PATTERN.flops(length, heads, width // heads, is_causal=True)
    products = 6 * (matrices + VOCABULARY * width) * length
    return batch * (products + 3.5 * num_layers * attention)


def kernels(step: Callable[[], None], is_cuda: bool) -> Row:
    """Milliseconds of a step by kind of kernel, and of the longest (with their number)."""
    activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step()
        if is_cuda:
            torch.cuda.synchronize()
    totals: dict[str, float] = {}
    longest: list[tuple[float, int, str]] = []
    for event in profiler.key_averages():
        micros = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        kind = next((k for k, p in KINDS.items() if re.search(p, event.key, re.I)), "other")
        totals[kind] = totals.get(kind, 0) + micros / 1e3
        longest.append((round(micros / 1e3, 2), event.count, event.key[:100]))
    table = {kind: round(ms, 2) for kind, ms in sorted(totals.items(), key=lambda item: -item[1])}
    return {**table, "all": round(sum(totals.values()), 2), "longest": sorted(longest)[:-16:-1]}


def draw(rows: list[Row], machine: Row, path: str) -> None:
    """Tokens/s and memory of each candidate, setting by setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = list(dict.fromkeys((r["length"], r["batch"]) for r in rows))
    figure, axes = pyplot.subplots(
        2, len(settings), figsize=(5 * len(settings), 6), layout="constrained", squeeze=False
    )
    for column, (length, batch) in enumerate(settings):
        chosen = [r for r in rows if (r["length"], r["batch"]) == (length, batch) and "ms" in r]
        names = [r["name"] for r in chosen]
        for axis, key in zip(axes[:, column], ("tokens_per_s", "peak_gib"), strict=True):
            bars = axis.barh(names, [r[key] or 0 for r in chosen])
            axis.bar_label(bars, fmt="{:,.0f}" if key == "tokens_per_s" else "{:.1f}", padding=3)
            axis.set(title=f"{key}, N={length}, B={batch}")
            axis.invert_yaxis()
            axis.margins(x=0.3)
    figure.suptitle(f"Training step, bfloat16, {machine['device']}, torch {machine['torch']}")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
