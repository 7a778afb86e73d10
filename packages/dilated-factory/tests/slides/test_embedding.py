"""`dilated slides embed`: what it writes, that it goes on, and slides that it leaves out."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dilated_factory import SlideEncoder, SlideEncoderConfig, save_gigapath, to_toml
from dilated_factory.cli import main
from dilated_factory.slides import embedding
from dilated_factory.training.embedding_files import read_embeddings

CONFIG = SlideEncoderConfig(
    tile_dim=5,
    embed_dim=16,
    num_heads=2,
    num_layers=2,
    segment_lengths=(16, 64),
    dilation_rates=(1, 2),
    grid_size=99,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint, its configuration, and features of five slides."""
    torch.manual_seed(0)
    save_gigapath(SlideEncoder(CONFIG), tmp_path / "encoder.pth")
    (tmp_path / "slide.toml").write_text(to_toml(CONFIG))
    (tmp_path / "features").mkdir()
    for index, length in enumerate((30, 7, 90, 1, 12)):
        content = {
            "features": torch.randn(length, 5),
            "coords": torch.randint(90, (length, 2)) * 512,
        }
        torch.save(content, tmp_path / "features" / f"slide{index}.pt")
    return tmp_path


def arguments(folder: Path, out: str, *more: str) -> list[str]:
    return [
        *("slides", "embed", str(folder / "features"), "--out", str(folder / out)),
        *("--checkpoint", str(folder / "encoder.pth"), "--config", str(folder / "slide.toml")),
        *("--tile-size", "512", *more),
    ]


def alone(folder: Path, index: int, *, pool: bool = True) -> np.ndarray[Any, Any]:
    model = SlideEncoder(CONFIG.model_copy(update={"global_pool": pool})).eval()
    saved = torch.load(folder / "encoder.pth")["model"]
    from dilated_factory.interop.torchscale import slide_names

    model.load_state_dict({n: saved[t] for n, t in slide_names(model.state_dict()).items()})
    slide = torch.load(folder / "features" / f"slide{index}.pt")
    with torch.no_grad():
        states = model(slide["features"], slide["coords"], tile_size=512)
    found: np.ndarray[Any, Any] = states[0][0].numpy()
    return found


@pytest.mark.parametrize("out", ["some.npz", "some.h5"])
@pytest.mark.parametrize("pool", ["tiles", "token"])
def test_each_slide_gets_the_embedding_that_it_has_alone(
    folder: Path, out: str, pool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if out.endswith("h5"):
        pytest.importorskip("h5py", reason="h5py, of the extra slides, is not installed")
    assert main(arguments(folder, out, "--pool", pool, "--max-tiles", "40")) == 0
    assert "5 of 5 slides" in capsys.readouterr().out
    names, embeddings = read_embeddings(folder / out)
    assert names == [f"slide{i}" for i in range(5)]
    assert embeddings.shape == (5, 16)
    for index, found in enumerate(embeddings):
        expected = alone(folder, index, pool=pool == "tiles")
        assert np.abs(found - expected).max() < 1e-4
    assert not (folder / f"{out}.parts").exists()


def test_all_layers_end_before_the_last_norm(folder: Path) -> None:
    assert main(arguments(folder, "all.npz", "--all-layers", "--pool", "tiles")) == 0
    assert read_embeddings(folder / "all.npz")[1].shape == (5, 3, 16)


def test_a_stopped_command_goes_on_and_later_files_are_added(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = embedding.embed, []

    def counted(model: Any, slides: Any, how: Any) -> Any:
        calls.extend(slide.name for slide in slides)
        if stop and len(calls) > 2:
            raise KeyboardInterrupt
        return real(model, slides, how)

    monkeypatch.setattr(embedding, "embed", counted)
    stop = True
    options = ("--max-tiles", "1", "--pool", "tiles")
    assert main(arguments(folder, "some.npz", *options)) == 130
    assert calls == ["slide0", "slide1", "slide2"]
    assert not (folder / "some.npz").exists()
    stop = False
    calls.clear()
    for file in (folder / "some.npz.parts").iterdir():
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        capsys.readouterr()
        assert main(arguments(folder, "some.npz", *options)) == 2
        error = capsys.readouterr().err
        assert file.name in error
        assert error.count("\n") == 1
        file.write_bytes(content)
    assert main(arguments(folder, "some.npz", *options)) == 0
    assert calls == ["slide2", "slide3", "slide4"]
    calls.clear()
    slide = torch.load(folder / "features" / "slide0.pt")
    torch.save(slide, folder / "features" / "again.pt")
    assert main(arguments(folder, "some.npz", *options)) == 0
    assert calls == ["again"]
    names, embeddings = read_embeddings(folder / "some.npz")
    assert names == ["again", *(f"slide{i}" for i in range(5))]
    assert np.array_equal(embeddings[0], embeddings[1])


def test_a_file_of_features_that_was_replaced_is_embedded_again(folder: Path) -> None:
    assert main(arguments(folder, "some.npz", "--pool", "tiles")) == 0
    _, before = read_embeddings(folder / "some.npz")
    other = torch.load(folder / "features" / "slide2.pt")
    torch.save(other, folder / "features" / "slide3.pt")
    (folder / "features" / "slide4.pt").write_bytes(b"no features")
    assert main(arguments(folder, "some.npz", "--pool", "tiles")) == 1
    names, after = read_embeddings(folder / "some.npz")
    assert names == ["slide0", "slide1", "slide2", "slide3"]  # and not what slide4 was before
    assert np.array_equal(after[:3], before[:3])
    assert np.abs(after[3] - alone(folder, 2)).max() < 1e-4


def test_slides_that_cannot_be_embedded_are_told_and_the_others_go_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = folder / "features"
    torch.save({"features": torch.zeros(0, 5), "coords": torch.zeros(0, 2)}, features / "no.pt")
    torch.save({"features": torch.zeros(2, 6), "coords": torch.zeros(2, 2)}, features / "wide.pt")
    torch.save({"features": torch.ones(2, 5), "coords": torch.ones(2, 2) * -7}, features / "out.pt")
    torch.save(torch.ones(2, 5), features / "bare.pt")
    (features / "broken.pt").write_bytes(b"x")
    assert main(arguments(folder, "some.npz", "--pool", "tiles")) == 1
    told = capsys.readouterr().out
    for line in (
        "no: no has no tiles",
        "wide: tiles must have shape",
        "out: coords must be in",
        "bare: bare has no coordinates",
        "broken: ",
        "5 of 10 slides",
    ):
        assert line in told
    assert len(read_embeddings(folder / "some.npz")[0]) == 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--out", "x.csv"], r"--out must end in .h5 or .npz. Got 'x.csv'"),
        (["--config", "encoder.pth"], "must end in .json or .toml"),
        (["--checkpoint", "none.pth"], "--checkpoint 'none.pth' cannot be used: No such file"),
        (["--config=none.toml"], "--config 'none.toml' cannot be used: No such file"),
        (["--config", "none.toml"], "--config 'none.toml' cannot be used: No such file"),
        (["--checkpoint", "features"], "--checkpoint 'features' cannot be used: Is a directory"),
        (["--dtype", "float64"], "float64"),
        (["--device", "tpu9"], "device 'tpu9' is not available"),
        (["--tile-size", "0"], "tile_size must be positive"),
        (["--checkpoint", "slide.toml"], "slide.toml"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, change: list[str], says: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    assert main(arguments(folder, "some.npz", "--pool", "tiles", *change)) == 2
    error = capsys.readouterr().err
    assert says.replace("\\", "") in error
    assert error.count("\n") == 1


def test_other_settings_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "some.npz", "--pool", "tiles")) == 0
    assert main(arguments(folder, "some.npz", "--pool", "token")) == 2
    assert "was made with another config: take another --out" in capsys.readouterr().err
    torch.save(torch.load(folder / "features" / "slide0.pt"), folder / "slide0.pt")
    twice = arguments(folder, "more.npz", str(folder / "slide0.pt"))
    assert main(twice) == 2
    assert "different names. Got twice: slide0" in capsys.readouterr().err


@pytest.mark.distributed
def test_processes_share_the_slides(folder: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*run, "-m", "dilated_factory", *arguments(folder, "some.npz", "--pool", "tiles")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 of 5 slides") == 1
    names, embeddings = read_embeddings(folder / "some.npz")
    assert names == [f"slide{i}" for i in range(5)]
    assert np.abs(embeddings[2] - alone(folder, 2)).max() < 1e-4


def change(folder: Path, index: int) -> Path:
    path = folder / "features" / f"slide{index}.pt"
    content = torch.load(path)
    content["features"] = content["features"] + 1
    torch.save(content, path)
    return path


def is_current(folder: Path, index: int) -> bool:
    names, embeddings = read_embeddings(folder / "some.npz")
    return bool(
        np.allclose(embeddings[names.index(f"slide{index}")], alone(folder, index), 0, 1e-5)
    )


def test_a_slide_that_changes_while_others_are_embedded_is_embedded_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join = embedding._join

    def late(*rest: Any) -> None:
        change(folder, 2)
        join(*rest)

    command = arguments(folder, "some.npz", "--pool", "tiles")
    with monkeypatch.context() as patched:
        patched.setattr(embedding, "_join", late)
        assert main(command) == 0
    assert not is_current(folder, 2)
    assert main(command) == 0
    assert is_current(folder, 2)


def test_a_later_embedding_wins_though_the_clock_went_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*rest: Any) -> None:
        raise KeyboardInterrupt

    command = arguments(folder, "some.npz", "--pool", "tiles")
    with monkeypatch.context() as patched:
        patched.setattr(embedding, "_join", stop)
        assert main(command) == 130
    for part in (folder / "some.npz.parts").glob("*.npz"):
        later = part.stat().st_mtime_ns + 10**12
        os.utime(part, ns=(later, later))
    os.utime(change(folder, 1), ns=(later + 1, later + 1))
    assert main(command) == 0
    assert is_current(folder, 1)
