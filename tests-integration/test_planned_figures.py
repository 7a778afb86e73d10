"""The tables of plans beside what was counted and measured: the plans of today are still those."""

import json
from pathlib import Path
from typing import Any

import pytest

from dilated_core import DilatedPattern
from dilated_factory import LongNetConfig, TrainConfig
from dilated_factory.training.planning import Setup, plan_training

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def rows(name: str, part: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((BENCHMARKS / name).read_text("utf-8"))[part]
    return found


@pytest.mark.parametrize("row", rows("plan-cpu.json", "plans"), ids=lambda row: row["recompute"])
def test_what_was_counted_on_the_cpu_is_what_is_planned(row: dict[str, Any]) -> None:
    """In compiled blocks too, which no other test makes."""
    shape = {name: row[name] for name in row if name in LongNetConfig.model_fields}
    options = {name: row[name] for name in ("dtype", "recompute")}
    config = TrainConfig(model=LongNetConfig(**shape), batch_size=2, steps=1, **options)
    needs = plan_training(config, Setup("cpu", row["compiled"]))
    assert needs.peak == row["planned_peak"]
    kept = needs.activations
    if row["recompute"] != "all":
        kept += needs.inputs - 8 * 5 * config.model.context
    assert kept == row["planned_kept"] == row["counted_kept"]
    if not row["compiled"]:
        assert needs.peak == pytest.approx(row["measured_peak"], rel=0.12)


def test_peaks_that_were_measured_on_an_h200_are_within_a_few_percent() -> None:
    """Of compiled models that took no optimizer's step; nothing was fitted to more than these."""
    pattern = DilatedPattern([2048 * 2**k for k in range(5)], [2**k for k in range(5)])
    again = {"ours, compiled": "none", "ours, compiled, pointwise": "pointwise"}
    compared = 0
    for row in rows("training-h200.json", "steps"):
        if row["name"] not in again:
            continue
        shape = LongNetConfig(
            embed_dim=row["embed_dim"], num_heads=row["num_heads"], num_layers=row["num_layers"],
            context=row["length"], segment_lengths=pattern.segment_lengths,
            dilation_rates=pattern.dilation_rates,
        )  # fmt: skip
        options: dict[str, Any] = {"recompute": again[row["name"]], "batch_size": row["batch"]}
        needs = plan_training(TrainConfig(model=shape, steps=1, dtype="bfloat16", **options))
        assert needs.parameters == row["parameters"]
        planned = (needs.peak - needs.optimizer) / 2**30
        assert planned == pytest.approx(row["peak_gib"], rel=0.05)
        compared += 1
    assert compared == 6
