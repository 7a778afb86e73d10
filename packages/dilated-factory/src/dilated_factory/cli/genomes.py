"""`dilated genomes`: train on FASTA files, score bits per base, embed intervals."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from dilated_factory.cli.app import Command, Group
from dilated_factory.cli.display import progress_bar
from dilated_factory.cli.fields import given_fields, with_fields
from dilated_factory.cli.options import Best, CheckpointEvery, Compiling, Device, Json, Resume
from dilated_factory.cli.output import plain_console, silent_console
from dilated_factory.cli.train import run_training, settings
from dilated_factory.configs.base import parse_config
from dilated_factory.configs.genomes import GenomeConfig
from dilated_factory.configs.models import READING, LongNetConfig, TrainConfig
from dilated_factory.errors import InputError, RunError
from dilated_factory.genomes.embedding import embed_intervals
from dilated_factory.genomes.fasta import Genome
from dilated_factory.genomes.intervals import read_bed, require_inside
from dilated_factory.genomes.tokens import vocab_size
from dilated_factory.genomes.training import (
    GenomeCorpus,
    GenomeTrainer,
    evaluate_genome,
    genome_of,
    genome_windows,
    load_genome,
)
from dilated_factory.training.atomic import require_file_name
from dilated_factory.training.compiling import decide_compile
from dilated_factory.training.embedding_files import check_out, write_embeddings
from dilated_factory.training.loop import select_device
from dilated_factory.training.parallel import join, leave, was_restarted
from dilated_factory.training.run_folder import RunFolder
from dilated_factory.training.sources import child_of
from dilated_factory.training.trained import load_trained

EXIT_SOME_FAILED = 1

genomes = typer.Typer(
    name="genomes",
    cls=Group,
    help="""Train on genomes in FASTA files, score bits per base, embed intervals.

    A base is a token, by the vocabulary of HyenaDNA and Caduceus. Files are plain, or compressed by
    gzip or bgzip.

    Examples:
        dilated genomes train hg38.fa --bed splits.bed --out runs/hg38
        dilated genomes evaluate runs/hg38 --split test
        dilated genomes embed hg38.fa --bed a.bed --checkpoint runs/hg38 --out e.h5
    """,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)

Fasta = Annotated[Path, typer.Argument(help="A FASTA file.", show_default=False)]


@genomes.command(cls=Command)
@with_fields(
    GenomeConfig,
    TrainConfig,
    LongNetConfig,
    but=(
        *("kind", "model", "paths", "parent", "fasta", "documents", "vocab_size", "tokenizer"),
        *(set(READING) - {"validation_fraction"}),
    ),
)
def train(
    fasta: Annotated[
        Path | None, typer.Argument(help="A FASTA file; none with --resume.", show_default=False)
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Run folder; must be new, except with --resume.")
    ] = Path("runs/genome"),
    resume: Resume = False,
    parent: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Begin with the weights and the settings of another run on a genome.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    compiling: Compiling = "auto",
    checkpoint_every: CheckpointEvery = 100,
    **fields: Any,
) -> int:
    r"""Train a LongNet language model on the bases of a FASTA file.

    A step sees windows of --context bases. With --bed they lie in the rows whose fourth column is
    "train", and --validate-every looks at "valid"; without it the end of each record is held out.
    N is no target, and lower case is what upper case is, unless told otherwise. Losses are bits per
    base. SIGHUP, Ctrl-C or SIGTERM saves; under `torchrun` the processes share the batch.

    Examples:
        dilated genomes train genome.fa.gz --minutes 5
        dilated genomes train hg38.fa --bed splits.bed --reverse-complement 0.5 \
            --context 32768 --validate-every 100 --out runs/hg38
        dilated genomes train --out runs/hg38 --resume
    """
    parallel = join(select_device(device))
    console = plain_console() if parallel.is_main else silent_console()
    told, shape = given_fields(GenomeConfig, fields), given_fields(LongNetConfig, fields)
    given = given_fields(TrainConfig, fields)
    options: dict[str, Any] = {
        "parallel": parallel,
        "checkpoint_every": checkpoint_every,
        "compiled": decide_compile(compiling, parallel, console.print),
    }
    if resume or (was_restarted() and (out / "config.json").exists()):
        if resume and (fasta or parent or told):
            raise InputError(
                "--resume takes its settings from --out: no FASTA file, no --from, no --bed."
            )
        run = RunFolder.open(out)
        run.require_same(shape | {k: v for k, v in given.items() if v != "auto"})
        trainer = GenomeTrainer(run, _loaded(genome_of(run), run.config), **options)
        trainer.restore()
    else:
        if fasta is None:
            raise InputError("a FASTA file is required, unless with --resume.")
        RunFolder.require_new(out)
        base = genome_of(RunFolder.open(parent)).model_dump() if parent else {}
        place = {"fasta": str(fasta.resolve())}
        place |= {"bed": str(Path(told["bed"]).resolve())} if "bed" in told else {}
        genome = parse_config(GenomeConfig, base | told | place)
        shape["vocab_size"] = vocab_size(genome.case)
        config = settings(child_of(parent) if parent else {}, given, shape, parallel.device)
        corpus = _loaded(genome, config)
        for line in _summary(corpus, config.model.context):
            console.print(line, soft_wrap=True)
        trainer = GenomeTrainer.start(out, config, corpus, **options)
    code = run_training(trainer, console, command="genomes train", bits_per="base")
    if code == 0:
        console.print(f"next: dilated genomes evaluate {trainer.run.path}", soft_wrap=True)
    leave()
    return code


def _summary(corpus: GenomeCorpus, context: int) -> Iterator[str]:
    """How much there is to read, and whether the beginnings of rows are all that is read."""
    lengths, told = corpus.windows.genome.lengths, corpus.config
    yield (
        f"{sum(lengths.values()):,} bases in {len(lengths)} records; {len(corpus.windows):,} "
        f"windows to train on, {len(corpus.held_out):,} held out"
    )
    if told.bed is None or told.placement != "hyenadna":
        return
    rows = read_bed(told.bed, told.train_split)
    if longer := sum(row.end - row.start > context for row in rows):
        yield (
            f"{longer:,} rows are longer than the context, and only their beginnings are read: "
            "--intervals tiled cuts all of them into windows"
        )


def _loaded(genome: GenomeConfig, config: TrainConfig) -> GenomeCorpus:
    return load_genome(
        genome,
        config.model.context,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
    )


@genomes.command(cls=Command)
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder of `dilated genomes train`.")],
    fasta: Annotated[
        Path | None, typer.Option(help="Another FASTA file; needs --bed.", show_default=False)
    ] = None,
    bed: Annotated[Path | None, typer.Option(help="Another BED file.", show_default=False)] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Rows with this fourth column; default: what is held out, or all rows "
            "of another file.",
            show_default=False,
        ),
    ] = None,
    max_bases: Annotated[int, typer.Option(min=1, help="About how many to score.")] = 2**20,
    as_json: Json = False,
    best: Best = False,
    device: Device = "auto",
) -> int:
    """Score a trained model: mean bits per base of windows as in training.

    Each base is predicted from those before it in its window. N, padding and [SEP] are not scored;
    four bases of which nothing is known take 2 bits.

    Examples:
        dilated genomes evaluate runs/hg38 --split test
        dilated genomes evaluate runs/hg38 --fasta mm10.fa --bed mouse.bed --json
    """
    trained = load_trained(run, device=select_device(device), best=best)
    genome, config = genome_of(trained.run), trained.run.config
    source = bed or (None if genome.bed is None else Path(genome.bed))
    if source is None or (fasta and not bed):
        if split or fasta:
            raise InputError("--split and --fasta need a BED file: give --bed.")
        data = _loaded(genome, config).held_out
    else:
        rows = read_bed(source, split or (None if bed else genome.validation_split))
        conventions = genome.model_copy(update={"bed": str(source), "reverse_complement": 0.0})
        file = Genome(fasta or genome.fasta)
        data = genome_windows(conventions, file, rows, config.model.context)
    with progress_bar() as show:
        score = evaluate_genome(trained.model, data, max_bases=max_bases, on_progress=show)
    if as_json:
        record = {"run": str(trained.run.path), "step": trained.state.step, **vars(score)}
        print(json.dumps(record))
        return 0
    plain_console().print(
        f"{score.bits_per_base:.4f} bits per base, over {score.scored_bases:,} bases in "
        f"{score.windows:,} windows",
        soft_wrap=True,
    )
    return 0


@genomes.command(cls=Command)
def embed(
    fasta: Fasta,
    bed: Annotated[Path, typer.Option(help="Intervals: record, start, end between tabs.")],
    checkpoint: Annotated[Path, typer.Option(help="Run folder of `dilated genomes train`.")],
    out: Annotated[Path, typer.Option(help="Embeddings: .h5, or .npz without h5py.")],
    split: Annotated[
        str | None, typer.Option(help="Rows with this fourth column.", show_default=False)
    ] = None,
    batch_bases: Annotated[
        int, typer.Option(min=1, help="Of intervals that are computed together.")
    ] = 2**16,
    best: Best = False,
    device: Device = "auto",
) -> int:
    """Embed intervals: of each the mean of the model's last states over its bases; N is none.

    The file holds "embeddings" (intervals, width), float32, and "names" such as chr1:100-200, in
    the order of the BED file. An interval of nothing but N is told and left out; the exit code is
    then 1.

    Example:
        dilated genomes embed hg38.fa --bed a.bed --checkpoint runs/hg38 --out a.npz
    """
    check_out(out)
    require_file_name(out)
    trained = load_trained(checkpoint, device=select_device(device), best=best)
    told, file, rows = genome_of(trained.run), Genome(fasta), read_bed(bed, split)
    require_inside(rows, file.lengths, str(bed))
    conventions: dict[str, Any] = {"case": told.case, "unknown_bases": told.unknown_bases}
    with progress_bar() as show:
        found = embed_intervals(
            *(trained.model, file, rows), **conventions, batch_bases=batch_bases, on_progress=show
        )
    good = ~found.isnan().all(1)
    if not good.any():
        raise InputError(f"the intervals of {str(bed)!r} must hold bases. All are nothing but N.")
    if not found[good].isfinite().all():
        raise RunError("the model's states are not finite: its weights are too large.")
    names = [str(row) for row, is_good in zip(rows, good.tolist(), strict=True) if is_good]
    model = trained.run.config.model.model_dump(mode="json")
    settings = {"step": trained.state.step, "model": model, **conventions}
    write_embeddings(out, names, found[good].numpy(), settings)
    console = plain_console()
    for row, is_good in zip(rows, good.tolist(), strict=True):
        if not is_good:
            console.print(f"left out: line {row.line}, {row}: nothing but N", soft_wrap=True)
    console.print(f"{len(names)} of {len(rows)} intervals: {out}", soft_wrap=True)
    return 0 if len(names) == len(rows) else EXIT_SOME_FAILED
