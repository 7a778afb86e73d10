"""The pictures of the documentation, drawn from figures of `benchmarks/` and from patterns.

`python -m tools.pictures` draws the README's one anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ROOT = Path(__file__).parent.parent
README_PICTURE = ROOT / "docs" / "pictures" / "time.png"
OURS, OTHER = "#3f51b5", "#e8710a"


def read(name: str) -> Any:
    """The results of a benchmark as they are committed."""
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))


def draw_time(path: Path) -> None:
    """Milliseconds of attention against length, and of a token against what stands before it."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    attention, token = figure.subplots(1, 2)
    rows = read("gpu-h200")["lengths"]
    names = {"torchscale": ("torchscale", OTHER), "ours": ("Dilated", OURS)}
    for name, (label, colour) in names.items():
        line = [(row["length"], row["both_ms"]) for row in rows if row["name"] == name]
        attention.plot(*zip(*line, strict=True), "o-", color=colour, label=label, markersize=4)
    _logarithmic(attention, "tokens")
    attention.set_yscale("log")
    attention.yaxis.set_major_formatter("{x:g}")
    attention.set_title("Attention, forward + backward", fontsize=10)
    rows = read("decoding-h200")["rows"]
    names = {"dense": ("a compiled Llama, static cache", OTHER), "ours": ("Dilated", OURS)}
    for name, (label, colour) in names.items():
        line = [(r["context"], r["token"]) for r in rows if r["batch"] == 1 and r["model"] == name]
        token.plot(*zip(*sorted(line), strict=True), "o-", color=colour, label=label, markersize=4)
    _logarithmic(token, "tokens before it")
    token.set_ylim(0, 2)
    token.set_title("A generated token, 85 M parameters", fontsize=10)
    for axis in (attention, token):
        axis.set_ylabel("ms, one NVIDIA H200, bfloat16")
        axis.legend(frameon=False)
    _write(figure, path)


def _logarithmic(axis: Axes, label: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xlabel(label)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_formatter(
        lambda x, _: f"{x / 1048576:g}M" if x >= 1 << 20 else f"{x / 1024:g}K"
    )


def _short(number: int) -> str:
    return f"{number >> 20}M" if number >= 1 << 20 else f"{number >> 10}K"


def draw_pattern(path: Path) -> None:
    """Which keys each query sees, branch by branch and all together."""
    from dilated_core import DilatedPattern
    from dilated_core.plot import plot_pattern

    pattern = DilatedPattern([8, 16, 32], [1, 2, 4])
    _write(plot_pattern(pattern, 32, heads=4, is_causal=True), path)


def draw_ring(path: Path) -> None:
    """Which rows of keys travel between four ranks for one branch of a pattern."""
    figure = Figure(figsize=(9, 2.4), layout="constrained")
    axis = figure.subplots()
    ranks, each, rate = 4, 16, 4
    sent = each // rate
    for rank in range(ranks):
        left = rank * (each + 2)
        for row in range(each):
            axis.add_patch(_bar(left + row, 6.0, "#e0e0e0" if row % rate else OURS))
        axis.text(left + each / 2, 8.4, f"rank {rank}", ha="center", fontsize=9)
        if rank < ranks - 1:
            target = (ranks - 2) * (each + 2) + sent * rank + sent / 2
            style = {"arrowstyle": "->", "color": OURS}
            axis.annotate("", (target, 2.1), (left + each / 2, 5.8), arrowprops=style)
    start = (ranks - 2) * (each + 2)
    for row in range((ranks - 1) * sent):
        axis.add_patch(_bar(start + row, 0.0, OURS))
    words = "rank 3 receives the kept rows"
    axis.text(start - 1, 1.0, words, ha="right", va="center", fontsize=9)
    words = "and attends its own meanwhile"
    axis.text(start + (ranks - 1) * sent + 1, 1.0, words, va="center", fontsize=9)
    axis.set_xlim(-1, ranks * (each + 2))
    axis.set_ylim(-0.5, 10)
    axis.axis("off")
    _write(figure, path)


def _bar(x: float, y: float, colour: str) -> Rectangle:
    return Rectangle((x, y), 0.85, 1.8, facecolor=colour)


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")


if __name__ == "__main__":
    draw_time(README_PICTURE)
