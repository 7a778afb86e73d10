"""The package as others meet it: a light import."""

import subprocess
import sys


def test_the_import_leaves_the_command_line_out() -> None:
    code = (
        "import sys, dilated_factory; "
        "print([m for m in ('typer', 'rich', 'matplotlib', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
