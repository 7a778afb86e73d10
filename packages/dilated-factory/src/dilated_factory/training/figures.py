"""Pictures: the loss curve of a run, bits per byte against context, times of attention."""

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dilated_factory.training.atomic import replacing
from dilated_factory.training.evaluation import ContextScore, context_gain

_TITLE_CHARACTERS = 80  # in a line as wide as a figure


def save_loss_curve(path: Path, metrics: Sequence[Mapping[str, Any]], unit: str = "byte") -> None:
    """Plot bits per byte against bytes read: each step, a running mean, and held-out bytes.

    The unit may be the base of a genome.
    """
    figure, axes = _new_figure()
    read, bits = megabytes(metrics), [record["bits_per_byte"] for record in metrics]
    axes.plot(read, bits, color="0.75", linewidth=0.8, label="each step")
    axes.plot(read, running_mean(bits), color="C0", label="running mean")
    _plot_validation(axes, metrics, "C1", "held out")
    axes.set(xlabel=_read(unit), ylabel=f"loss, bits per {unit}")
    axes.legend()
    _save(figure, path)


def save_comparison(
    path: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], unit: str = "byte"
) -> None:
    """Plot the running means of several runs over each other, held-out bytes as points."""
    figure, axes = _new_figure()
    for index, (name, metrics) in enumerate(runs.items()):
        bits = running_mean([record["bits_per_byte"] for record in metrics])
        axes.plot(megabytes(metrics), bits, color=f"C{index}", label=name)
        _plot_validation(axes, metrics, f"C{index}", None)
    axes.set(xlabel=_read(unit), ylabel=f"loss, bits per {unit}; points: held out")
    axes.legend()
    _save(figure, path)


def _read(unit: str) -> str:
    return f"training {unit}s read, {'MB' if unit == 'byte' else 'millions'}"


def megabytes(metrics: Sequence[Mapping[str, Any]]) -> list[float]:
    """What was read up to each step, in MB."""
    return [record["bytes_read"] / 1e6 for record in metrics]


def _plot_validation(
    axes: Any, metrics: Sequence[Mapping[str, Any]], color: str, label: str | None
) -> None:
    looked = [record for record in metrics if "validation_bits_per_byte" in record]
    bits = [record["validation_bits_per_byte"] for record in looked]
    if looked:
        axes.plot(megabytes(looked), bits, "o:", color=color, markersize=4, label=label)


def save_context_curve(
    path: Path,
    scores: Sequence[ContextScore],
    baselines: Mapping[str, float],
    trained_at: int,
    units: str = "bytes",
) -> None:
    """Plot held-out bits per byte against context, the baselines as horizontal lines."""
    figure, axes = _new_figure()
    contexts = [score.context for score in scores]
    axes.plot(contexts, [score.bits_per_byte for score in scores], marker="o", label="LongNet")
    for index, (name, bits) in enumerate(baselines.items(), start=1):
        axes.axhline(bits, color=f"C{index}", linestyle="--", label=name)
    axes.axvline(trained_at, color="0.75", linewidth=0.8, label="context in training")
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.minorticks_off()
    axes.set(xlabel=f"context, {units}", ylabel="held-out bits per byte")
    axes.legend()
    _save(figure, path)


def save_context_gain(path: Path, scores: Sequence[ContextScore]) -> None:
    """Plot the bits per byte that each context saves over the shortest, with standard errors."""
    figure, axes = _new_figure()
    shortest, *longer = scores
    gains = [context_gain(shortest, score) for score in longer]
    contexts = [score.context for score in scores]
    saved, errors = ([0.0, *values] for values in zip(*gains, strict=True))
    axes.errorbar(contexts, saved, errors, marker="o", capsize=3, label="LongNet")
    axes.axhline(0.0, color="0.75", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.minorticks_off()
    axes.set(
        xlabel="context, bytes",
        ylabel=f"held-out bits per byte saved, against context {shortest.context}",
    )
    axes.legend(loc="upper left")
    _save(figure, path)


def save_epochs(path: Path, records: Sequence[Mapping[str, float]]) -> None:
    """Plot what each epoch has under its names: losses to the left, scores to the right."""
    figure, axes = _new_figure()
    other = axes.twinx()
    epochs = [record["epoch"] for record in records]
    for index, name in enumerate(key for key in records[0] if key != "epoch"):
        values = [record.get(name, math.nan) for record in records]
        where = axes if "loss" in name else other
        where.plot(epochs, values, color=f"C{index}", marker=".", label=name)
    axes.set(xlabel="epoch", ylabel="loss")
    other.set(ylabel="score")
    figure.legend(loc="upper center", ncols=3, fontsize=8)
    _save(figure, path)


def save_timings(path: Path, seconds: Mapping[str, Sequence[float]], title: str) -> None:
    """Plot the least time of each contender as a bar, with a line up to its median."""
    figure, axes = _new_figure()
    names = list(seconds)
    least = [1e3 * min(seconds[name]) for name in names]
    spread = [
        1e3 * statistics.median(seconds[name]) - low for name, low in zip(names, least, strict=True)
    ]
    axes.barh(names, least, xerr=[[0.0] * len(names), spread], color="C0", capsize=3)
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds: least, and up to the median")
    figure.suptitle(textwrap.fill(title, _TITLE_CHARACTERS), fontsize=9)
    _save(figure, path)


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean of the last twentieth of the values up to each, so that the end is not blurred."""
    width = max(1, len(values) // 20)
    means = []
    total = 0.0
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        means.append(total / min(index + 1, width))
    return means


def _new_figure() -> tuple[Any, Any]:
    # Figure itself, not pyplot: no global state and no window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
