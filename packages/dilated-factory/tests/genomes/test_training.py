"""Training on a genome, bits per base, embeddings of intervals: the commands and their parts."""

import json
import math
import random
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dilated_factory import LongNetConfig, LongNetLM, RunError, TrainConfig
from dilated_factory.cli import main
from dilated_factory.configs.genomes import GenomeConfig
from dilated_factory.errors import CorpusError, InputError
from dilated_factory.genomes.dataset import left_aligned
from dilated_factory.genomes.embedding import embed_intervals
from dilated_factory.genomes.fasta import Genome
from dilated_factory.genomes.intervals import Interval
from dilated_factory.genomes.training import (
    GenomeTrainer,
    evaluate_genome,
    genome_of,
    load_genome,
)
from dilated_factory.models.head_loss import IGNORED
from dilated_factory.training.embedding_files import read_embeddings
from dilated_factory.training.run_folder import RunFolder
from dilated_factory.training.trained import load_trained

README = Path(__file__).parents[2] / "README.md"
SHAPE = {"embed_dim": 16, "num_heads": 2, "num_layers": 2, "context": 32, "vocab_size": 16}
OPTIONS = [
    *("--embed-dim", "16", "--num-heads", "2", "--num-layers", "2", "--context", "32"),
    *("--device", "cpu", "--batch-size", "2", "--validation-bytes", "512"),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    """Two records; of the first the last 100 bases are N."""
    chance = random.Random(0)
    path = tmp_path / "genome.fa"
    with path.open("w") as file:
        for name, length, unknown in (("chr1", 900, 100), ("chr2", 400, 0)):
            sequence = "".join(chance.choices("ACGTacgt", k=length - unknown)) + "N" * unknown
            file.write(f">{name}\n")
            file.writelines(f"{sequence[i : i + 50]}\n" for i in range(0, length, 50))
    return path


@pytest.fixture
def bed(tmp_path: Path) -> Path:
    path = tmp_path / "splits.bed"
    path.write_text(
        "chr1\t0\t30\ttrain\nchr1\t100\t140\ttrain\nchr1\t780\t830\ttrain\n"
        "chr2\t0\t20\tvalid\nchr2\t50\t90\tvalid\nchr2\t200\t240\ttest\n"
    )
    return path


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(model=LongNetConfig(**SHAPE), **{"steps": 3, "batch_size": 4, **changes})


def test_a_step_is_the_mean_over_all_real_targets_whatever_the_micro_batch(
    fasta: Path, bed: Path, tmp_path: Path
) -> None:
    corpus = load_genome(GenomeConfig(fasta=str(fasta), bed=str(bed)), 32)
    told = []
    for size in (4, 2, 1):
        trainer = GenomeTrainer.start(
            tmp_path / f"run{size}", config(micro_batch_size=size), corpus
        )
        if size == 4:
            (share,) = trainer._draw(0).shares
            assert (share.targets == IGNORED).any()  # windows over N and over an end are drawn
            logits = trainer.model(share.tokens)
            expected = F.cross_entropy(
                logits.flatten(0, 1), share.targets.flatten(), ignore_index=IGNORED
            ).item()
        trainer.train(on_step=lambda metrics: told.append(metrics.loss))
    assert told[0] == pytest.approx(expected, rel=1e-6)
    assert told[:3] == pytest.approx(told[3:6], rel=1e-5)
    assert told[:3] == pytest.approx(told[6:], rel=1e-5)


def test_short_sequences_are_pieces_of_windows(fasta: Path, bed: Path, tmp_path: Path) -> None:
    corpus = load_genome(GenomeConfig(fasta=str(fasta), bed=str(bed)), 32)
    short = {"short_context": 8, "short_share": 0.7}
    (whole,) = GenomeTrainer.start(tmp_path / "whole", config(), corpus)._draw(0).shares
    losses = []
    for size in (4, 1):
        settings = config(micro_batch_size=size, **short)
        trainer = GenomeTrainer.start(tmp_path / f"run{size}", settings, corpus)
        assert [trainer._draw(step).shares[0].tokens.shape for step in range(3)] == [
            (4 * size, 8), (4 * size, 8), (size, 32)
        ]  # fmt: skip
        share = trainer._draw(0).shares[0]
        assert torch.equal(share.tokens, whole.tokens[:size].reshape(-1, 8))
        assert torch.equal(share.targets, whole.targets[:size].reshape(-1, 8))
        trainer.train(on_step=lambda metrics: losses.append(metrics.loss))
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)


def test_padding_on_the_left_and_masked_gives_the_loss_of_training(fasta: Path, bed: Path) -> None:
    corpus = load_genome(GenomeConfig(fasta=str(fasta), bed=str(bed)), 32)
    torch.manual_seed(0)
    model = LongNetLM(LongNetConfig(**SHAPE)).double().eval()
    padded = [corpus.held_out[i] for i in range(2)]
    tokens, targets = (torch.stack(part) for part in zip(*padded, strict=True))
    assert (tokens[0, :6] == 4).all()  # 6 bases are missing on the left of chr2:0-20
    padding = torch.zeros_like(tokens, dtype=torch.bool)
    padding[0, :6] = True
    masked = model.loss(tokens, targets, key_padding_mask=padding)
    aligned = model.loss(*left_aligned([corpus.held_out.unpadded(i, 0) for i in range(2)], 32))
    assert aligned.item() == pytest.approx(masked.item(), rel=1e-12)


def test_bits_per_base_are_those_of_bases_alone(fasta: Path) -> None:
    genome = GenomeConfig(fasta=str(fasta))
    corpus = load_genome(genome, 32, validation_fraction=0.25)
    torch.manual_seed(0)
    model = LongNetLM(LongNetConfig(**SHAPE)).eval()
    score = evaluate_genome(model, corpus.held_out)
    nats, count = 0.0, 0
    for index in range(len(corpus.held_out)):
        tokens, targets = corpus.held_out.unpadded(index, 0)
        keep = (targets >= 7) & (targets <= 10)
        with torch.no_grad():
            logits = model(tokens[None])[0]
        nats += F.cross_entropy(logits[keep], targets[keep], reduction="sum").item()
        count += int(keep.sum())
    # 225 held-out bases of chr1, 100 of them N, and 100 of chr2; the first of a window is given.
    assert count == score.scored_bases == 125 + 100 - 4 - 4
    assert score.bits_per_base == pytest.approx(nats / count / math.log(2), rel=1e-6)
    # N is not scored where it is a base to the model, either.
    kept = load_genome(
        genome.model_copy(update={"unknown_bases": "keep"}), 32, validation_fraction=0.25
    )
    assert evaluate_genome(model, kept.held_out).scored_bases == count


def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_happened(
    fasta: Path, bed: Path, tmp_path: Path
) -> None:
    genome = GenomeConfig(fasta=str(fasta), bed=str(bed), reverse_complement=0.5)
    corpus = load_genome(genome, 32, seed=5)
    settings = config(steps=4, seed=5, validate_every=2)
    whole = GenomeTrainer.start(tmp_path / "whole", settings, corpus)
    whole.train()
    first = GenomeTrainer.start(tmp_path / "stopped", settings, corpus)
    assert not first.train(should_stop=lambda: first.step >= 2)
    run = RunFolder.open(tmp_path / "stopped")
    assert genome_of(run) == genome
    second = GenomeTrainer(run, load_genome(genome_of(run), 32, seed=5))
    second.restore()
    assert second.train()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor)
    last = run.read_metrics()[-1]
    score = evaluate_genome(second.model, corpus.held_out)
    assert last["validation_bits_per_byte"] == pytest.approx(score.bits_per_base, rel=0.05)


def test_another_seed_draws_other_windows(fasta: Path, tmp_path: Path) -> None:
    corpus = load_genome(GenomeConfig(fasta=str(fasta)), 32)
    drawn = [
        GenomeTrainer.start(tmp_path / f"run{seed}", config(seed=seed), corpus)
        ._draw(0)
        .shares[0]
        .tokens
        for seed in (0, 1)
    ]
    assert not torch.equal(*drawn)


@pytest.mark.distributed
@pytest.mark.xdist_group("factory_distributed")
def test_two_processes_train_like_one_where_their_windows_have_different_targets(
    fasta: Path, bed: Path, tmp_path: Path
) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    train = ["genomes", "train", str(fasta), "--bed", str(bed), "--steps", "2", *OPTIONS]
    train += ["--batch-size", "8", "--micro-batch-size", "2", "--validate-every", "1"]
    train += ["--short-context", "8", "--short-share", "0.5"]
    two = [*torchrun, "2", "-m", "dilated_factory", *train, "--out", str(tmp_path / "two")]
    subprocess.run(two, check=True, capture_output=True, timeout=250)
    assert main([*train, "--out", str(tmp_path / "one")]) == 0
    found, expected = (RunFolder.open(tmp_path / name).read_metrics() for name in ("two", "one"))
    for name in ("loss", "validation_bits_per_byte"):
        there = [record[name] for record in found]
        assert there == pytest.approx([record[name] for record in expected], rel=1e-5)


def test_a_changed_base_or_convention_is_another_corpus(fasta: Path, bed: Path) -> None:
    def digest(**changes: Any) -> str:
        return load_genome(GenomeConfig(fasta=str(fasta), bed=str(bed), **changes), 32).digest

    before = digest()
    assert digest(case="keep") != before
    assert digest(reverse_complement=0.5) != before
    text = fasta.read_text()
    fasta.write_text(text[:-2] + "A\n" if text[-2] != "A" else text[:-2] + "C\n")
    assert digest() != before


def test_an_embedding_is_the_mean_over_known_bases_in_any_batch(fasta: Path) -> None:
    torch.manual_seed(0)
    model = LongNetLM(LongNetConfig(**SHAPE)).double().eval()
    genome = Genome(fasta)
    chance = random.Random(1)
    rows = []
    for _ in range(20):
        start = chance.randrange(0, 790)
        rows.append(Interval("chr1", start, start + chance.randrange(1, 33)))
    rows += [Interval("chr1", 785, 815), Interval("chr1", 820, 830)]  # half N; nothing but N
    found = embed_intervals(model, genome, rows, batch_bases=100)
    for row, embedding in zip(rows[:-1], found, strict=False):
        known = [base for base in genome.read(*row[:3]).upper() if base != "N"]
        tokens = torch.tensor([["ACGT".index(base) + 7 for base in known]])
        with torch.no_grad():  # what is behind the last known base changes nothing
            expected = model.hidden_states(tokens)[0].mean(0)
        torch.testing.assert_close(embedding.double(), expected, rtol=1e-6, atol=1e-6)
    assert found[-1].isnan().all()
    with pytest.raises(InputError, match=r"context of 32 bases. Got line 3, chr1:0-33"):
        embed_intervals(model, genome, [Interval("chr1", 0, 33, line=3)])


def test_from_a_fasta_file_to_embeddings_by_three_commands(
    fasta: Path, bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    train = ["genomes", "train", str(fasta), "--bed", str(bed), "--out", run, "--steps", "2"]
    assert main([*train, *OPTIONS, "--reverse-complement", "0.5", "--validate-every", "1"]) == 0
    said = capsys.readouterr().out
    assert "1,300 bases in 2 records; 3 windows to train on, 2 held out" in said
    assert "2 rows are longer than the context" in said
    assert "--intervals tiled cuts" in said
    assert "bits/base" in said
    assert "/byte" not in said
    assert main(["genomes", "train", "--out", run, "--resume"]) == 0
    assert main(["genomes", "evaluate", run, "--split", "test", "--json"]) == 0
    score = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert score["scored_bases"] == 31
    assert 1 < score["bits_per_base"] < 6
    regions = tmp_path / "regions.bed"
    places = [("chr1", 7 * i, 7 * i + 1 + i % 32) for i in range(100)]
    regions.write_text("".join(f"{name}\t{start}\t{end}\n" for name, start, end in places))
    embed = ["genomes", "embed", str(fasta), "--bed", str(regions), "--checkpoint", run]
    outs = ["all.npz", *(["all.h5"] if find_spec("h5py") else [])]  # an extra
    for out in outs:
        assert main([*embed, "--out", str(tmp_path / out), "--device", "cpu"]) == 0
        names, embeddings = read_embeddings(tmp_path / out)
        assert names == [f"{name}:{start}-{end}" for name, start, end in places]
        assert embeddings.shape == (100, 16)
        assert embeddings.dtype == np.float32
    # The commands for texts say that its tokens are none, before anything else.
    new, text = str(tmp_path / "new"), ["--steps", "1", *OPTIONS]
    capsys.readouterr()
    for command in (
        ["evaluate", run, str(regions)],
        ["evaluate", run, "--tasks", "absent.yaml"],
        ["generate", run],
        ["export", run, "--to", new],
        ["train", "--resume", "--out", run],
        ["train", "--from", run, "--out", new, *text],
        ["train", str(regions), "--from", run, "--out", new, *text],
    ):
        if "--tasks" not in command or find_spec("lm_eval"):
            assert main(command) == 2, command
            said = capsys.readouterr().err
            assert re.search("is on a genome, whose tokens are bases and not text", said), command
            assert not Path(new).exists()
    assert main(["compare", run]) == 0
    assert "bits/base" in capsys.readouterr().out
    trained = load_trained(run)
    assert trained.run.config.paths == (str(fasta),)
    alone = embed_intervals(trained.model, Genome(fasta), [Interval(*places[40])])
    np.testing.assert_allclose(embeddings[40], alone[0].numpy(), rtol=1e-4, atol=1e-5)


def test_an_interval_of_nothing_but_n_is_told_and_left_out(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    assert main(["genomes", "train", str(fasta), "--out", run, "--steps", "1", *OPTIONS]) == 0
    regions = tmp_path / "regions.bed"
    regions.write_text("chr1\t0\t9\nchr1\t810\t820\nchr2\t0\t9\n")
    arguments = ["genomes", "embed", str(fasta), "--bed", str(regions), "--checkpoint", run]
    out = tmp_path / "some.npz"
    assert main([*arguments, "--out", str(out)]) == 1
    assert "left out: line 2, chr1:810-820: nothing but N" in capsys.readouterr().out
    assert read_embeddings(out)[0] == ["chr1:0-9", "chr2:0-9"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--bed", "{}/absent.bed"], "No such file"),
        (["--validation-split", "dev"], "'valid'|no interval of split 'dev'"),
        (["--intervals", "caduceus", "--window", "100"], "max_length must divide the window"),
        (["--reverse-complement", "2"], "reverse_complement: .*less than or equal to 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    fasta: Path,
    bed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    told: str,
) -> None:
    arguments = ["genomes", "train", str(fasta), "--bed", str(bed), "--steps", "1", *OPTIONS]
    arguments += ["--out", str(tmp_path / "run")]
    assert main([*arguments, *(part.format(tmp_path) for part in change)]) == 2
    said = capsys.readouterr().err
    assert re.search(told, said), said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_on_text_is_no_run_on_a_genome(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.create(tmp_path / "run", config())
    with pytest.raises(RunError, match=r"is not of a genome: it has no genome.json"):
        genome_of(run)
    assert main(["genomes", "evaluate", str(tmp_path / "absent")]) == 2
    genome, text = str(tmp_path / "genome"), str(tmp_path / "text")
    assert main(["genomes", "train", str(fasta), "--out", genome, "--steps", "1", *OPTIONS]) == 0
    shape = [*OPTIONS, "--vocab-size", "256"]
    assert main(["train", str(fasta), "--out", text, "--steps", "1", *shape]) == 0
    assert main(["genomes", "train", str(fasta), "--from", text, "--out", "new"]) == 2
    assert main(["compare", genome, text]) == 2
    assert "must be all on texts or all on genomes" in capsys.readouterr().err
    file = Path(genome, "genome.json")
    file.write_text(file.read_text().replace('"upper"', '"keep"'))
    with pytest.raises(RunError, match=r"genome\.json' is damaged or was changed"):
        genome_of(RunFolder.open(genome))
    held_out = load_genome(GenomeConfig(fasta=str(fasta)), 32).held_out
    held_out.intervals = [Interval("chr1", 810, 840)]
    with pytest.raises(CorpusError, match="nothing but N"):
        evaluate_genome(LongNetLM(LongNetConfig(**SHAPE)), held_out)


@pytest.mark.skipif(not README.exists(), reason="tested away from the source tree")
def test_the_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = README.read_text(encoding="utf-8").partition("\n## Genomes\n")[2]
    example = section.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(README), "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.splitlines()[-1] == "torch.Size([2, 32])"


def test_the_help_of_genomes_needs_no_torch() -> None:
    code = (
        "import sys; from dilated_factory.cli import main; main(['--help']); "
        "assert 'torch' not in sys.modules and 'pyfaidx' not in sys.modules"
    )
    assert (
        "genomes"
        in subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
    )
