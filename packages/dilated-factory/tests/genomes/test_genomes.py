"""FASTA files, tokens, intervals and datasets: coordinates worked out by hand."""

import gzip
import os
import pickle
import random
import struct
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from dilated_factory.errors import CorpusError, InputError
from dilated_factory.genomes.dataset import GenomeDataset
from dilated_factory.genomes.fasta import Genome
from dilated_factory.genomes.intervals import GenomeWindows, Interval, read_bed
from dilated_factory.genomes.tokens import VOCABULARY, encode, reverse_complement, vocab_size
from dilated_factory.models.head_loss import IGNORED

#        0123456 7890123 4567890 12
CHR1 = "ACGTACGTNNacgtRYACGTACC"
CHR2 = "GGGTTT"
PAD, SEP = 4, 1


def bgzip(data: bytes, block: int = 11) -> bytes:
    """What bgzip writes: gzip members that say their size, and an empty one."""
    out = b""
    for start in [*range(0, len(data), block), len(data)]:
        part = data[start : start + block]
        squeeze = zlib.compressobj(6, zlib.DEFLATED, -15)
        body = squeeze.compress(part) + squeeze.flush()
        out += b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x06\0BC\x02\0"
        out += struct.pack("<H", len(body) + 25) + body
        out += struct.pack("<II", zlib.crc32(part), len(part))
    return out


def lines(records: dict[str, str], width: int = 7, end: str = "\n") -> bytes:
    text = ""
    for name, sequence in records.items():
        parts = [sequence[i : i + width] for i in range(0, len(sequence), width)]
        text += f">{name} of somebody{end}" + "".join(part + end for part in parts)
    return text.encode()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "genome.fa"
    path.write_bytes(lines({"chr1": CHR1, "chr2": CHR2}))
    return path


@pytest.mark.parametrize("kind", ["plain", "crlf", "gzip", "bgzip", "no last newline"])
def test_every_slice_of_every_kind_of_file_is_the_sequence_alone(tmp_path: Path, kind: str) -> None:
    plain = lines({"chr1": CHR1, "chr2": CHR2}, end="\r\n" if kind == "crlf" else "\n")
    data, name = {
        "gzip": (gzip.compress(plain), "genome.fa.gz"),
        "bgzip": (bgzip(plain), "genome.fa.bgz"),
        "no last newline": (plain.rstrip(b"\n"), "genome.fa"),
    }.get(kind, (plain, "genome.fa"))
    path = tmp_path / name
    path.write_bytes(data)
    genome = Genome(path)
    assert genome.lengths == {"chr1": 23, "chr2": 6}
    for start in range(24):
        for end in range(start, 24):
            assert genome.read("chr1", start, end) == CHR1[start:end]
    assert genome.read("chr2", 0, 6) == CHR2


def test_the_folder_of_the_file_is_not_written_to_and_an_index_in_it_is_not_trusted(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    fasta = folder / "genome.fa"
    fasta.write_bytes(lines({"chr1": CHR1}))
    (folder / "genome.fa.fai").write_text("chr1\t9\t3\t4\t5\n")
    folder.chmod(0o555)
    try:
        assert Genome(fasta).read("chr1", 0, 23) == CHR1
    finally:
        folder.chmod(0o755)
    assert sorted(path.name for path in folder.iterdir()) == ["genome.fa", "genome.fa.fai"]


def test_a_file_that_was_replaced_has_a_new_index(fasta: Path) -> None:
    assert Genome(fasta).lengths["chr1"] == 23
    fasta.write_bytes(lines({"other": CHR2}))
    os.utime(fasta, (2e9, 2e9))  # later than its index
    assert Genome(fasta).lengths == {"other": 6}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.fa", b"", "must begin with a header"),
        ("a.fa", b"\x89PNG\r\n", "must begin with a header"),
        ("a.fa", b"@r1\nACGT\n+\nIIII\n", "must begin with a header"),
        ("a.fa", b">a\nACGT\nAC\nACGT\n", "no valid FASTA file: Line length"),
        ("a.fa", b">a\nACGT\n>a\nAC\n", "no valid FASTA file: Duplicate key"),
        ("a.fa", b">\nACGT\n", "no valid FASTA file: Bad sequence name"),
        ("a.fa", b">a\n\xff\xfe\n", "no valid FASTA file"),
        ("a.fa.gz", b">a\nACGT\n", "plain, or compressed by gzip or bgzip"),
        ("a.fa.bz2", b"BZh9", "plain, or compressed by gzip or bgzip"),
        ("a.fa.gz", gzip.compress(b">a\nACGT\n" * 99, mtime=0)[:-12], "is damaged"),
        ("a.fa.gz", gzip.compress(b"no fasta", mtime=0), "must begin with a header"),
    ],
)
def test_what_is_no_fasta_file_is_one_clear_error(
    tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=told) as caught:
        Genome(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [("chr1", 20, 24), ("chr1", -1, 3), ("chr3", 0, 1)])
def test_a_slice_that_is_not_there_is_an_error_and_not_cut(
    fasta: Path, place: tuple[str, int, int]
) -> None:
    with pytest.raises(CorpusError, match=r"must be in \[0, 23\]|no record 'chr3'"):
        Genome(fasta).read(*place)


def test_the_vocabulary_is_that_of_hyenadna_and_caduceus() -> None:
    names = ["[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]", *"ACGTN"]
    assert list(VOCABULARY[:12]) == names
    assert (vocab_size("upper"), vocab_size("keep")) == (16, 24)
    assert encode("ACGTNacgtnRU.").tolist() == [7, 8, 9, 10, 11, 7, 8, 9, 10, 11, 6, 6, 6]
    assert encode("ACGTNacgtnR", "keep").tolist() == [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 6]


def test_a_reverse_complement_complements_each_letter_of_iupac_and_keeps_the_soft_mask() -> None:
    assert reverse_complement("AACGTNacgtn.") == ".nacgtNACGTT"
    codes = "A:A C:C G:G T:T R:AG Y:CT S:CG W:AT K:GT M:AC B:CGT D:AGT H:ACT V:ACG N:ACGT"
    bases = dict(code.split(":") for code in codes.split())
    pairs = dict(zip("ACGT", "TGCA", strict=True))
    for letter, meant in bases.items():
        other = reverse_complement(letter)
        assert set(bases[other]) == {pairs[base] for base in meant}
        assert reverse_complement(letter.lower()) == other.lower()
        assert reverse_complement(other) == letter


def test_windows_of_hyenadna_grow_on_both_sides_and_are_cut_at_the_ends() -> None:
    lengths = {"chr1": 23, "chr2": 6}
    places = [("chr1", 10, 13), ("chr1", 1, 3), ("chr1", 20, 23), ("chr2", 2, 3), ("chr1", 4, 20)]
    windows = GenomeWindows([Interval(*place) for place in places], 8, lengths)
    assert [str(window) for window in windows] == [
        "chr1:8-16",  # 5 more: 2 on the left, 3 on the right
        "chr1:0-6",  # 3 on each side, of which 2 are not there
        "chr1:18-23",  # 2 and 3, of which all 3 are not there
        "chr2:0-6",  # 3 and 4
        "chr1:4-12",  # longer: its beginning
    ]


def test_windows_of_caduceus_are_parts_of_one_length_that_are_moved_inside() -> None:
    rows = [Interval("chr1", 3, 9), Interval("chr1", 13, 23), Interval("chr2", 4, 6)]
    windows = GenomeWindows(rows, 8, {"chr1": 23, "chr2": 6}, "caduceus", window=16)
    assert [str(window) for window in windows] == [
        *("chr1:3-11", "chr1:11-19"),
        *("chr1:13-21", "chr1:15-23"),  # 21 to 29 would leave it by 6
        *("chr2:0-6", "chr2:0-6"),  # shorter than a window
    ]
    assert str(windows[-4]) == "chr1:13-21"
    with pytest.raises(IndexError):
        windows[6]


def test_tiles_cover_each_row_once() -> None:
    rows = [Interval("chr1", 2, 19), Interval("chr2", 0, 6)]
    windows = GenomeWindows(rows, 8, {"chr1": 23, "chr2": 6}, "tiled")
    assert [str(w) for w in windows] == ["chr1:2-10", "chr1:10-18", "chr1:18-19", "chr2:0-6"]


def test_a_bed_file_gives_the_rows_of_a_split(tmp_path: Path) -> None:
    text = "# made\ntrack name=x\nchr1\t0\t5\ttrain\r\n\nchr2\t1\t6\tvalid\nchr1\t7\t9\ttrain\n"
    bed = tmp_path / "a.bed"
    bed.write_text(text)
    rows = read_bed(bed, "train")
    assert [(str(row), row.line) for row in rows] == [("chr1:0-5", 3), ("chr1:7-9", 6)]
    assert len(read_bed(bed)) == 3
    squeezed = tmp_path / "a.bed.gz"
    squeezed.write_bytes(gzip.compress(text.encode()))
    assert read_bed(squeezed) == read_bed(bed)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_is_no_bed_file_and_no_genome(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="must be a regular file"):
        read_bed(tmp_path / "pipe")
    with pytest.raises(CorpusError, match="must be an existing FASTA file"):
        Genome(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("chr1 0 5 train", "line 2 must have 4 columns between tabs: record, start, end, split"),
        ("chr1\t0\t5", "line 2 must have 4 columns"),
        ("chr1\tstart\tend\ttrain", "line 2 must have 0 <= start < end"),
        ("chr1\t5\t5\ttrain", "line 2 must have 0 <= start < end"),
        ("chr1\t-1\t5\ttrain", "line 2 must have 0 <= start < end"),
        ("chr1\t1.5\t5\ttrain", "line 2 must have 0 <= start < end"),
        (f"chr1\t1\t{9**99}\ttrain", "line 2 must have 0 <= start < end"),
    ],
)
def test_a_malformed_line_of_a_bed_file_is_told_by_its_number(
    tmp_path: Path, line: str, told: str
) -> None:
    bed = tmp_path / "a.bed"
    bed.write_text(f"chr1\t0\t5\ttrain\n{line}\n")
    with pytest.raises(CorpusError, match=told):
        read_bed(bed, "train")


def test_a_bed_file_of_another_genome_or_split_is_told(tmp_path: Path) -> None:
    bed = tmp_path / "a.bed"
    bed.write_text("chr1\t0\t5\ttrain\n1\t0\t5\ttrain\n")
    with pytest.raises(CorpusError, match=r"'x.bed', line 2 must name a record .* chr1"):
        GenomeWindows(read_bed(bed), 8, {"chr1": 23}, source="x.bed")
    with pytest.raises(CorpusError, match=r"line 1 must end in 'chr1', which has 4 bases. Got 5"):
        GenomeWindows(read_bed(bed), 8, {"chr1": 4})
    with pytest.raises(CorpusError, match="no interval of split 'valid'; it has train"):
        read_bed(bed, "valid")
    bed.write_text("\n")
    with pytest.raises(CorpusError, match="holds no interval"):
        read_bed(bed)


def test_an_item_is_the_bases_and_sep_with_n_left_out_of_the_targets(fasta: Path) -> None:
    rows = [Interval("chr1", 6, 14), Interval("chr2", 0, 6)]  # GTNNacgt, GGGTTT
    tokens, targets = GenomeDataset(Genome(fasta), rows, 8)[0]
    assert tokens.tolist() == [9, 10, PAD, PAD, 7, 8, 9, 10]
    assert targets.tolist() == [10, IGNORED, IGNORED, 7, 8, 9, 10, SEP]
    tokens, targets = GenomeDataset(Genome(fasta), rows, 8)[1]
    assert tokens.tolist() == [PAD, PAD, 9, 9, 9, 10, 10, 10]
    assert targets.tolist() == [IGNORED, IGNORED, 9, 9, 10, 10, 10, SEP]


def test_an_item_as_hyenadna_has_n_as_a_base_and_may_have_lower_case_and_no_sep(
    fasta: Path,
) -> None:
    rows = [Interval("chr1", 6, 14)]
    data = GenomeDataset(Genome(fasta), rows, 8, case="keep", unknown_bases="keep", sep=False)
    tokens, targets = data[0]
    assert tokens.tolist() == [9, 10, 11, 11, 12, 13, 14]
    assert targets.tolist() == [10, 11, 11, 12, 13, 14, 15]


def test_the_other_strand_is_drawn_by_seed_epoch_and_index_alone(fasta: Path) -> None:
    rows = [Interval("chr2", 0, 6)] * 400

    def drawn(epoch: int, seed: int = 0, chance: float = 0.25) -> list[bool]:
        data = GenomeDataset(Genome(fasta), rows, 6, reverse_complement=chance, seed=seed)
        data.set_epoch(epoch)
        found = [data[i][0].tolist() for i in range(len(data))]
        forward, other = [9, 9, 9, 10, 10, 10], [7, 7, 7, 8, 8, 8]
        assert all(each in (forward, other) for each in found)
        return [each == other for each in found]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert drawn(0) != drawn(0, seed=1)
    assert 60 < sum(drawn(0)) < 140
    assert sum(drawn(0, chance=1.0)) == 400


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_what_the_process_reads_and_see_the_epoch(fasta: Path, context: str) -> None:
    if context == "fork" and not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    windows = GenomeWindows([Interval("chr1", 0, 23)] * 5, 4, {"chr1": 23}, "tiled")
    data = GenomeDataset(Genome(fasta), windows, 4, reverse_complement=0.5)
    loader = DataLoader(
        data, batch_size=1, num_workers=2, persistent_workers=True, multiprocessing_context=context
    )
    for epoch in (0, 3):
        data.set_epoch(epoch)
        own = [data[i] for i in range(len(data))]
        for (tokens, targets), (there, aims) in zip(own, loader, strict=True):
            assert torch.equal(tokens, there[0])
            assert torch.equal(targets, aims[0])


def test_a_pickled_genome_opens_the_file_anew(fasta: Path) -> None:
    genome = Genome(fasta)
    genome.read("chr1", 0, 1)
    again = pickle.loads(pickle.dumps(genome))
    assert again.read("chr1", 3, 23) == CHR1[3:]
    assert again.lengths == genome.lengths


def test_long_records_are_read_right_at_every_place(tmp_path: Path) -> None:
    chance = random.Random(0)
    sequence = "".join(chance.choices("ACGT", k=3001))
    path = tmp_path / "long.fa"
    path.write_bytes(lines({"x": sequence}, width=60))
    genome = Genome(path)
    places = sorted(chance.choices(range(3002), k=400))
    for start, end in pairwise(places):
        assert genome.read("x", start, end) == sequence[start:end]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"reverse_complement": 1.5}, r"reverse_complement must be in \[0, 1\]"),
        ({"case": "lower"}, "case must be 'upper' or 'keep'. Got 'lower'"),
        ({"unknown_bases": "drop"}, "unknown_bases must be"),
    ],
)
def test_a_wrong_option_of_a_dataset_is_told(
    fasta: Path, options: dict[str, object], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        GenomeDataset(Genome(fasta), [], **{"max_length": 8, **options})  # type: ignore[arg-type] # on purpose


def test_windows_that_do_not_fit_are_refused(fasta: Path) -> None:
    with pytest.raises(InputError, match=r"max_length must divide the window of 16. Got 6"):
        GenomeWindows([], 6, {}, "caduceus", window=16)
    data = GenomeDataset(Genome(fasta), [Interval("chr1", 0, 9)], 8)
    with pytest.raises(InputError, match=r"at most max_length=8 bases. Got chr1:0-9"):
        data[0]
