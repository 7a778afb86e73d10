"""`dilated generate`: continue a prompt."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from dilated_factory.cli.options import Device
from dilated_factory.models.generation import generate as generate_bytes
from dilated_factory.training.loop import select_device
from dilated_factory.training.trained import load_trained


def generate(
    run: Annotated[Path, typer.Argument(help="Run folder of `dilated train`.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; not empty.")] = "import ",
    max_bytes: Annotated[int, typer.Option(min=0, help="Bytes to add.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest byte each time.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw among the k likeliest bytes only.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Device = "cpu",
) -> int:
    """Continue a prompt, byte by byte; print prompt and continuation.

    Bytes that are not UTF-8 are printed as the replacement character.

    Examples:
        dilated generate runs/longnet --prompt "def main("
        dilated generate runs/longnet --max-bytes 1000 --temperature 0.5 --top-k 40
    """
    if not prompt:
        raise typer.BadParameter("must hold at least one byte", param_hint="'--prompt'")
    trained = load_trained(run, device=select_device(device))
    start = prompt.encode("utf-8", "surrogateescape")
    added = generate_bytes(
        trained.model,
        start,
        max_bytes=max_bytes,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
    )
    sys.stdout.write(printable(start + added) + "\n")
    return 0


def printable(content: bytes) -> str:
    """Bytes as text that the terminal can show: no invalid UTF-8, no control characters."""
    text = content.decode("utf-8", "replace")
    safe = "".join(
        char if char in "\n\t" or char.isprintable() else "\N{REPLACEMENT CHARACTER}"
        for char in text
    )
    encoding = sys.stdout.encoding or "utf-8"
    return safe.encode(encoding, "replace").decode(encoding)
