"""Genomes on a GPU: bits per base and embeddings are those of the CPU."""

import random
from pathlib import Path

import pytest
import torch

from dilated_factory import (
    Genome,
    GenomeConfig,
    LongNetConfig,
    LongNetLM,
    embed_intervals,
    evaluate_genome,
    load_genome,
)
from dilated_factory.genomes.intervals import Interval
from dilated_testing import relative_error

pytestmark = pytest.mark.gpu


def test_scores_and_embeddings_are_those_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyfaidx", reason="pyfaidx, of the extra genomes, is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "genome.fa"
    path.write_text(">chr1\n" + "".join(random.Random(0).choices("ACGTN", k=3001)) + "\n")
    torch.manual_seed(0)
    model = LongNetLM(LongNetConfig(embed_dim=64, num_layers=2, vocab_size=16, context=256)).eval()
    held_out = load_genome(GenomeConfig(fasta=str(path)), 256, validation_fraction=0.5).held_out
    rows = [Interval("chr1", start, start + 10 + start % 240) for start in range(0, 2700, 37)]
    score = evaluate_genome(model, held_out).bits_per_base
    expected = embed_intervals(model, Genome(path), rows)
    model.cuda()
    assert evaluate_genome(model, held_out).bits_per_base == pytest.approx(score, rel=1e-4)
    assert relative_error(embed_intervals(model, Genome(path), rows), expected) < 5e-3
