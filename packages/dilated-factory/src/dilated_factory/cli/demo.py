"""`dilated demo`: from nothing to a trained and evaluated LongNet in a few minutes."""

from collections.abc import Mapping, Sequence
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
from dilated_factory.training.evaluation import ContextScore, context_gain
from dilated_factory.training.figures import save_context_gain
from dilated_factory.training.finding import standard_library
from dilated_factory.training.precision import automatic_dtype
from dilated_factory.training.revisions import PAGE, VERSIONS, write_revisions
from dilated_factory.training.trained import evaluate_run, load_trained

# Small enough for two CPU cores. Two heads see what is near; of the other two each sees the whole
# context at every second position, from the positions that the other one leaves out.
DEMO_MODEL = LongNetConfig(
    embed_dim=64,
    num_layers=2,
    context=2048,
    segment_lengths=(65, 129, 2048, 2048),
    dilation_rates=(1, 1, 2, 2),
    head_groups="split",
)
LEARNING_RATE = 1.6e-2
CONTEXTS = (128, 256, 512, 1024, 2048)
REQUIRED_ERRORS = 3.0  # standard errors of what the context saves
SCORED_BYTES = 65536
TRAIN_BYTES, HELD_OUT_BYTES = 8_000_000, 400_000
EXIT_BAD_NEWS = 1
_BEGUN = 32


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for everything; if taken, OUT-2, OUT-3, ... is used.")
    ] = Path("demo"),
    minutes: Annotated[float, typer.Option(help="Time to train for.")] = 3.5,
    seed: Annotated[int, typer.Option(help="Of text, weights and batches.")] = 0,
) -> int:
    """Train a small LongNet on versions of code, and see what a longer context is worth.

    The text is made of Python's standard library: pages of 1024 bytes of its files, each in six
    versions, one after the other. Under five minutes on two CPU cores. Exits with code 1 if the
    model does not beat the stronger of two byte Markov models on held-out files, or if the longest
    context does not save more than three standard errors over the shortest.

    Example:
        dilated demo --out demo
    """
    console = plain_console()
    folder = _free(out)
    texts = folder.with_name(f"{folder.name}-corpus").resolve()
    config = TrainConfig(
        model=DEMO_MODEL,
        paths=(str(texts / "train"),),
        validation=(str(texts / "held-out"),),
        minutes=minutes,
        learning_rate=LEARNING_RATE,
        dtype=automatic_dtype(torch.device("cpu")),
        seed=seed,
    )
    sizes = {"train": TRAIN_BYTES, "held_out": HELD_OUT_BYTES}
    write_revisions(standard_library(), texts, **sizes, seed=seed)
    console.print(
        f"training for {minutes:g} minutes on pages of Python's standard library, each in "
        f"{VERSIONS} versions, one after the other",
        soft_wrap=True,
    )
    trainer = start_run(folder, config, console)
    code = run_training(trainer, console)
    if code:
        return code
    trained = load_trained(folder)
    with progress_bar() as show:
        evaluation = evaluate_run(
            trained, contexts=CONTEXTS, max_bytes=SCORED_BYTES, on_progress=show
        )
    picture = folder / "contexts.png"
    save_context_gain(picture, evaluation.scores)
    console.print(evaluation_table(evaluation))
    console.print(f"loss curve: {trained.run.curves_path}", soft_wrap=True)
    console.print(f"bits per byte saved by context: {picture}", soft_wrap=True)
    prompt = (texts / "held-out").read_bytes()[: PAGE + 1 + _BEGUN]
    sample = generate(trained.model, prompt, max_bytes=240, temperature=0.5, seed=seed)
    console.print(f"sample, after a held-out page and {_BEGUN} bytes of its next version:")
    begun = prompt[PAGE + 1 :]
    console.print(printable((begun + sample).decode("utf-8", "replace")), soft_wrap=True)
    return _verdict(evaluation.scores, evaluation.baselines, console)


def _verdict(
    scores: Sequence[ContextScore], baselines: Mapping[str, float], console: Console
) -> int:
    short, *_, long = scores
    stronger = min(baselines, key=lambda name: baselines[name])
    is_beaten = long.bits_per_byte < baselines[stronger]
    gain = context_gain(short, long)
    is_worth = gain.bits_per_byte > REQUIRED_ERRORS * gain.error
    console.print(
        f"{long.bits_per_byte:.3f} bits per byte at context {long.context}: "
        f"{_beside(long.bits_per_byte, baselines[stronger])} {stronger}, the stronger baseline "
        f"({'beaten' if is_beaten else 'not beaten'})",
        soft_wrap=True,
    )
    console.print(
        f"context {long.context} saves {gain.bits_per_byte:.3f} ± {gain.error:.3f} bits per byte "
        f"over {short.context} (standard error of {len(long.sections)} sections; more than "
        f"{REQUIRED_ERRORS:g} of it {'is' if is_worth else 'is not'} reached)",
        soft_wrap=True,
    )
    return 0 if is_beaten and is_worth else EXIT_BAD_NEWS


def _beside(bits: float, baseline: float) -> str:
    difference = bits / baseline - 1
    return f"{abs(difference):.1%} {'below' if difference < 0 else 'above'}"


def _free(folder: Path) -> Path:
    """The folder itself, or the first of folder-2, folder-3, ... that does not exist."""
    if not folder.name:
        raise InputError(f"--out must be a folder with a name. Got {str(folder)!r}.")
    candidate, number = folder, 1
    while candidate.exists() or candidate.with_name(f"{candidate.name}-corpus").exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
