"""Embeddings of intervals: the mean of a model's states over their known bases."""

# Shapes: S intervals, B of a batch, N their bases, E embed_dim.

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dilated_factory.errors import InputError
from dilated_factory.genomes.dataset import UnknownBases, is_unknown
from dilated_factory.genomes.fasta import Genome
from dilated_factory.genomes.intervals import Interval
from dilated_factory.genomes.tokens import PAD, Case, encode
from dilated_factory.models.longnet import LongNetLM


@torch.inference_mode()
def embed_intervals(
    model: LongNetLM,
    genome: Genome,
    intervals: Sequence[Interval],
    *,
    case: Case = "upper",
    unknown_bases: UnknownBases = "ignore",
    batch_bases: int = 2**16,
    on_progress: Callable[[str, float], None] = lambda what, share: None,
) -> Tensor:
    r"""The mean over known bases of the states after the last norm: float32 (S, E) on the CPU.

    N is none of them. An interval gives what it gives alone, up to rounding, whatever is computed
    with it. A row is not a number where an interval is nothing but N.

    Shapes: width of the model E, intervals S.

    Args:
        model: of the tokens of a genome, such as a trained one.
        genome: where the bases are.
        intervals: of at most the model's context.
        case: what the model was trained with; see `GenomeDataset`.
        unknown_bases: as ``case``.
        batch_bases: with padding, computed together; a longer interval is computed alone.
        on_progress: is told what is done, and which share of all.

    Raises:
        InputError: an interval is longer than the context.
        CorpusError: an interval is not in the genome.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("genome.fa").write_text(">chr1\n" + "ACGTN" * 40 + "\n")
        >>> shape = LongNetConfig(
        ...     embed_dim=16, num_heads=2, num_layers=1, context=16, vocab_size=16
        ... )
        >>> _ = Path("rows.bed").write_text("chr1\t0\t12\nchr1\t100\t116\n")
        >>> embed_intervals(LongNetLM(shape), Genome("genome.fa"), read_bed("rows.bed")).shape
        torch.Size([2, 16])
    """
    context = model.config.context
    for row in intervals:
        if row.end - row.start > context:
            line = f"line {row.line}, " if row.line else ""
            raise InputError(
                f"intervals must have at most the model's context of {context} bases. "
                f"Got {line}{row}."
            )
    device, training = model.head.weight.device, model.training
    model.eval()
    found = torch.full((len(intervals), model.config.embed_dim), torch.nan)
    done = 0
    for indices in _batches([row.end - row.start for row in intervals], batch_bases):
        on_progress("embedding", done / len(intervals))
        length = intervals[indices[-1]].end - intervals[indices[-1]].start
        # Padding is behind, where a causal model does not see it.
        tokens = torch.full((len(indices), length), PAD)
        known = torch.zeros((len(indices), length), dtype=torch.bool)
        for place, index in enumerate(indices):
            codes = encode(genome.read(*intervals[index][:3]), case)
            unknown = torch.from_numpy(is_unknown(codes))
            bases = torch.from_numpy(codes).to(torch.int64)
            if unknown_bases == "ignore":
                bases = bases.masked_fill(unknown, PAD)
            tokens[place, : len(bases)], known[place, : len(bases)] = bases, ~unknown
        states, mask = model.hidden_states(tokens.to(device)), known.to(device).unsqueeze(-1)
        means = states.float().masked_fill(~mask, 0).sum(1) / mask.sum(1)
        found[indices] = means.cpu()
        done += len(indices)
    model.train(training)
    return found


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices by rising length; of each batch the last is the longest."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
