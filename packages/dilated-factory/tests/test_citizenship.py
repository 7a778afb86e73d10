"""The package as others meet it: a light import, a README whose example runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_import_leaves_the_command_line_out() -> None:
    code = (
        "import sys, dilated_factory; "
        "print([m for m in ('typer', 'rich', 'matplotlib', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not README.exists(), reason="tested away from the source tree")
def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = re.findall(
        r"(?<!no-test -->\n)```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL
    )
    assert examples
    for example in examples:
        exec(compile(example, str(README), "exec"), {"__name__": "readme"})
