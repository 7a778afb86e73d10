"""Training on a genome by the trainer of language models, and bits per base."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dilated_factory.configs.base import parse_config
from dilated_factory.configs.files import read_regular, read_values
from dilated_factory.configs.genomes import GenomeConfig
from dilated_factory.configs.models import TrainConfig
from dilated_factory.errors import CorpusError, InputError, RunError
from dilated_factory.genomes.dataset import GenomeDataset, left_aligned
from dilated_factory.genomes.fasta import Genome
from dilated_factory.genomes.intervals import GenomeWindows, Interval, read_bed
from dilated_factory.genomes.tokens import SEP, UNKNOWN_BASES, vocab_size
from dilated_factory.models.head_loss import IGNORED
from dilated_factory.models.longnet import LongNetLM
from dilated_factory.training.batches import step_seed
from dilated_factory.training.checkpoints import require_checksum, write_checked
from dilated_factory.training.corpus import Corpus
from dilated_factory.training.loop import Drawn, Trainer
from dilated_factory.training.parallel import Share
from dilated_factory.training.precision import autocast
from dilated_factory.training.run_folder import GENOME, RunFolder
from dilated_factory.training.weights import require_heir


@dataclass(frozen=True, kw_only=True)
class GenomeCorpus(Corpus):
    """Windows of a genome to train on, and others that are held out.

    ``train`` and ``validation`` are as long as all windows together and hold nothing.

    Attributes:
        windows: to train on.
        held_out: to validate on; never of the other strand.
        config: what decided both.
    """

    windows: GenomeDataset
    held_out: GenomeDataset
    config: GenomeConfig


def load_genome(
    config: GenomeConfig, context: int, *, validation_fraction: float = 0.05, seed: int = 0
) -> GenomeCorpus:
    r"""The windows of a genome, of ``context`` bases each, to train on and held out.

    Args:
        config: which file, which parts, which tokens.
        context: in bases.
        validation_fraction: of each record, held out at its end where there is no BED file.
        seed: of which windows are of the other strand.

    Raises:
        CorpusError: a file is not what it has to be, or nothing is left for one of both.
        InputError: the intervals do not fit the context.
        MissingPackageError: pyfaidx is not installed.
        OSError: a file cannot be read.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("genome.fa").write_text(">chr1\n" + "ACGTN" * 40 + "\n")
        >>> corpus = load_genome(GenomeConfig(fasta="genome.fa"), 16)
        >>> tokens, targets = corpus.windows[0]
        >>> tokens.shape
        torch.Size([16])
    """
    sides = [_rows(config, validation_fraction, held_out=side) for side in (False, True)]
    train, held_out = (
        genome_windows(config, Genome(config.fasta), rows, context, seed=seed) for rows in sides
    )
    held_out.reverse_complement = 0.0
    digest = hashlib.sha256()
    with Path(config.fasta).open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    conventions = config.model_dump(mode="json", exclude={"fasta", "bed"})
    places = [[list(row[:3]) for row in rows] for rows in sides]
    digest.update(json.dumps([conventions, context, seed, places]).encode())
    size, nothing = context + 1, torch.zeros(1, dtype=torch.uint8)
    return GenomeCorpus(
        nothing.expand(len(train) * size),
        nothing.expand(len(held_out) * size),
        (config.fasta,),
        (config.fasta,),
        0,
        digest.hexdigest(),
        windows=train,
        held_out=held_out,
        config=config,
    )


def _rows(config: GenomeConfig, fraction: float, *, held_out: bool) -> list[Interval]:
    if config.bed is None:
        return _parts(Genome(config.fasta), fraction, held_out=held_out)
    return read_bed(config.bed, config.validation_split if held_out else config.train_split)


def genome_windows(
    config: GenomeConfig,
    genome: Genome,
    rows: Sequence[Interval],
    context: int,
    *,
    seed: int = 0,
) -> GenomeDataset:
    """Windows of ``context`` bases in rows, by the conventions of a configuration."""
    windows = GenomeWindows(
        rows,
        context,
        genome.lengths,
        config.placement,
        window=config.window,
        source=config.bed or config.fasta,
    )
    return GenomeDataset(
        genome,
        windows,
        context,
        case=config.case,
        unknown_bases=config.unknown_bases,
        sep=config.sep,
        reverse_complement=config.reverse_complement,
        seed=seed,
    )


def _parts(genome: Genome, fraction: float, *, held_out: bool) -> list[Interval]:
    """The beginning of each record, or its end, which is held out."""
    parts = []
    for name, length in genome.lengths.items():
        cut = length - max(1, round(length * fraction))
        part = Interval(name, cut, length) if held_out else Interval(name, 0, cut)
        if part.end - part.start > 1:
            parts.append(part)
    if not parts:
        raise CorpusError(
            f"a genome must have records of which two bases are left to train on and two to "
            f"validate on. Got at most {max(genome.lengths.values(), default=0)} bases in a record."
        )
    return parts


class GenomeTrainer(Trainer):
    r"""A `Trainer` of which a step sees windows of a genome; N and padding are no targets.

    Its loss is per target, so its bits "per byte" are bits per base; [SEP] is a target in training,
    and none of those that are held out.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("genome.fa").write_text(">chr1\n" + "ACGTN" * 40 + "\n")
        >>> shape = LongNetConfig(
        ...     embed_dim=16, num_heads=2, num_layers=1, context=16, vocab_size=16
        ... )
        >>> corpus = load_genome(GenomeConfig(fasta="genome.fa"), 16)
        >>> config = TrainConfig(model=shape, steps=2, batch_size=2)
        >>> trainer = GenomeTrainer.start("run", config, corpus)
        >>> trainer.train()  # to its end
        True
        >>> trainer.step
        2
    """

    corpus: GenomeCorpus

    @classmethod
    def start(cls, path: str | Path, config: TrainConfig, corpus: Corpus, **options: Any) -> Self:
        """As `Trainer.start`, with a `GenomeCorpus`, whose conventions go into the run folder.

        Raises:
            InputError: the vocabulary is too small, or as of `Trainer.start`.
        """
        assert isinstance(corpus, GenomeCorpus)
        config = config.model_copy(update={"paths": (corpus.config.fasta,)})
        return super().start(path, config, corpus, **options)

    @staticmethod
    def _complete(run: RunFolder, corpus: Corpus) -> None:
        assert isinstance(corpus, GenomeCorpus)
        content = corpus.config.model_dump_json(indent=2) + "\n"
        write_checked(run.path / GENOME, content.encode())

    @staticmethod
    def _require_tokens(config: TrainConfig, corpus: Corpus) -> None:
        assert isinstance(corpus, GenomeCorpus)
        needed = vocab_size(corpus.config.case)
        if config.model.vocab_size < needed:
            raise InputError(
                f"vocab_size must be at least {needed}. Got {config.model.vocab_size}."
            )
        if config.parent is not None:
            genome_of(RunFolder.open(config.parent.run))
            require_heir(config, config.parent)

    def _draw(self, step: int) -> Drawn:
        config, windows = self.run.config, self.corpus.windows
        generator = torch.Generator().manual_seed(step_seed(config.seed, step, "batch"))
        drawn = torch.randint(len(windows), (config.batch_size,), generator=generator)
        parts = [windows.unpadded(index, step) for index in drawn.tolist()]
        context, rows = config.context_at(step), config.micro_batch_size
        # Short sequences are pieces of the windows, whose places conventions decide.
        tokens, targets = (
            x.reshape(-1, context) for x in left_aligned(parts, config.model.context)
        )
        pieces = config.model.context // context
        shares = self._shares_of(tokens, targets, rows and rows * pieces)
        return Drawn(shares, bytes_read=targets.numel(), tokens_per_byte=1.0)

    def _shares_of(self, tokens: Tensor, targets: Tensor, rows: int | None) -> list[Share]:
        """This rank's part of tokens and targets (B, N); micro-batches weigh by their targets."""
        beside = tokens.new_zeros(len(tokens), 1)
        inputs = self.parallel.shares(torch.cat([tokens, beside], 1), rows)
        aims = self.parallel.shares(torch.cat([beside, targets], 1), rows)
        real = (targets != IGNORED).sum(1).reshape(self.parallel.data_ranks, len(inputs), -1)
        counts = real.sum((0, 2)).tolist()
        return [
            share._replace(targets=aim.targets, divisor=max(1, sum(counts)) / max(1, count))
            for share, aim, count in zip(inputs, aims, counts, strict=True)
        ]

    @torch.no_grad()
    def validate(self) -> float:
        """Mean bits of held-out bases, in windows spread evenly; a collective call."""
        config, ranks = self.run.config, self.parallel.data_ranks
        rows = (config.micro_batch_size or config.batch_size // ranks) * ranks
        indices = _spread(self.corpus.held_out, config.validation_bytes, rows)
        total, count = torch.zeros((), device=self.parallel.device), 0
        was_training = self.model.training
        self.model.eval()
        for part in indices.split(rows):
            tokens, targets = _scored(self.corpus.held_out, part)
            here = int((targets != IGNORED).sum())
            for share in self._shares_of(tokens, targets, None):
                with autocast(self.parallel.device, config.dtype):
                    total += self._loss(*share.to(self.parallel.device)) * here
            count += here
        self.model.train(was_training)
        (nats,) = self.parallel.mean([total.item() / max(1, count)])
        return nats / math.log(2)


def _spread(data: GenomeDataset, max_bases: int, multiple: int) -> Tensor:
    """Indices of windows, spread evenly, that hold about so many bases."""
    wanted = max(1, min(max_bases // data.max_length, len(data)))
    count = -(-wanted // multiple) * multiple
    return torch.linspace(0, len(data) - 1, count, dtype=torch.float64).round().to(torch.int64)


def _scored(data: GenomeDataset, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and targets of windows; only bases that are known are targets."""
    parts = [data.unpadded(index, 0) for index in indices.tolist()]
    tokens, targets = left_aligned(parts, data.max_length)
    no_base = torch.isin(targets, torch.tensor([SEP, *UNKNOWN_BASES]))
    return tokens, targets.masked_fill(no_base, IGNORED)


@dataclass(frozen=True)
class GenomeScore:
    """Mean bits per base over ``scored_bases`` bases in ``windows`` windows."""

    bits_per_base: float
    scored_bases: int
    windows: int


@torch.no_grad()
def evaluate_genome(
    model: LongNetLM,
    data: GenomeDataset,
    *,
    max_bases: int = 2**20,
    batch_bases: int = 2**14,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> GenomeScore:
    r"""Mean bits per base of windows spread evenly; N, padding and [SEP] are not scored.

    Each base is predicted from those before it in its window; four equal bases would take 2 bits.

    Args:
        model: what predicts.
        data: windows.
        max_bases: about how many to score.
        batch_bases: in windows that are computed together.
        on_progress: is told what is done, and which share of all.

    Raises:
        CorpusError: there is nothing but N.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("genome.fa").write_text(">chr1\n" + "ACGTN" * 40 + "\n")
        >>> shape = LongNetConfig(
        ...     embed_dim=16, num_heads=2, num_layers=1, context=16, vocab_size=16
        ... )
        >>> corpus = load_genome(GenomeConfig(fasta="genome.fa"), 16)
        >>> evaluate_genome(LongNetLM(shape), corpus.held_out).scored_bases > 0
        True
    """
    indices = _spread(data, max_bases, 1).unique()
    device, training = model.head.weight.device, model.training
    model.eval()
    nats, count = 0.0, 0
    parts = indices.split(max(1, batch_bases // data.max_length))
    for done, part in enumerate(parts):
        on_progress("scoring", done / len(parts))
        tokens, targets = _scored(data, part)
        here = int((targets != IGNORED).sum())
        nats += here * model.loss(tokens.to(device), targets.to(device)).item()
        count += here
    model.train(training)
    if not count:
        raise CorpusError("the windows must hold bases to score. Got nothing but N.")
    return GenomeScore(nats / math.log(2) / count, count, len(indices))


def genome_of(run: RunFolder) -> GenomeConfig:
    """What the genome of a run was to its model.

    Raises:
        RunError: the run is not of a genome, or the file that says so is damaged.
    """
    file = run.path / GENOME
    if not file.exists():
        raise RunError(f"run {str(run.path)!r} is not of a genome: it has no {GENOME}.")
    try:
        genome = parse_config(GenomeConfig, read_values(file))
    except InputError as error:
        raise RunError(f"{str(file)!r} is damaged: {error}") from None
    require_checksum(file, read_regular(file))
    return genome
