"""`dilated train` on what people have: folders with pictures in them, shards, tables."""

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dilated_factory.training.run_folder import RunFolder
from dilated_factory.training.trained import evaluate_run, load_trained

from .conftest import TINY_OPTIONS, losses
from .test_cli import Captured, complaint, run

parquet = pytest.importorskip("pyarrow.parquet", reason="the extra data has it")
TRAIN = ("train", "--steps", 2, *TINY_OPTIONS, "--out")
TEXT = b"a licence that says what may be done\n" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "dilated"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(4):
        lines = [json.dumps({"n": n, "text": f"row {n} of {shard} " * 5}) for n in range(20)]
        (folder / f"{shard}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


def flat(text: str) -> str:
    return " ".join(text.replace("\u2502", " ").split())


def test_what_is_no_text_is_skipped_and_told(capsys: Captured, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for index in range(9):
        (folder / f"{index}.txt").write_bytes(TEXT)
    (folder / "logo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" * 9)
    (folder / "letter.docx").write_bytes(b"PK\x03\x04\x14\0\0\0" * 9)
    (folder / "empty").touch()
    (folder / "table.parquet").write_bytes(b"PAR1" * 9)
    code, said, _ = run(capsys, *TRAIN, tmp_path / "run", folder)
    assert code == 0
    for row in ("9 text 0.txt", "2 skipped: binary: NUL bytes letter.docx", "1 skipped: empty",
                "1 skipped: Parquet: needs --text-field table.parquet"):  # fmt: skip
        assert row in flat(said)
    assert not cache.exists()  # plain text needs none


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress])
def test_compressed_text_is_decompressed(capsys: Captured, tmp_path: Path, pack: Any) -> None:
    """Its bytes under any name; a run on it is resumed and evaluated."""
    curves = []
    for name, content in (("plain", TEXT), ("genome.fa.gz", pack(TEXT))):
        (tmp_path / name).write_bytes(content)
        out = tmp_path / f"run {name}"
        code, said, _ = run(capsys, *TRAIN, out, tmp_path / name)
        assert code == 0
        assert ("skipped" in said, "zip" in said) == (False, name != "plain")
        curves.append(losses(RunFolder.open(out).read_metrics()))
        assert run(capsys, "train", "--resume", "--out", out)[0] == 0
        trained = load_trained(out)
        assert evaluate_run(trained, contexts=[16], max_bytes=32).baselines
        assert evaluate_run(trained, [tmp_path / name], contexts=[16], max_bytes=32).scores
    assert curves[0] == curves[1]


def test_paths_to_score_are_read_by_the_globs_of_the_run_or_by_their_own(
    capsys: Captured, tmp_path: Path
) -> None:
    files = {"a.txt": TEXT, "b.md": TEXT[::-1], "sub/c.txt": TEXT[7:] + TEXT[:7], "d.txt": TEXT * 3}
    for name, content in files.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_bytes(content)
    out, texts = tmp_path / "run", tmp_path / "texts"
    globs = ("--include", "*.txt", "--exclude", "d.*")
    assert run(capsys, *TRAIN, out, texts, *globs)[0] == 0

    def bits(*arguments: object) -> dict[str, float]:
        options = ("--contexts", 16, "--max-bytes", 2**20, "--json")
        code, said, error = run(capsys, "evaluate", out, *arguments, *options)
        assert code == 0, error
        return json.loads(said)["bits_per_byte"]

    own = bits(texts)
    assert own == bits(texts / "a.txt", texts / "sub" / "c.txt")
    assert bits(texts, "--exclude", "c.txt") == bits(
        texts / "a.txt", texts / "d.txt", "--exclude", "-"
    )
    assert bits(texts, "--include", "*.md", "--exclude", "-") == bits(
        texts / "b.md", "--include", "*"
    )
    code, _, error = run(capsys, "evaluate", out, texts / "b.md")
    assert (code, error.count("\n")) == (2, 1)
    assert "left out by --include and --exclude" in error
    code, _, error = run(capsys, "evaluate", out, "--include", "*.md")
    assert (code, error.count("\n")) == (2, 1)
    assert "paths must be given with include" in error


def test_rows_are_documents_that_need_not_see_each_other(
    capsys: Captured, shards: Path, tmp_path: Path, cache: Path
) -> None:
    out, options = tmp_path / "run", ("--text-field", "text", "--split", "document")
    code, said, _ = run(capsys, *TRAIN, out, shards, *options, "--documents", "separate")
    assert code == 0
    assert "4 JSON lines, gzip 0.jsonl.gz" in flat(said)
    config = RunFolder.open(out).config
    assert (config.text_field, config.split) == ("text", "document")
    assert len(list(cache.iterdir())) == 1
    assert run(capsys, "evaluate", out, "--contexts", "16")[0] == 0
    elsewhere = ("--cache", tmp_path / "elsewhere")
    assert run(capsys, "train", "--resume", "--out", out, *elsewhere, *options)[0] == 0
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1
    assert "split is 'document' there" in complaint(
        capsys, "train", "--resume", "--out", out, "--split", "file"
    )


def test_what_datasets_saves_is_its_tables_alone(capsys: Captured, tmp_path: Path) -> None:
    """As `DatasetDict.save_to_disk` lays them out, and with a cache of `map` among them."""
    arrow = pytest.importorskip("pyarrow", reason="the extra data has it")
    saved = tmp_path / "saved"
    for split, name in (
        ("train", "data-0"),
        ("train", "data-1"),
        ("train", "cache-1a"),
        ("test", "data-0"),
    ):
        (saved / split).mkdir(parents=True, exist_ok=True)
        table = arrow.table({"text": [f"{split} {name} {row} " * 3 for row in range(30)]})
        with arrow.ipc.new_stream(saved / split / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
        for record in ("state.json", "dataset_info.json"):
            (saved / split / record).write_text(json.dumps({"features": {}}, indent=2))
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    code, said, _ = run(capsys, *TRAIN, tmp_path / "run", saved, "--text-field", "text")
    assert code == 0
    assert "3 Arrow test/data-0.arrow" in flat(said)
    assert "6 skipped: what datasets keeps beside its tables" in flat(said)


def test_globs_and_files_that_are_held_out(capsys: Captured, shards: Path, tmp_path: Path) -> None:
    (shards / "notes.md").write_bytes(TEXT)
    (shards / "sub").mkdir()
    (shards / "sub" / "3.jsonl.gz").write_bytes((shards / "3.jsonl.gz").read_bytes())
    options = (
        "--include",
        "*.gz",
        "--include",
        "*.md",
        "--exclude",
        "sub/*",
        "--text-field",
        "text",
    )
    held_out = ("--validation", shards / "3.jsonl.gz")
    code, said, _ = run(capsys, *TRAIN, tmp_path / "a", shards, *options, *held_out)
    assert code == 0
    assert "in 4 files to train on" in said  # 0, 1, 2 and the notes
    assert "in 1 held out" in said
    assert "1 skipped: left out by --include and --exclude sub/3.jsonl.gz" in flat(said)
    file = tmp_path / "run.toml"
    file.write_text('paths = ["shards"]\nvalidation = ["shards/3.jsonl.gz"]\ntext_field = "text"\n'
                    'include = ["*.gz", "*.md"]\nexclude = ["sub/*"]\nsteps = 2')  # fmt: skip
    code, _, _ = run(capsys, *TRAIN, tmp_path / "b", "--config", file)
    assert code == 0
    one, two = (RunFolder.open(tmp_path / name) for name in "ab")
    assert one.config == two.config
    assert one.corpus_digest() == two.corpus_digest()


def test_bad_input_is_one_line(capsys: Captured, shards: Path, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the extra data has it")
    table = tmp_path / "table.parquet"
    parquet.write_table(arrow.table({"body": ["a"]}), table)
    train = (*TRAIN, tmp_path / "run")
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((table, "--text-field", "text"), "must be a field of 'table.parquet': 'body'. Got 'text'"),
        ((shards, "--text-field", "n"), "'n' must be a string in line 1 of"),
        ((shards, "--text-field", "n", "--raw"), "text_field must be none with raw. Got 'n'."),
        ((table,), "the corpus is empty: no file with content in"),
        ((shards, "--include", "*.txt"), "4 skipped: left out by --include and --exclude"),
        ((shards, "--validation", shards), "nothing is left to train on"),
        ((shards, "--validation", tmp_path / "no"), "path must be an existing file or folder"),
    ]
    for options, says in cases:
        assert says in complaint(capsys, *train, *options)
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    assert "needs a file of JSON lines, Parquet or Arrow" in complaint(
        capsys, *train, text, "--text-field", "text"
    )
    shard = shards / "1.jsonl.gz"
    shard.write_bytes(shard.read_bytes()[:-30])
    broken = (shards, "--text-field", "text")
    assert "'1.jsonl.gz' is broken at byte" in complaint(capsys, *train, *broken)
    assert not (tmp_path / "run").exists()
    code, said, _ = run(capsys, *train, *broken, "--broken", "skip")
    assert code == 0
    assert "1 skipped: broken" in flat(said)
    # The run's own option is that of other files to score, too.
    code, _, err = run(capsys, "evaluate", tmp_path / "run", shards, "--contexts", "16")
    assert code == 0, err


def test_a_run_from_another_reads_other_paths_as_its_options_say(
    capsys: Captured, shards: Path, tmp_path: Path
) -> None:
    rows = ("--text-field", "text", "--exclude", "0*", "--validation", shards / "3.jsonl.gz")
    assert run(capsys, *TRAIN, tmp_path / "old", shards, *rows)[0] == 0
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    more = ("train", "--from", tmp_path / "old", "--steps", 1, "--out")
    assert run(capsys, *more, tmp_path / "new", text)[0] == 0
    now = RunFolder.open(tmp_path / "new").config
    assert (now.text_field, now.exclude, now.validation) == (None, (), ())
    assert run(capsys, *more, tmp_path / "same")[0] == 0
    now = RunFolder.open(tmp_path / "same").config
    assert (now.text_field, now.exclude) == ("text", ("0*",))


def test_bytes_need_a_vocabulary_of_256(capsys: Captured, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(TEXT)
    small = (text, "--vocab-size", 100)
    says = "vocab_size must be at least 256 for bytes. Got 100."
    assert says in complaint(capsys, *TRAIN, tmp_path / "run", *small)
    assert not (tmp_path / "run").exists()


def test_an_old_run_on_binary_files_goes_on(capsys: Captured, tmp_path: Path) -> None:
    """Once, what is no text was read too."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for index in range(5):
        (folder / f"{index}.bin").write_bytes(bytes(range(256)) * (index + 1))
    out = tmp_path / "run"
    assert "(--raw reads their bytes)" in complaint(capsys, *TRAIN, out, folder)
    assert run(capsys, *TRAIN, out, folder, "--raw")[0] == 0
    from dilated_factory.training.corpus import _EARLIER, _load, load_corpus

    _, before = _load([folder], (), 0.05, _EARLIER)
    corpus = load_corpus([folder], digest=before)
    assert corpus.digest == before
    assert len(corpus.train) + len(corpus.validation) == 256 * 15
    assert load_corpus([folder], raw=True).digest != before


def test_documents_longer_than_the_context_are_told(
    capsys: Captured, shards: Path, tmp_path: Path
) -> None:
    options = ("--text-field", "text", "--documents", "separate")
    code, said, _ = run(capsys, *TRAIN, tmp_path / "run", shards, *options)
    assert code == 0
    assert "80 of 80 documents are longer than the context: windows cut them" in flat(said)
