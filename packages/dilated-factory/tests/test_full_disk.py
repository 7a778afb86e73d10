"""A disk that is full, stood for by a limit on the size of files: one line, and no tracebacks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dilated_factory import SlideEncoder, SlideEncoderConfig, TrainConfig, save_gigapath
from dilated_factory.cli import main
from dilated_factory.training.lock import FolderLock
from dilated_factory.training.run_folder import RunFolder
from dilated_factory.training.shards import save_shards

from .conftest import start
from .test_run_folder import make_converted, make_genome, make_with_tokenizer

resource = pytest.importorskip("resource", reason="this system has no limits on files")


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_does_not_fit_is_one_line_and_training_goes_on_later(
    tiny_train: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = start(tiny_train, tmp_path / "run")
    trainer.train(should_stop=lambda: trainer.step == 2)
    resume = ["train", "--resume", "--out", str(tmp_path / "run"), "--checkpoint-every", "1"]
    newest = trainer.run.checkpoints()[-1]
    for name in ("model.safetensors", "optimizer.safetensors"):
        with full_after((newest / name).stat().st_size - 1):
            assert main(resume) == 2
        said = capsys.readouterr().err
        assert said.startswith("dilated: error: ")
        assert "safetensors' cannot be written: " in said
        assert said.count("\n") == 1
        assert trainer.run.checkpoints()[-1] == newest
    assert main(resume) == 0
    assert len(RunFolder.open(tmp_path / "run").read_metrics()) == tiny_train.steps


@pytest.mark.parametrize("make", [make_genome, make_with_tokenizer, make_converted])
def test_a_run_folder_that_does_not_fit_leaves_nothing(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "before")  # and what is read
    largest = tmp_path / "before" / "config.json"
    with full_after(largest.stat().st_size - 1), pytest.raises(OSError):  # noqa: PT011  # the system's own words
        make(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_that_do_not_fit_are_an_error_of_the_disk(tmp_path: Path, ending: str) -> None:
    shape = SlideEncoderConfig(
        tile_dim=5, embed_dim=16, num_heads=2, num_layers=1, segment_lengths=(16,),
        dilation_rates=(1,), grid_size=9,
    )  # fmt: skip
    path = tmp_path / f"encoder.{ending}"
    with full_after(1000), pytest.raises(OSError, match=f"encoder.{ending}' cannot be written"):
        save_gigapath(SlideEncoder(shape), path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_parts_that_do_not_fit_are_an_error_of_the_disk(tmp_path: Path) -> None:
    with full_after(1000), pytest.raises(OSError, match="cannot be written: "):
        save_shards(tmp_path / "parts", {"x": torch.zeros(10_000)})


def test_a_lock_holds_even_where_its_holder_cannot_be_named(tmp_path: Path) -> None:
    with full_after(0):
        lock = FolderLock(tmp_path)
        with pytest.raises(BlockingIOError):
            FolderLock(tmp_path)
    lock.release()
    FolderLock(tmp_path).release()
