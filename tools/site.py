"""What MkDocs calls while it builds the documentation: pages and pictures made from the code.

The reference has a section for each public name, the figures come from `benchmarks/*.json`, the
explorer is the page of `dilated show`. A page that would fetch anything from elsewhere fails.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # MkDocs loads this file by its path

from tools import pictures  # noqa: E402  # as above
from tools.fetched import outside_requests  # noqa: E402  # as above
from tools.packages import PACKAGES, import_name  # noqa: E402


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures that are made."""
    for package in PACKAGES:
        module = import_name(package)
        page = f"reference/{module.removeprefix('dilated_')}.md"
        files.append(File.generated(config, page, content=reference(package)))
    files.append(File.generated(config, "figures.md", content=figures()))
    for place, content in made():
        files.append(File.generated(config, place, content=content))
    return files


def on_post_build(config: Any) -> None:
    """Fail on anything that a browser would fetch from elsewhere."""
    found = []
    for path in sorted(Path(config["site_dir"]).rglob("*")):
        if path.suffix in {".html", ".css"}:
            text = path.read_text(encoding="utf-8")
            found += [f"{path.name}: {hit}" for hit in outside_requests(text)]
    if found:
        raise PluginError("the pages would fetch from elsewhere:\n" + "\n".join(found))


def public_names(package: str) -> list[str]:
    """The names in `__all__`, in its order, without the version."""
    module = import_name(package)
    source = ROOT / "packages" / package / "src" / module / "__init__.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if name != "__version__"]
    raise PluginError(f"{source} has no __all__")


def reference(package: str) -> str:
    """The page of a package: a section for each public name."""
    module = import_name(package)
    parts = [f"# {module}\n\n[What it is, with an example](../packages.md#{package})\n"]
    for name in public_names(package):
        parts.append(f"::: {module}.{name}\n")
    return "\n".join(parts)


@functools.cache
def made() -> list[tuple[str, bytes]]:
    """Pictures and the explorer by their places; made once, also where MkDocs serves."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures.draw_pattern(folder / "pattern.png")
        pictures.draw_ring(folder / "ring.png")
        for picture in sorted(folder.iterdir()):
            found.append((f"pictures/{picture.name}", picture.read_bytes()))
        page = folder / "explorer.html"
        shape = ["--length", "96", "--segment-lengths", "8,24,96", "--dilation-rates", "1,2,4"]
        command = [sys.executable, "-m", "dilated_factory", "show", "--heads", "4", "--causal"]
        subprocess.run([*command, *shape, "--html", str(page)], check=True, capture_output=True)
        found.append(("how/pattern.html", page.read_bytes()))
    return found


def figures() -> str:
    """Tables of what was measured, from the results that are committed."""
    training, decoding = pictures.read("training-h200"), pictures.read("decoding-h200")
    gpu, sparse = pictures.read("gpu-h200"), pictures.read("sparse-h200")
    ring = pictures.read("ring-h200")
    return "\n".join([
        "# Figures",
        "",
        "Each table is read from a file of results in `benchmarks/`, written by the command above",
        "it. `benchmarks/NOTES.md` has what was tried and where the kernels fall short.",
        "",
        "![Milliseconds against length](pictures/time.png)",
        "",
        *section("A training step", "training.py --torchscale CHECKOUT", training["machine"]),
        *table(training["steps"], {
            "tokens": "length", "batch": "batch", "model": "name", "ms": "ms",
            "tokens/s": "tokens_per_s", "peak GiB": "peak_gib",
        }),
        *section("A generated token", "decoding.py --dense", decoding["machine"]),
        *table(decoding["rows"], {
            "model": "model", "tokens before it": "context", "batch": "batch",
            "ms a token": "token", "ms for the prompt": "prompt", "bytes of state": "state_bytes",
        }),
        *section("Attention", "gpu.py --torchscale CHECKOUT", gpu["machine"]),
        *table(gpu["patterns"], {
            "pattern": "pattern", "tokens": "length", "heads": "heads", "head_dim": "head_dim",
            "causal": "causal", "": "name", "forward ms": "forward_ms",
            "forward + backward ms": "both_ms",
        }),
        *section("Block layouts", "sparse_gpu.py", sparse["machine"]),
        *table(sparse["layouts"], {
            "layout": "layout", "density": "true_density", "head_dim": "head_dim", "": "name",
            "forward ms": "forward_ms", "forward + backward ms": "both_ms",
        }),
        *section("Several ranks", "ring.py", ring["machine"]),
        *table(ring["rows"], {
            "": "row", "causal": "causal", "tokens a rank": "tokens a rank", "ring ms": "ring ms",
            "alone / ring": "alone / ring", "exposed": "exposed",
        }),
    ])  # fmt: skip


def section(title: str, command: str, machine: dict[str, Any]) -> list[str]:
    """A heading, the command, and where it ran."""
    device = machine.get("device") or machine["gpu"]
    where = f"{device}, torch {machine['torch']}"
    if "date" in machine:
        where += f", {machine['date']}"
    return ["", f"## {title}", "", f"`python benchmarks/{command}` on {where}.", ""]


def table(rows: Iterable[dict[str, Any]], columns: dict[str, str]) -> list[str]:
    """A table in Markdown: headings and the keys of their values."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        values = (row.get(key) for key in columns.values())
        lines.append("| " + " | ".join(map(written, values)) + " |")
    return lines


def written(value: object) -> str:
    """A value of a table as a person writes it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
