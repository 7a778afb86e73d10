"""`dilated train`: train a LongNet language model on the bytes of files."""

import signal
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from dilated_factory.cli.display import file_size, training_display
from dilated_factory.cli.options import Device, DtypeName, parse_lengths, sight_warning
from dilated_factory.cli.output import plain_console, silent_console
from dilated_factory.cli.signals import StopRequest
from dilated_factory.configs.models import FrozenConfig, TrainConfig, parse_config
from dilated_factory.errors import RunError
from dilated_factory.training.corpus import Corpus, load_corpus
from dilated_factory.training.figures import save_loss_curve
from dilated_factory.training.loop import ALONE, Trainer, select_device
from dilated_factory.training.parallel import DataParallel, Parallel, join, leave, was_restarted
from dilated_factory.training.run_folder import RunFolder

DEFAULT_MINUTES = 10.0


def train(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files and folders to learn from; default: the sources of Python's standard "
            "library.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Run folder; must be new, except with --resume.")
    ] = Path("runs/longnet"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the newest checkpoint in --out, with its settings."
        ),
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps to take.")] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Train for this long instead; the default is 10.", show_default=False),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Bytes per training sequence; default 8192.")
    ] = None,
    segment_lengths: Annotated[
        str | None,
        typer.Option(
            help="Segment of each branch, as in 64,129,1024,8192; default: by the context."
        ),
    ] = None,
    dilation_rates: Annotated[
        str | None, typer.Option(help="Dilation of each branch, as in 1,1,4,16.")
    ] = None,
    head_offsets: Annotated[
        Literal["interleaved", "blocked"] | None,
        typer.Option(help="Which rows a head keeps: interleaved (default) or blocked."),
    ] = None,
    embed_dim: Annotated[int | None, typer.Option(help="Width of the model.")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    num_layers: Annotated[int | None, typer.Option(help="Decoder blocks.")] = None,
    positions: Annotated[
        Literal["rotary", "xpos"] | None, typer.Option(help="Position embedding.")
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout rate, 0 to 1.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="float32, or bfloat16 mixed precision.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, batches and dropout.")] = None,
    device: Device = "cpu",
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    sequence_parallel: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes that share each sequence, under torchrun; the rest share the batch.",
        ),
    ] = 1,
    data_parallel: Annotated[
        DataParallel,
        typer.Option(
            help="Under torchrun: all weights on every process (ddp), or a part of them and of the "
            "optimizers on each (fsdp)."
        ),
    ] = "ddp",
) -> int:
    r"""Train a LongNet language model on the bytes of files.

    One file in twenty is held out for `dilated evaluate`. SIGHUP, Ctrl-C or SIGTERM saves and exits
    with code 129, 130 or 143; `--resume` goes on as if nothing had happened. Under `torchrun` the
    processes share the batch, or with `--sequence-parallel` its sequences, and with
    `--data-parallel fsdp` the weights; the losses are those of one process. A folder takes one run
    at a time.

    Examples:
        dilated train --minutes 5
        dilated train src docs --out runs/mine --context 16384
        dilated train --out runs/mine --resume
        torchrun --nproc-per-node 4 -m dilated_factory train --sequence-parallel 4
        torchrun --nproc-per-node 4 -m dilated_factory train --batch-size 4 \
            --data-parallel fsdp
    """
    model = {
        "context": context,
        "segment_lengths": parse_lengths("--segment-lengths", segment_lengths),
        "dilation_rates": parse_lengths("--dilation-rates", dilation_rates),
        "head_offsets": head_offsets,
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "num_layers": num_layers,
        "positions": positions,
        "dropout": dropout,
    }
    training = {
        # Absolute, so that a run can be resumed and evaluated from another folder.
        "paths": tuple(str(Path(path).resolve()) for path in paths) if paths else None,
        "steps": steps,
        "minutes": minutes,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "dtype": dtype,
        "seed": seed,
    }
    parallel = join(
        select_device(device), sequence_parallel=sequence_parallel, data_parallel=data_parallel
    )
    console = plain_console() if parallel.is_main else silent_console()
    if resume or (was_restarted() and (out / "config.json").exists()):
        run = RunFolder.open(out)
        _require_same(run.config.model, _given(model))
        _require_same(run.config, _given(training))
        corpus = _corpus(run.config, console, run.corpus_digest())
        trainer = Trainer(run, corpus, parallel=parallel, checkpoint_every=checkpoint_every)
        trainer.restore()
    else:
        if steps is None and minutes is None:
            training["minutes"] = DEFAULT_MINUTES
        config = parse_config(TrainConfig, {"model": _given(model), **_given(training)})
        trainer = start_run(
            out, config, console, parallel=parallel, checkpoint_every=checkpoint_every
        )
    code = run_training(trainer, console)
    if code == 0:
        console.print(f"next: dilated evaluate {trainer.run.path}", soft_wrap=True)
    leave()
    return code


def start_run(
    out: Path,
    config: TrainConfig,
    console: Console,
    *,
    parallel: Parallel = ALONE,
    checkpoint_every: int = 100,
) -> Trainer:
    """Check everything, then make the run folder and a trainer at step 0."""
    RunFolder.require_new(out)
    corpus = _corpus(config, console)
    return Trainer.start(out, config, corpus, parallel=parallel, checkpoint_every=checkpoint_every)


def run_training(trainer: Trainer, console: Console) -> int:
    """Train with a display until the end or a signal; return the exit code."""
    run = trainer.run
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    console.print(
        f"{parameters:,} parameters, context {run.config.model.context:,} bytes, "
        f"{trainer.parallel.device}, from step {trainer.step}",
    )
    if warning := sight_warning(run.config.model, run.config.model.context):
        console.print(warning, soft_wrap=True)
    with StopRequest() as stop, training_display(console) as display:
        done = trainer.train(on_step=display.show, should_stop=lambda: stop.requested)
        metrics = run.read_metrics() if trainer.parallel.is_main else []
        if metrics:
            save_loss_curve(run.curves_path, metrics)
    if done:
        console.print(f"done: {trainer.step} steps. Loss curve: {run.curves_path}", soft_wrap=True)
        return 0
    console.print(f"stopped after step {trainer.step}, saved.", soft_wrap=True)
    console.print(f"to go on: dilated train --resume --out {run.path}", soft_wrap=True)
    # On several ranks the signal may have come to another one.
    return stop.exit_code if stop.requested else 128 + signal.SIGTERM


def _corpus(config: TrainConfig, console: Console, digest: str | None = None) -> Corpus:
    corpus = load_corpus(
        config.paths, validation_fraction=config.validation_fraction, digest=digest
    )
    console.print(
        f"corpus: {file_size(len(corpus.train))} in {len(corpus.train_files)} files to train on, "
        f"{file_size(len(corpus.validation))} in {len(corpus.validation_files)} held out",
        soft_wrap=True,
    )
    if corpus.skipped:
        console.print(f"skipped {corpus.skipped} files that cannot be read")
    return corpus


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _require_same(config: FrozenConfig, given: dict[str, Any]) -> None:
    changed = [
        f"{name} is {getattr(config, name)!r} there and {value!r} here"
        for name, value in given.items()
        if getattr(config, name) != value
    ]
    if changed:
        raise RunError(f"the run folder is from another configuration: {'; '.join(changed)}.")
