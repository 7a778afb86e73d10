"""The worked example: a small cohort of it, and what it promises of one."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dilated_factory.slides import tasks

EXAMPLE = Path(__file__).parents[4] / "examples" / "relative_places.py"


@pytest.fixture
def example() -> dict[str, Any]:
    if not EXAMPLE.exists():
        pytest.skip("the examples are in the repository only")
    return runpy.run_path(str(EXAMPLE))


def test_the_mean_of_its_tiles_tells_nothing_of_the_label(example: dict[str, Any]) -> None:
    generator = np.random.default_rng(0)
    slides = {left: example["make_slide"](generator, 5000, left) for left in (True, False)}
    kinds = {left: slide["features"].argmax(1) for left, slide in slides.items()}
    means = [slide["features"].astype(float).mean(0) for slide in slides.values()]
    assert np.abs(means[0] - means[1]).max() < 0.1
    for left, slide in slides.items():
        strong = slide["features"].max(1) > 5
        first, second = (
            slide["coords"][strong & (kinds[left] == kind), 0].mean() for kind in (0, 1)
        )
        assert (first < second) == left


def test_it_runs_small_and_reports_all_three_models(
    example: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("sklearn", reason="scikit-learn, of the extra slides, is not installed")
    monkeypatch.setattr(tasks, "RESAMPLES", 20)
    tiles = example["make_cohort"](tmp_path / "cohort", 20, 600)
    assert 20 * 500 <= tiles <= 20 * 600
    found = example["compare"](tmp_path / "cohort", 1, [0])
    assert set(found) == {"encoder", "mean_pool", "abmil"}
    assert all(0 <= low <= value <= high <= 1 for value, low, high in found.values())
    assert capsys.readouterr().out.count("AUROC") == 3
