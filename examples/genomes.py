r"""From a FASTA file to bits per base, and to embeddings of intervals that tell what lies there.

    python examples/genomes.py

The genome is made up: at random, but for islands in which "CG" comes over and over. A model learns
it in a few steps; then each interval of a BED file is one vector, and the islands are told from
the rest by the direction from the mean of some to the mean of others. It needs
dilated-factory[genomes].
"""

import random
import tempfile
from pathlib import Path

from dilated_factory import (
    Genome,
    GenomeConfig,
    GenomeTrainer,
    LongNetConfig,
    TrainConfig,
    embed_intervals,
    evaluate_genome,
    load_genome,
    read_bed,
)

ISLAND, GAP, COUNT = 300, 700, 24  # bases, bases, islands


def write_genome(folder: Path) -> None:
    """A record, a BED file of its splits, and one of its islands and as many other intervals."""
    draw = random.Random(0)
    bases, rows = "", []
    for _ in range(COUNT):
        rows.append(f"chr1\t{len(bases)}\t{len(bases) + ISLAND}\tisland")
        bases += "".join(draw.choices(["CG", "A", "T"], [6, 1, 1], k=ISLAND))[:ISLAND]
        rows.append(f"chr1\t{len(bases)}\t{len(bases) + ISLAND}\tother")
        bases += "".join(draw.choices("ACGT", k=GAP))
    lines = [bases[place : place + 60] for place in range(0, len(bases), 60)]
    (folder / "genome.fa").write_text(">chr1\n" + "\n".join(lines) + "\n")
    cut = len(bases) * 3 // 4
    (folder / "splits.bed").write_text(f"chr1\t0\t{cut}\ttrain\nchr1\t{cut}\t{len(bases)}\tvalid\n")
    (folder / "regions.bed").write_text("\n".join(rows) + "\n")


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    write_genome(folder)
    shape = LongNetConfig(embed_dim=32, num_heads=2, num_layers=2, context=512, vocab_size=16)
    corpus = load_genome(
        GenomeConfig(
            fasta=str(folder / "genome.fa"),
            bed=str(folder / "splits.bed"),
            intervals="tiled",  # rows cut into windows of the context
            reverse_complement=0.5,  # the other strand, half of the time
        ),
        shape.context,
    )
    config = TrainConfig(model=shape, steps=30, batch_size=4, seed=1)
    trainer = GenomeTrainer.start(str(folder / "run"), config, corpus)
    before = evaluate_genome(trainer.model, corpus.held_out)
    trainer.train()
    after = evaluate_genome(trainer.model, corpus.held_out)
    bits = [score.bits_per_base for score in (before, after)]
    print(f"bits per held-out base: {bits[0]:.2f}, after training {bits[1]:.2f}")

    rows = read_bed(str(folder / "regions.bed"))
    embeddings = embed_intervals(trainer.model, Genome(str(folder / "genome.fa")), rows)
    print(f"{len(rows)} intervals of {ISLAND} bases: embeddings {tuple(embeddings.shape)}")
    # Even rows are islands. What is learned on the first half is tried on the second.
    known, asked = embeddings[:COUNT], embeddings[COUNT:]
    direction = known[::2].mean(0) - known[1::2].mean(0)
    middle = (known[::2].mean(0) + known[1::2].mean(0)) / 2
    island = (asked - middle) @ direction > 0
    right = (island[::2].sum() + (~island[1::2]).sum()).item()
    print(f"islands told from the rest: {right} of {len(asked)} right")
    assert right > 0.9 * len(asked)
