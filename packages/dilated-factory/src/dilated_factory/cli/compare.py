"""`dilated compare`: runs beside each other, as a table and as curves."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dilated_factory.cli.options import Json
from dilated_factory.cli.output import plain_console
from dilated_factory.errors import RunError
from dilated_factory.training.figures import running_mean, save_comparison
from dilated_factory.training.run_folder import GENOME, RunFolder


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders of `dilated train`, or all of `dilated genomes train`."),
    ],
    png: Annotated[Path | None, typer.Option(help="Draw the curves into this file.")] = None,
    as_json: Json = False,
) -> int:
    """Compare runs: how far each is, its loss, on held-out bytes too, its speed.

    The loss is the mean over the last twentieth of the steps, that on held-out bytes the least one.

    Examples:
        dilated compare runs/mine runs/longer
        dilated compare runs/* --png compare.png --json
    """
    found = {str(path): _metrics(path) for path in runs}
    units = {name: "base" if (Path(name) / GENOME).exists() else "byte" for name in found}
    if len(set(units.values())) > 1:
        raise RunError(
            f"runs must be all on texts or all on genomes, whose bits are per base. Got {units}."
        )
    (unit,) = set(units.values())
    records = [{**_record(name, metrics), "unit": unit} for name, metrics in found.items()]
    if png is not None:
        save_comparison(png, found, unit)
    if as_json:
        print(json.dumps(records))
        return 0
    console = plain_console()
    console.print(comparison_table(records, unit))
    if png is not None:
        console.print(f"written: {png}", soft_wrap=True)
    return 0


def _metrics(path: Path) -> list[dict[str, Any]]:
    metrics = RunFolder.open(path).read_metrics()
    if not metrics:
        raise RunError(f"run {str(path)!r} has taken no step yet.")
    return metrics


def _record(name: str, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    last = metrics[-1]
    looked = [line for line in metrics if "validation_bits_per_byte" in line]
    best = min(looked, key=lambda line: line["validation_bits_per_byte"], default=None)
    return {
        "run": name,
        "step": last["step"],
        "progress": last["progress"],
        "bytes_read": last["bytes_read"],
        "bits_per_byte": running_mean([line["bits_per_byte"] for line in metrics])[-1],
        "best_validation_bits_per_byte": best and best["validation_bits_per_byte"],
        "best_step": best and best["step"],
        "tokens_per_second": last.get("tokens_read", last["bytes_read"])
        / max(last["elapsed_seconds"], 1e-9),
        "bytes_per_second": last["bytes_read"] / max(last["elapsed_seconds"], 1e-9),
    }


def comparison_table(records: list[dict[str, Any]], unit: str) -> Table:
    """A row for each run."""
    table = Table()
    table.add_column("run", overflow="fold")
    read = "MB read" if unit == "byte" else "Mb read"
    for column in ("steps", "done", read, f"bits/{unit}", "held out, least", "tokens/s"):
        table.add_column(column, justify="right")
    for record in records:
        best = record["best_validation_bits_per_byte"]
        table.add_row(
            record["run"],
            f"{record['step']}",
            f"{record['progress']:.0%}",
            f"{record['bytes_read'] / 1e6:,.1f}",
            f"{record['bits_per_byte']:.3f}",
            "-" if best is None else f"{best:.3f} at {record['best_step']}",
            f"{record['tokens_per_second']:,.0f}",
        )
    return table
