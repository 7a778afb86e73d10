"""`dilated train`: train a LongNet language model on the bytes of files."""

import signal
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from dilated_factory.cli.display import (
    file_size,
    progress_bar,
    show_readings,
    training_display,
)
from dilated_factory.cli.fields import given_fields, with_fields
from dilated_factory.cli.options import (
    Cache,
    CheckpointEvery,
    Compiling,
    Device,
    Resume,
    sight_warning,
    unit,
)
from dilated_factory.cli.output import plain_console, silent_console
from dilated_factory.cli.signals import StopRequest
from dilated_factory.configs.models import LongNetConfig, TrainConfig, parse_config
from dilated_factory.corpora.tokens import INEXACT, Tokenizer, load_tokenizer
from dilated_factory.errors import InputError
from dilated_factory.training.compiling import decide_compile
from dilated_factory.training.corpus import Corpus, corpus_of
from dilated_factory.training.figures import save_loss_curve
from dilated_factory.training.flops import flops_per_token, peak_flops
from dilated_factory.training.loop import ALONE, StepMetrics, Trainer, select_device
from dilated_factory.training.parallel import DataParallel, join, leave, was_restarted
from dilated_factory.training.precision import automatic_dtype
from dilated_factory.training.profiling import profiling
from dilated_factory.training.run_folder import RunFolder
from dilated_factory.training.sources import changed, child_of, values_in
from dilated_factory.training.tensorboard import event_writer, logging_events

DEFAULT_MINUTES = 10.0


@with_fields(TrainConfig, LongNetConfig, but=("kind", "model", "paths", "parent"))
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
    resume: Resume = False,
    config: Annotated[
        Path | None,
        typer.Option(
            help="Settings in a TOML or JSON file, of which options change some; its paths count "
            "from its folder.",
            show_default=False,
        ),
    ] = None,
    parent: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Begin a new run with the weights and the settings of another, of which options "
            "change some; other paths are read as options say.",
            show_default=False,
        ),
    ] = None,
    cache: Cache = None,
    device: Device = "auto",
    compiling: Compiling = "auto",
    checkpoint_every: CheckpointEvery = 100,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write events for TensorBoard into --out too.")
    ] = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Trace some steps into --out and print where they went."),
    ] = False,
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
    **fields: Any,
) -> int:
    r"""Train a LongNet language model on the bytes of files.

    One file in twenty is held out for `dilated evaluate`, and for `--validate-every`. SIGHUP,
    Ctrl-C or SIGTERM saves and exits with code 129, 130 or 143; `--resume` goes on as if nothing
    had happened. Under `torchrun` the processes share the batch, or with `--sequence-parallel` its
    sequences, and with `--data-parallel fsdp` the weights; the losses are those of one process. A
    folder takes one run at a time.

    Examples:
        dilated train --minutes 5
        dilated train src docs --out runs/mine --context 16384 --validate-every 100
        dilated train --out runs/mine --resume
        dilated train --from runs/mine --out runs/longer --context 65536 --steps 500
        dilated train src --tokenizer tokenizer.json --out runs/tokens
        dilated train --config run.toml --out runs/filed --tensorboard
        torchrun --nproc-per-node 4 -m dilated_factory train --sequence-parallel 4
        torchrun --nproc-per-node 4 -m dilated_factory train --batch-size 4 \
            --data-parallel fsdp
    """
    parallel = join(
        select_device(device), sequence_parallel=sequence_parallel, data_parallel=data_parallel
    )
    console = plain_console() if parallel.is_main else silent_console()
    if tensorboard:
        event_writer()  # before anything is written
    given, shape = _given(fields, paths), given_fields(LongNetConfig, fields)
    options: dict[str, Any] = {"parallel": parallel, "checkpoint_every": checkpoint_every}
    if resume or (was_restarted() and (out / "config.json").exists()):
        if resume and (config or parent):
            raise InputError("--resume takes its settings from --out: no --config and no --from.")
        run = RunFolder.open(out)
        run.require_corpus()
        run.require_tokenizer(given.pop("tokenizer", None))
        run.require_same(shape | {k: v for k, v in given.items() if v != "auto"})
        options["compiled"] = decide_compile(compiling, parallel, console.print)
        corpus = _corpus(run.config, run.tokenizer(), console, run.corpus_digest(), cache)
        trainer = Trainer(run, corpus, **options)
        trainer.restore()
    else:
        values = _values(config, parent, anew="paths" in given)
        settled = settings(values, given, shape, parallel.device)
        options["compiled"] = decide_compile(compiling, parallel, console.print)
        trainer = start_run(out, settled, console, cache=cache, **options)
    code = run_training(trainer, console, tensorboard=tensorboard, profile=profile)
    if code == 0:
        console.print(f"next: dilated evaluate {trainer.run.path}", soft_wrap=True)
    leave()
    return code


def _given(fields: dict[str, Any], paths: list[str] | None) -> dict[str, Any]:
    """What options say; paths are absolute, so that the run is found again from another folder."""
    given = given_fields(TrainConfig, fields) | ({"paths": paths} if paths else {})
    for name in {"paths", "validation"} & given.keys():
        given[name] = tuple(str(Path(path).resolve()) for path in given[name])
    if given.get("tokenizer"):
        given["tokenizer"] = str(Path(given["tokenizer"]).resolve())
    return given


def _values(file: Path | None, parent: Path | None, *, anew: bool) -> dict[str, Any]:
    """What a file or another run says; with paths of its own the new one reads anew."""
    if file and parent:
        raise InputError("--config and --from must not be given together.")
    if parent:
        old = RunFolder.open(parent)
        old.tokenizer()  # of text
        if not anew:
            old.require_corpus()
    return values_in(file) if file else child_of(parent) if parent else {}


def settings(
    values: dict[str, Any], given: dict[str, Any], shape: dict[str, Any], device: torch.device
) -> TrainConfig:
    """What a new run is to do: values, changed by what was given, of the model by ``shape``."""
    values = changed(values, given, shape)
    if values.get("dtype", "auto") == "auto":
        values["dtype"] = automatic_dtype(device)
    if not {"steps", "minutes"} & values.keys():
        values["minutes"] = DEFAULT_MINUTES
    return parse_config(TrainConfig, values)


def start_run(
    out: Path, config: TrainConfig, console: Console, *, cache: Path | None = None, **options: Any
) -> Trainer:
    """Check everything, then make the run folder and a trainer at step 0.

    Options are those of `Trainer.start`.
    """
    RunFolder.require_new(out)
    options = {"parallel": ALONE, **options}
    corpus = _corpus(config, load_tokenizer(config.tokenizer), console, cache=cache)
    return Trainer.start(out, config, corpus, **options)


def run_training(
    trainer: Trainer,
    console: Console,
    *,
    tensorboard: bool = False,
    profile: bool = False,
    command: str = "train",
    bits_per: str = "byte",
) -> int:
    """Train with a display until the end or a signal; return the exit code.

    `command` is what goes on with it, and `bits_per` what the loss is per.
    """
    run, parallel = trainer.run, trainer.parallel
    config = run.config
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    tokens = unit(config) if bits_per == "byte" else f"{bits_per}s"
    console.print(
        f"{parameters:,} parameters, context {config.model.context:,} {tokens}, "
        f"{config.dtype} on {parallel.device}, from step {trainer.step}",
    )
    if warning := sight_warning(config.model, config.model.context, unit(config)):
        console.print(warning, soft_wrap=True)
    peak = peak_flops(parallel.device, config.dtype)
    operations = cache(partial(flops_per_token, trainer.model))
    with StopRequest() as stop, ExitStack() as stack:
        told: list[Callable[[StepMetrics], None]] = []
        if tensorboard and parallel.is_main:
            told.append(stack.enter_context(logging_events(run.path / "tensorboard")))
        if profile:
            trace = run.path / f"trace-{trainer.step}.json"
            show = console.print if parallel.is_main else lambda table: None
            told.append(stack.enter_context(profiling(trace, parallel.device, show)))
        told.append(
            stack.enter_context(
                training_display(
                    console,
                    flops_per_token=lambda step: operations(config.context_at(step - 1)),
                    peak=peak and peak * parallel.ranks,
                    unit=bits_per,
                )
            ).show
        )
        done = trainer.train(
            on_step=lambda metrics: _tell(told, metrics), should_stop=lambda: stop.requested
        )
        metrics = run.read_metrics() if parallel.is_main else []
        if metrics:
            save_loss_curve(run.curves_path, metrics, bits_per)
    if trainer.best is not None:
        best = f"{trainer.best.bits_per_byte:.3f} bits/{bits_per} after step {trainer.best.step}"
        console.print(f"least on held-out {bits_per}s: {best}, kept")
    if done:
        console.print(f"done: {trainer.step} steps. Loss curve: {run.curves_path}", soft_wrap=True)
        return 0
    console.print(f"stopped after step {trainer.step}, saved.", soft_wrap=True)
    console.print(f"to go on: dilated {command} --resume --out {run.path}", soft_wrap=True)
    # On several ranks the signal may have come to another one.
    return stop.exit_code if stop.requested else 128 + signal.SIGTERM


def _tell(told: list[Callable[[StepMetrics], None]], metrics: StepMetrics) -> None:
    for each in told:
        each(metrics)


def _corpus(
    config: TrainConfig,
    tokenizer: Tokenizer,
    console: Console,
    digest: str | None = None,
    cache: Path | None = None,
) -> Corpus:
    with progress_bar() as show:
        corpus = corpus_of(
            config,
            digest=digest,
            tokenizer=tokenizer,
            cache=cache,
            on_progress=(lambda what, share: None) if console.quiet else show,
        )
    train, held_out = (
        file_size(side.nbytes) if config.tokenizer is None else f"{len(side):,} tokens"
        for side in (corpus.train, corpus.validation)
    )
    console.print(
        f"corpus: {train} in {len(corpus.train_files)} files to train on, "
        f"{held_out} in {len(corpus.validation_files)} held out",
        soft_wrap=True,
    )
    show_readings(console, corpus.readings)
    if config.tokenizer is not None:
        console.print(
            f"tokenizer: {tokenizer.vocab_size:,} tokens, of {corpus.bytes_per_token:.2f} bytes "
            "each in held-out files"
        )
    if not tokenizer.is_exact:
        console.print(f"warning: {INEXACT}", soft_wrap=True)
    lengths = corpus.ends.diff(prepend=corpus.ends.new_zeros(1))
    longer = int((lengths > config.model.context).sum())
    if longer and (config.text_field or config.documents == "separate"):
        console.print(
            f"{longer:,} of {len(lengths):,} documents are longer than the context: windows cut "
            "them",
            soft_wrap=True,
        )
    return corpus
