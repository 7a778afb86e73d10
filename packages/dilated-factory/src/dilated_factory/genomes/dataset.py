"""Windows of a genome as a torch Dataset of tokens and targets."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dilated_factory.errors import InputError
from dilated_factory.genomes.fasta import Genome
from dilated_factory.genomes.intervals import Interval
from dilated_factory.genomes.tokens import (
    PAD,
    SEP,
    UNKNOWN_BASES,
    Case,
    encode,
    reverse_complement,
)
from dilated_factory.models.head_loss import IGNORED
from dilated_factory.training.batches import step_seed

UnknownBases = Literal["ignore", "keep"]


class GenomeDataset(Dataset[tuple[Tensor, Tensor]]):
    r"""Windows of a genome: for each the tokens and what follows each of them.

    A window of ``max_length`` bases and [SEP] gives int64 (max_length,) and (max_length,); without
    [SEP] it is one less. Shorter windows are padded on the left by [PAD], which is no target (-100,
    what losses of torch and of `LongNetLM` leave out). It can be pickled and read by workers.

    Shapes: tokens of a window n.

    Args:
        genome: where the bases are.
        intervals: such as `GenomeWindows`.
        max_length: bases of the longest interval.
        case: "upper", or "keep" for tokens of lower case.
        unknown_bases: "ignore" turns N into [PAD] and leaves it out as a target, as Caduceus does;
            "keep" takes it as a base, as HyenaDNA does.
        sep: end each window with [SEP].
        reverse_complement: chance to take the other strand; which windows these are depends on
            ``seed``, the epoch and the index alone.
        seed: of that.

    Raises:
        InputError: a number is out of its range.
        CorpusError: on reading, an interval is not in the genome, or longer than ``max_length``.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("genome.fa").write_text(">chr1\n" + "ACGTN" * 40 + "\n")
        >>> genome = Genome("genome.fa")
        >>> _ = Path("rows.bed").write_text("chr1\t0\t12\nchr1\t100\t116\n")
        >>> tokens, targets = GenomeDataset(genome, read_bed("rows.bed"), 16)[1]
        >>> tokens.shape, targets.shape
        (torch.Size([16]), torch.Size([16]))
    """

    def __init__(
        self,
        genome: Genome,
        intervals: Sequence[Interval],
        max_length: int,
        *,
        case: Case = "upper",
        unknown_bases: UnknownBases = "ignore",
        sep: bool = True,
        reverse_complement: float = 0.0,
        seed: int = 0,
    ) -> None:
        if max_length < 2:
            raise InputError(f"max_length must be at least 2. Got {max_length}.")
        if not 0 <= reverse_complement <= 1:
            raise InputError(f"reverse_complement must be in [0, 1]. Got {reverse_complement}.")
        for name, value, known in (
            ("case", case, ("upper", "keep")),
            ("unknown_bases", unknown_bases, ("ignore", "keep")),
        ):
            if value not in known:
                raise InputError(f"{name} must be {known[0]!r} or {known[1]!r}. Got {value!r}.")
        self.genome, self.intervals, self.max_length = genome, intervals, max_length
        self.case, self.unknown_bases, self.sep = case, unknown_bases, sep
        self.reverse_complement, self.seed = reverse_complement, seed
        # In shared memory, so that workers that live over epochs see it.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose which windows are of the other strand, in all workers too."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.intervals)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens, targets = self.unpadded(index, int(self._epoch))
        room = self.max_length - 1 + self.sep - len(tokens)
        pad = torch.nn.functional.pad
        return pad(tokens, (room, 0), value=PAD), pad(targets, (room, 0), value=IGNORED)

    def unpadded(self, index: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets of a window in an epoch, int64 (n,), n <= max_length - 1 + sep."""
        interval = self.intervals[index]
        if interval.end - interval.start > self.max_length:
            raise InputError(
                f"intervals must have at most max_length={self.max_length} bases. Got {interval}."
            )
        sequence = self.genome.read(*interval[:3])
        if self.reverse_complement:
            chance = step_seed(self.seed, epoch, f"reverse complement {index}") / 2**63
            if chance < self.reverse_complement:
                sequence = reverse_complement(sequence)
        return tokens_and_targets(sequence, self.case, self.unknown_bases, self.sep)


def tokens_and_targets(
    sequence: str, case: Case, unknown_bases: UnknownBases, sep: bool
) -> tuple[Tensor, Tensor]:
    """What stands at each place of a sequence but the last, and what follows it."""
    found = encode(sequence, case)
    if sep:
        found = np.append(found, np.uint8(SEP))
    unknown = is_unknown(found) & (unknown_bases == "ignore")
    tokens = np.where(unknown, PAD, found).astype(np.int64)
    targets = np.where(unknown, IGNORED, tokens)
    return torch.from_numpy(tokens[:-1]), torch.from_numpy(targets[1:])


def is_unknown(tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which tokens are N, in upper or lower case."""
    upper, lower = UNKNOWN_BASES
    found: np.ndarray[Any, np.dtype[np.bool_]] = (tokens == upper) | (tokens == lower)
    return found


def left_aligned(parts: Sequence[tuple[Tensor, Tensor]], length: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, length) of windows that begin at the first place.

    A causal model gives at each of their tokens what it gives where the padding is on the left and
    masked: nothing looks at padding that comes later.
    """
    tokens = torch.full((len(parts), length), PAD)
    targets = torch.full((len(parts), length), IGNORED)
    for row, (inputs, wanted) in enumerate(parts):
        tokens[row, : len(inputs)] = inputs
        targets[row, : len(wanted)] = wanted
    return tokens, targets
