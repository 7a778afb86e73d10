"""Every Python block of the documentation runs, without a warning, and shows something."""

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDED = ["dilated-ring", "dilated-sparse", "dilated-pool", "dilated-factory"]


def pages() -> list[object]:
    found: list[object] = []
    for page in sorted(DOCS.rglob("*.md")):
        blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
        name = page.relative_to(DOCS).as_posix()
        found += [pytest.param(x, id=f"{name}:{i}") for i, x in enumerate(blocks)]
    return found


@pytest.mark.parametrize("code", pages())
def test_a_block_of_the_guides_runs_and_shows_something(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in [*NEEDED, *(["transformers"] if "transformers" in code else [])]:
        try:
            distribution(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        try:
            exec(compile(code, "guide", "exec"), {"__name__": "__main__"})
        except ImportError as error:
            if type(error).__name__ != "MissingPackageError":
                raise
            pytest.skip(str(error))
    assert capsys.readouterr().out.strip()
