"""Run folders: a checkpoint is complete or absent, and damage is told."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dilated_factory import LongNetConfig, LongNetLM, RunError, TrainConfig
from dilated_factory.cli.convert import write_run
from dilated_factory.configs.genomes import GenomeConfig
from dilated_factory.corpora.tokens import load_tokenizer
from dilated_factory.genomes.training import GenomeTrainer, genome_of, load_genome
from dilated_factory.training import checkpoints, run_folder
from dilated_factory.training.checkpoints import RunState
from dilated_factory.training.run_folder import RunFolder

from .conftest import start
from .tokenizer_files import byte_level, saved

STATE = RunState(step=20, elapsed_seconds=1.5, corpus_digest="abc")


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((2, 3), value), "b": torch.tensor(value)}


def metrics(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1 / step, "bits_per_byte": 1.5 / step, "bytes_read": 48 * step}


def save(run: RunFolder, step: int) -> None:
    run.save(tensors(step), tensors(-step), STATE.model_copy(update={"step": step}))


@pytest.fixture
def run(tmp_path: Path, tiny_train: TrainConfig) -> RunFolder:
    return RunFolder.create(tmp_path / "deep" / "run", tiny_train)


def test_what_was_saved_is_loaded(run: RunFolder, tiny_train: TrainConfig) -> None:
    for step in (20, 40, 100):
        save(run, step)
    again = RunFolder.open(run.path)
    assert again.config == tiny_train
    checkpoint = again.load()
    assert checkpoint.state.step == 100
    torch.testing.assert_close(checkpoint.model, tensors(100), rtol=0, atol=0)
    torch.testing.assert_close(checkpoint.optimizer, tensors(-100), rtol=0, atol=0)
    kept = [path.name for path in run.checkpoints()]
    assert kept == ["checkpoint-00000040", "checkpoint-00000100"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask that matters")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_all_files_have_the_permissions_of_other_files(
    tiny_train: TrainConfig, tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        trainer = start(tiny_train.model_copy(update={"steps": 1}), tmp_path / "run")
        trainer.train()
    finally:
        os.umask(before)
    modes = {
        path.relative_to(tmp_path).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    assert modes == dict.fromkeys(modes, mode)
    assert {"run/lock", "run/checkpoint-00000001/optimizer.safetensors"} <= set(modes)


class Killed(BaseException):
    """Stands for the process dying: no `except Exception` may stop it."""


@pytest.mark.parametrize("write", range(3))
@pytest.mark.parametrize("when", ["before", "after"])
def test_dying_between_two_files_leaves_the_checkpoint_before(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, write: int, when: str
) -> None:
    save(run, 20)
    done = 0

    def dying(function):  # type: ignore[no-untyped-def]
        def call(*arguments):  # type: ignore[no-untyped-def]
            nonlocal done
            if when == "before" and done == write:
                raise Killed
            function(*arguments)
            done += 1
            if when == "after" and done == write + 1:
                raise Killed

        return call

    with monkeypatch.context() as patch:
        for module, name in ((run_folder, "save_file"), (checkpoints, "write_text")):
            patch.setattr(module, name, dying(getattr(module, name)))
        with pytest.raises(Killed):
            save(run, 40)
    assert RunFolder.open(run.path).load().state.step == 20
    save(run, 40)
    assert RunFolder.open(run.path).load().state.step == 40
    assert not [path for path in run.path.iterdir() if path.name.endswith(".tmp")]


def make_genome(path: Path) -> None:
    fasta = path.with_name("genome.fa")
    fasta.write_text(">chr1\n" + "ACGTN" * 40 + "\n")
    shape = LongNetConfig(embed_dim=8, num_heads=1, num_layers=1, context=16, vocab_size=16)
    corpus = load_genome(GenomeConfig(fasta=str(fasta)), 16)
    GenomeTrainer.start(path, TrainConfig(model=shape, steps=1, batch_size=2), corpus)


def make_with_tokenizer(path: Path) -> None:
    folder = path.with_name("tokenizer")
    tokenizer = load_tokenizer(folder if folder.exists() else saved(byte_level(), folder))
    config = TrainConfig(model={"vocab_size": 320}, tokenizer=str(folder), steps=1)
    RunFolder.create(path, config, tokenizer)


def make_converted(path: Path) -> None:
    shape = LongNetConfig(embed_dim=8, num_heads=1, num_layers=1, context=16, vocab_size=8)
    write_run(path, LongNetLM(shape), ["<s>", "<pad>", "</s>", "<unk>", *"abcd"])


@pytest.mark.parametrize(
    ("make", "require_whole"),
    [
        (make_genome, genome_of),
        (make_with_tokenizer, lambda run: run.path.joinpath("tokenizer.json").stat()),
        (make_converted, RunFolder.load),
    ],
)
def test_a_folder_whose_making_dies_anywhere_is_no_run_or_the_whole_one(
    tmp_path: Path,
    tiny_train: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], None],
    require_whole: Callable[[RunFolder], object],
) -> None:
    """Where it is no run, one of another kind can be made there, and finds nothing of the first."""
    whole = [False]
    while len(whole) < 40:  # one more of its writes is done each time
        path, left = tmp_path / f"run{len(whole)}", len(whole)

        def dying(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", dying)
            try:
                make(path)
            except Killed:
                whole.append((path / "config.json").exists())
            else:
                break
        if whole[-1]:
            require_whole(RunFolder.open(path))
        else:
            RunFolder.create(path, tiny_train)
            names = {x.name for x in path.iterdir() if not x.name.endswith(".tmp")}
            assert names == {"config.json", "config.json.sha256"}
    assert 5 < len(whole) < 40
    assert whole == sorted(whole)
    assert whole.count(True) == 1  # the last one, when the folder's entries were to be made safe


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
def test_a_damaged_checkpoint_is_told_and_the_older_one_is_pointed_at(
    run: RunFolder, name: str, damage: str
) -> None:
    save(run, 20)
    save(run, 40)
    file = run.checkpoints()[-1] / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        # In safetensors the last byte is data, which only a checksum can tell.
        content[-1 if name != "state.json" else len(content) // 2] ^= 0x80
    elif damage == "cut":
        del content[-9:]
    else:
        content.clear()
    file.write_bytes(content)
    if damage == "remove":
        file.unlink()
    with pytest.raises(RunError, match=r"checkpoint-00000040' is damaged.*remove this folder") as e:
        run.load()
    assert "\n" not in str(e.value)
    shutil.rmtree(run.checkpoints()[-1])
    assert run.load().state.step == 20


def test_an_existing_folder_is_never_overwritten(run: RunFolder, tiny_train: TrainConfig) -> None:
    before = {path: path.read_bytes() for path in run.path.iterdir()}
    with pytest.raises(RunError, match="already exists"):
        RunFolder.create(run.path, tiny_train)
    with pytest.raises(RunError, match="already exists"):
        RunFolder.create(run.path / "config.json", tiny_train)
    assert {path: path.read_bytes() for path in run.path.iterdir()} == before


def test_what_is_no_run_folder_is_told(tmp_path: Path, run: RunFolder) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(RunError, match="not a run folder"):
        RunFolder.open(tmp_path)
    with pytest.raises(RunError, match="must be a folder"):
        RunFolder.open(run.path / "config.json")
    with pytest.raises(RunError, match="holds no checkpoint yet"):
        run.load()
    (run.path / "config.json").write_text('{"steps": 1, "colour": "red"}')
    with pytest.raises(RunError, match="colour"):
        RunFolder.open(run.path)


def test_metrics_are_cut_back_and_a_torn_line_is_dropped(run: RunFolder) -> None:
    for step in range(1, 8):
        run.append_metrics(metrics(step))
    with run.metrics_path.open("a") as file:
        file.write('{"step": 8, "lo')
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 3, 4, 5, 6, 7]
    run.truncate_metrics(5)
    run.append_metrics(metrics(6))
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 3, 4, 5, 6]
    assert run.read_metrics()[2]["loss"] == 1 / 3
