"""The cache of tokens: made once, found again, complete or absent, the same whoever makes it."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import factory_programs as programs
from dilated_factory import Corpus, CorpusError, TrainConfig, load_corpus
from dilated_factory.corpora.contents import Content
from dilated_factory.corpora.documents import Passage, Source
from dilated_factory.training import loop, token_cache
from dilated_factory.training.corpus import corpus_of
from dilated_factory.training.loop import Trainer
from dilated_factory.training.token_cache import default_cache
from process_ranks import Ranks

SHARDS = 5


class Halves:
    """Two tokens a byte, and one after each document."""

    end_of_document: int | None = 16
    tokens: Sequence[bytes] = ()
    is_exact = True

    def __init__(self, vocab_size: int = 17) -> None:
        self.vocab_size = vocab_size
        self.sizes = torch.zeros(vocab_size, dtype=torch.int64)
        self.sizes[:16] = 1  # twice as many as there are
        self.digest = f"halves {vocab_size}"

    def encode(self, documents: Sequence[bytes]) -> list[list[int]]:
        return [[half for byte in text for half in divmod(byte, 16)] for text in documents]

    def decode(self, ids: Sequence[int]) -> bytes:
        raise NotImplementedError


def rows(shard: int) -> list[bytes]:
    return [f"shard {shard} row {row} {'x' * (row % 13)}".encode() for row in range(40)] + [b""]


def write_shard(path: Path, texts: list[bytes]) -> None:
    lines = b"".join(json.dumps({"text": text.decode()}).encode() + b"\n" for text in texts)
    path.write_bytes(gzip.compress(lines, mtime=0))


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(SHARDS):
        write_shard(folder / f"{shard}.jsonl.gz", rows(shard))
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read, in order."""
    names: list[str] = []
    whole = token_cache.document_pieces

    def recorded(source: Source, text_field: str | None) -> Iterator[Passage]:
        names.append(source.name)
        return whole(source, text_field)

    monkeypatch.setattr(token_cache, "document_pieces", recorded)
    return names


def load(folder: Path, **options: Any) -> Corpus:
    return load_corpus([folder], text_field="text", **options)


def documents(corpus: Corpus, side: str = "train") -> list[bytes]:
    starts = [0, *corpus.ends.tolist()]
    first = 0 if side == "train" else len(corpus.train)
    last = len(corpus.train) + (0 if side == "train" else len(corpus.validation))
    whole = torch.cat([corpus.train, corpus.validation]).numpy()
    return [whole[a:b].tobytes() for a, b in pairwise(starts) if first <= a and b <= last]


def test_it_is_made_once_below_the_users_cache(shards: Path, read: list[str]) -> None:
    first = load(shards)
    assert len(read) == SHARDS
    again = load(shards)
    assert len(read) == SHARDS
    assert again.digest == first.digest
    assert torch.equal(again.train, first.train)
    (folder,) = (shards.parent / "xdg" / "dilated").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["about.json", "ends", "tokens"]


def test_rows_without_content_are_left_out_and_told(shards: Path) -> None:
    corpus = load(shards)
    names = [*corpus.train_files, *corpus.validation_files]
    expected = [row for name in names for row in rows(int(name[0])) if row]
    assert documents(corpus) + documents(corpus, "validation") == expected
    assert f"{SHARDS} documents without content" in [each.what for each in corpus.readings]
    assert corpus.skipped == 0


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(17, torch.uint8), (257, torch.uint16), (2**16, torch.uint16), (2**16 + 1, torch.int32)],
)
def test_each_document_ends_with_the_token_of_the_tokenizer(
    shards: Path, vocab_size: int, dtype: torch.dtype
) -> None:
    halves = Halves(vocab_size)
    corpus = load(shards, tokenizer=halves)
    assert corpus.train.dtype == dtype
    ends = corpus.ends.tolist()
    assert torch.cat([corpus.train, corpus.validation])[corpus.ends - 1].tolist() == [16] * len(
        ends
    )
    whole = [t for n in corpus.train_files for row in rows(int(n[0])) if row
             for t in (*halves.encode([row])[0], 16)]  # fmt: skip
    assert corpus.train.tolist() == whole
    assert corpus.bytes_share == 0.5
    assert corpus.bytes_in(corpus.train) == (len(whole) - whole.count(16)) / 2


def test_what_was_changed_is_made_anew(shards: Path, read: list[str]) -> None:
    before = load(shards).digest
    write_shard(shards / "3.jsonl.gz", [b"another"])
    assert load(shards).digest != before
    assert load(shards, tokenizer=Halves()).digest not in (before, load(shards).digest)
    assert len(read) == 3 * SHARDS


def test_a_file_that_changes_while_it_is_read_is_told(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = token_cache.document_pieces

    def touched(source: Source, text_field: str | None) -> Iterator[Passage]:
        yield from whole(source, text_field)
        os.utime(source.path, ns=(1, 1))

    monkeypatch.setattr(token_cache, "document_pieces", touched)
    with pytest.raises(CorpusError, match=r"'\d.jsonl.gz' was changed while the corpus was read"):
        load(shards)


def test_after_a_broken_shard_what_was_read_before_is_kept(shards: Path, read: list[str]) -> None:
    path = shards / "2.jsonl.gz"
    random = np.random.default_rng(5)  # long enough not to be broken at its beginning
    write_shard(path, [random.bytes(25_000).hex().encode() for _ in range(40)])
    good, times = path.read_bytes(), path.stat().st_mtime_ns
    middle = len(good) * 3 // 4
    path.write_bytes(good[:middle] + bytes(20) + good[middle + 20 :])
    os.utime(path, ns=(times, times))
    with pytest.raises(CorpusError, match=r"'2.jsonl.gz' is broken at byte [\d,]+ of [\d,]+"):
        load(shards)
    assert "2.jsonl.gz" in read
    done = len(read) - 1
    read.clear()
    path.write_bytes(good)
    os.utime(path, ns=(times, times))
    corpus = load(shards)
    assert len(read) == SHARDS - done
    assert len(documents(corpus) + documents(corpus, "validation")) == SHARDS * 40


def test_a_broken_shard_is_left_out_only_if_asked(shards: Path) -> None:
    path = shards / "2.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-60])
    corpus = load(shards, broken="skip")
    found = documents(corpus) + documents(corpus, "validation")
    assert len(found) == (SHARDS - 1) * 40
    assert not any(text.startswith(b"shard 2") for text in found)
    assert corpus.skipped == 1
    (told,) = [each for each in corpus.readings if "broken" in each.what]
    assert told.example == "2.jsonl.gz"
    assert not told.was_read


def test_after_a_kill_it_goes_on_where_it_was(
    shards: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = token_cache._write_part

    def killed(order: Any, group: range, part: Path) -> None:
        if part.name == "00003":
            (part / "0.1.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        whole(order, group, part)

    monkeypatch.setattr(token_cache, "_write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        load(shards)
    monkeypatch.setattr(token_cache, "_write_part", whole)
    assert len(read) == 3
    corpus = load(shards)
    assert len(read) == SHARDS
    assert len(documents(corpus) + documents(corpus, "validation")) == SHARDS * 40


def test_a_part_that_a_power_cut_took_is_made_anew(
    shards: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "_join_parts", killed)
        with pytest.raises(KeyboardInterrupt):
            load(shards)
    (path,) = default_cache().glob("*.parts/00001/0.tokens")
    path.write_bytes(bytes(path.stat().st_size))
    corpus = load(shards)
    assert len(read) == SHARDS + 1
    assert len(documents(corpus) + documents(corpus, "validation")) == SHARDS * 40


@pytest.mark.parametrize("name", ["tokens", "ends", "about.json"])
@pytest.mark.parametrize("damage", [lambda x: x[:-3], lambda x: x.replace(x[-9:-4], b"1" * 5)])
def test_a_damaged_cache_is_made_anew(shards: Path, name: str, damage: Any) -> None:
    before = load(shards)
    (path,) = default_cache().glob(f"*/{name}")
    path.write_bytes(damage(path.read_bytes()))
    again = load(shards)
    assert again.digest == before.digest
    assert len(documents(again) + documents(again, "validation")) == SHARDS * 40


@pytest.mark.distributed
@pytest.mark.xdist_group("factory_distributed")
def test_four_processes_make_together_what_one_makes(shards: Path, tmp_path: Path) -> None:
    alone = load(shards, cache=tmp_path / "alone", split="document")
    (one,) = (tmp_path / "alone").iterdir()
    with Ranks(4) as ranks:
        for attempt in range(5):
            cache = tmp_path / f"four {attempt}"
            assert ranks.run(programs.digest_of_rows, shards, cache) == [alone.digest] * 4
            (four,) = cache.iterdir()
            assert one.name == four.name
            for name in ("tokens", "ends", "about.json"):
                assert (one / name).read_bytes() == (four / name).read_bytes()


def test_rows_are_split_by_what_they_say(shards: Path) -> None:
    corpus = load(shards, split="document", validation_fraction=0.3)
    held, kept = documents(corpus, "validation"), documents(corpus)
    assert corpus.train_files == corpus.validation_files
    assert sorted(held + kept) == sorted(row for s in range(SHARDS) for row in rows(s) if row)
    assert 0.15 < len(held) / (SHARDS * 40) < 0.45
    # A row keeps its side wherever it stands; equal rows are never on both.
    one = shards.parent / "one.jsonl.gz"
    write_shard(one, [*rows(1), *rows(0), *rows(0)])
    alone = load_corpus([one], text_field="text", validation_fraction=0.3)
    assert set(documents(alone, "validation")) == {x for x in held if x[6:7] in b"01"}
    with pytest.raises(CorpusError, match=r"both sides. Got .* equal ones are on one side"):
        load(shards, split="document", validation_fraction=1e-9)


def test_the_end_of_one_compressed_text_is_held_out(tmp_path: Path) -> None:
    text = b"some words " * 500
    (tmp_path / "text.gz").write_bytes(gzip.compress(text))
    corpus = load_corpus([tmp_path / "text.gz"], cache=tmp_path / "cache", validation_fraction=0.1)
    assert bytes(corpus.train.tolist()) == text[:4950]
    assert bytes(corpus.validation.tolist()) == text[4950:]
    assert corpus.ends.tolist() == [5500]


MEMORY = """
import sys
from dilated_factory import load_corpus

def peak():
    (line,) = [x for x in open("/proc/self/status") if x.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

before = peak()
corpus = load_corpus([sys.argv[1]], cache=sys.argv[2])
assert len(corpus.train) > 60e6
for start in range(0, len(corpus.train), 2**24):
    corpus.train[start : start + 2**24].max()
    corpus.drop_pages()
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("packed", [True, False])
def test_memory_does_not_grow_with_the_corpus(packed: bool, tmp_path: Path) -> None:
    """128 MiB in two files, in at most 64 of memory; a lookup table of a token each is more."""
    line = b"%07d a line of text that is somewhat longer\n"
    text = b"".join(line % index for index in range(2**12))
    for name in "ab":
        path = tmp_path / "corpus" / name
        path.parent.mkdir(exist_ok=True)
        content = text * (2**26 // len(text))
        path.write_bytes(gzip.compress(content, 1) if packed else content)
    del content
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path.parent), str(tmp_path / "c")],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    assert float(done.stdout) < 64


def test_groups_hold_all_files_once() -> None:
    kinds = [Content("text"), Content("text", "gzip"), Content("JSON lines")]
    generator = np.random.default_rng(3)
    sources = tuple(
        Source(
            str(i), Path(str(i)), kinds[generator.integers(3)], int(generator.integers(2**23)), 0
        )
        for i in range(97)
    )
    order = token_cache.Order(sources, (0,) * 97, 0.1, "text", False, Halves())
    groups = order.groups()
    assert [index for group in groups for index in group] == list(range(97))
    for group in groups:
        if len(group) > 1:
            assert {sources[index].content for index in group} == {Content("text")}
            assert sum(sources[index].size for index in group) <= 2**24
    assert len(groups) < 90


def test_training_lets_go_of_what_it_has_read(
    tiny_train: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[int] = []
    corpus = replace(corpus_of(tiny_train), drop_pages=lambda: dropped.append(1))
    config = tiny_train.model_copy(update={"steps": 4})
    Trainer.start(tmp_path / "few", config, corpus).train()
    assert not dropped  # there is no need yet
    # A window is 49 bytes, and the system maps 128 KiB around it: three windows a step.
    monkeypatch.setattr(loop, "_MOST_TOUCHED", 2 * 3 * 2**17)
    Trainer.start(tmp_path / "more", config, corpus).train()
    assert len(dropped) == 2
