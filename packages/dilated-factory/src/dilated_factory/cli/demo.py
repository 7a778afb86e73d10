"""`dilated demo`: from nothing to a trained and evaluated LongNet in a few minutes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from dilated_factory.cli.display import progress_bar
from dilated_factory.cli.evaluate import evaluation_table
from dilated_factory.cli.generate import printable
from dilated_factory.cli.output import plain_console
from dilated_factory.cli.train import run_training, start_run
from dilated_factory.configs.models import LongNetConfig, TrainConfig
from dilated_factory.errors import InputError
from dilated_factory.models.generation import generate
from dilated_factory.training.figures import save_context_curve
from dilated_factory.training.precision import automatic_dtype
from dilated_factory.training.trained import evaluate_run, load_trained

# Small enough for two CPU cores, with a context that only cheap attention affords there.
DEMO_MODEL = LongNetConfig(num_layers=2)
REQUIRED_MARGIN = 0.15
_REQUIRED = "Markov order 1"  # the margin is over this one
SCORED_BYTES = 65536
EXIT_MARGIN_MISSED = 1
_PROMPT = "import os\nimport sys\n\n\ndef "


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for everything; if taken, OUT-2, OUT-3, ... is used.")
    ] = Path("demo"),
    minutes: Annotated[float, typer.Option(help="Time to train for.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
) -> int:
    """Train a small LongNet on Python's standard library, evaluate it and let it write.

    Under five minutes on two CPU cores. Exits with code 1 if the model does not beat an order-1
    byte Markov model by 15% on held-out files; how it stands beside the stronger of the two Markov
    models is said too.

    Example:
        dilated demo --out demo
    """
    console = plain_console()
    folder = _free(out)
    dtype = automatic_dtype(torch.device("cpu"))
    config = TrainConfig(model=DEMO_MODEL, minutes=minutes, seed=seed, dtype=dtype)
    console.print(
        f"training for {minutes:g} minutes on the sources of Python's standard library",
    )
    trainer = start_run(folder, config, console)
    code = run_training(trainer, console)
    if code:
        return code
    trained = load_trained(folder)
    with progress_bar() as show:
        evaluation = evaluate_run(trained, max_bytes=SCORED_BYTES, on_progress=show)
    picture = folder / "contexts.png"
    save_context_curve(picture, evaluation.scores, evaluation.baselines, DEMO_MODEL.context)
    console.print(evaluation_table(evaluation))
    console.print(f"loss curve: {trained.run.curves_path}", soft_wrap=True)
    console.print(f"bits per byte against context: {picture}", soft_wrap=True)
    prompt = _PROMPT.encode()
    sample = generate(trained.model, prompt, max_bytes=240, temperature=0.7, seed=seed)
    console.print("sample, after a prompt of four lines:")
    console.print(printable((prompt + sample).decode("utf-8", "replace")), soft_wrap=True)
    at_training = {score.context: score.bits_per_byte for score in evaluation.scores}
    bits = at_training[DEMO_MODEL.context]
    return _verdict(bits, evaluation.baselines, console)


def _verdict(bits: float, baselines: Mapping[str, float], console: Console) -> int:
    stronger = min(baselines, key=lambda name: baselines[name])
    margin = 1 - bits / baselines[_REQUIRED]
    beaten = "beaten" if bits < baselines[stronger] else "not beaten"
    console.print(
        f"{bits:.3f} bits per byte at context {DEMO_MODEL.context}: "
        f"{_beside(bits, baselines[stronger])} {stronger}, the stronger baseline ({beaten}); "
        f"{_beside(bits, baselines[_REQUIRED])} {_REQUIRED} ({REQUIRED_MARGIN:.0%} below is "
        "required)",
        soft_wrap=True,
    )
    return 0 if margin >= REQUIRED_MARGIN else EXIT_MARGIN_MISSED


def _beside(bits: float, baseline: float) -> str:
    difference = bits / baseline - 1
    return f"{abs(difference):.1%} {'below' if difference < 0 else 'above'}"


def _free(folder: Path) -> Path:
    """The folder itself, or the first of folder-2, folder-3, ... that does not exist."""
    if not folder.name:
        raise InputError(f"--out must be a folder with a name. Got {str(folder)!r}.")
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
