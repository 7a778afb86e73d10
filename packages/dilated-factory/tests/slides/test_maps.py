"""Heat maps and linear probes, from Python and from the command line."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from dilated_factory import (
    SlideClassifier,
    SlideEncoder,
    SlideEncoderConfig,
    save_gigapath,
    to_toml,
)
from dilated_factory.cli import main
from dilated_factory.configs.slides import SlideTaskConfig
from dilated_factory.errors import InputError
from dilated_factory.slides import maps, tasks
from dilated_factory.slides.maps import tile_weights

CONFIG = SlideEncoderConfig(
    tile_dim=5,
    embed_dim=16,
    num_heads=2,
    num_layers=2,
    segment_lengths=(16, 64),
    dilation_rates=(1, 2),
    global_pool=True,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weights, a fold of a classifier, and a slide of a full grid of 6 x 4 tiles."""
    torch.manual_seed(0)
    encoder = SlideEncoder(CONFIG)
    save_gigapath(encoder, tmp_path / "encoder.pth")
    (tmp_path / "slide.toml").write_text(to_toml(CONFIG))
    fold = tmp_path / "fold0"
    fold.mkdir()
    save_gigapath(SlideClassifier(encoder, 3), fold / "best.pth")
    task = SlideTaskConfig(
        table="x", features=("x",), task="multiclass", labels=("x",), encoder=CONFIG
    )
    (fold / "config.json").write_text(task.model_dump_json())
    cells = torch.cartesian_prod(torch.arange(6), torch.arange(4))
    content = {"features": torch.randn(24, 5), "coords": cells * 512 + 5120, "tile_size": 512}
    torch.save(content, tmp_path / "case.pt")
    return tmp_path


def test_a_gradient_is_what_the_output_loses_without_a_tile(folder: Path) -> None:
    torch.manual_seed(1)
    model = SlideClassifier(SlideEncoder(CONFIG), 3, freeze=True).eval().double()
    tiles, coords = torch.randn(24, 5).double(), torch.randint(99, (24, 2)) * 256
    found = tile_weights(model, (tiles, coords, 256.0), "gradient", output=1)
    step = 1e-2  # not smaller, because the GELU is rounded to float32
    for tile in (0, 7, 23):
        less, more = tiles.clone(), tiles.clone()
        less[tile] *= 1 - step
        more[tile] *= 1 + step
        with torch.no_grad():
            change = (model(more, coords) - model(less, coords))[0, 1] / (2 * step)
        assert found[tile].item() == pytest.approx(change.item(), rel=1e-3, abs=1e-7)
    largest = model(tiles, coords)[0].argmax().item()
    by_default = tile_weights(model, (tiles, coords, 256.0), "gradient")
    assert torch.equal(
        by_default, tile_weights(model, (tiles, coords, 256.0), "gradient", output=int(largest))
    )
    with pytest.raises(InputError, match=r"output must be in \[0, 2\]. Got 3"):
        tile_weights(model, (tiles, coords, 256.0), "gradient", output=3)
    assert model.freeze


def test_attention_is_the_mean_over_heads_of_a_layer(folder: Path) -> None:
    model = SlideEncoder(CONFIG).eval()
    tiles, coords = torch.randn(24, 5), torch.randint(99, (24, 2)) * 256
    found = tile_weights(model, (tiles, coords, 256.0), "attention", layer=0)
    expected = model.tile_attention(tiles, coords, layer=0, tile_size=256.0)[0].mean(0)
    assert torch.equal(found, expected)
    assert not torch.equal(found, tile_weights(model, (tiles, coords, 256.0), "attention"))


@pytest.mark.parametrize("by", ["attention", "gradient"])
@pytest.mark.parametrize("source", ["run", "checkpoint"])
def test_a_map_is_drawn_from_the_command_line(
    by: str, source: str, folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    drawn: list[np.ndarray] = []  # type: ignore[type-arg] # of floats
    from matplotlib.axes import Axes

    real = Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda self, field, **how: drawn.append(field) or real(self, field, **how)
    )
    out = folder / "case.png"
    options = ["--run", str(folder / "fold0")]
    if source == "checkpoint":
        options = [
            "--checkpoint",
            str(folder / "encoder.pth"),
            "--config",
            str(folder / "slide.toml"),
        ]
    code = main(["slides", "map", str(folder / "case.pt"), "--out", str(out), "--by", by, *options])
    if (by, source) == ("gradient", "checkpoint"):
        assert code == 2
        assert "needs a trained classifier" in capsys.readouterr().err
        return
    assert code == 0
    assert "24 tiles" in capsys.readouterr().out
    assert imread(out).shape[0] > 300
    (field,) = drawn
    assert field.shape == (4, 6)  # x to the right, y down
    assert np.isfinite(field).all()
    if by == "attention":
        assert sorted(field.flatten()) == pytest.approx(np.arange(24) / 23)


def test_ranks_and_places_are_where_they_belong(tmp_path: Path) -> None:
    coords = torch.tensor([[512, 512], [2048, 512], [512, 1024]])
    maps.draw_map(tmp_path / "x.png", coords, 512.0, torch.tensor([0.1, 0.3, 0.2]), "x")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ([], "one of --run and --checkpoint must be given"),
        (["--run", "fold0", "--checkpoint", "encoder.pth"], "one of --run and --checkpoint"),
        (["--run", "nowhere"], "nowhere"),
        (["--run", "fold0", "--layer", "2"], "layer must be in [-2, 1]. Got 2"),
        (["--run", "fold0", "--by", "gradient", "--output", "7"], "output must be in [0, 2]"),
        (["--run", "fold0", "--out", "x.jpg"], "--out must end in .png"),
        (["--run", "fold0", "--tile-size", "0"], "tile_size must be positive"),
    ],
)
def test_bad_input_of_a_map_is_one_line_and_exit_code_2(
    change: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    assert main(["slides", "map", "case.pt", "--out", "case.png", *change]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel", "regression"])
def test_a_probe_tells_what_embeddings_know(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn, of the extra slides, is not installed")
    monkeypatch.setattr(tasks, "RESAMPLES", 50)
    generator = np.random.default_rng(0)
    features = generator.standard_normal((60, 8)).astype(np.float32)
    names = [f"s{i}" for i in range(60)]
    np.savez(tmp_path / "e.npz", embeddings=features, names=names, settings="{}")
    known, unknown = features[:, 0] > 0, generator.random(60) > 0.5
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        rows = [[f"s{i}", int(known[i]), int(unknown[i]), features[i, 1]] for i in range(60)]
        csv.writer(file).writerows(
            [["slide", "known", "unknown", "value"], *rows, ["s99", 1, 1, 1]]
        )
    labels = {"multilabel": ["known", "unknown"], "regression": ["value"]}.get(task, ["known"])
    told = [word for label in labels for word in ("--label", label)]
    files = [str(tmp_path / "e.npz"), str(tmp_path / "labels.csv")]
    assert main(["slides", "probe", *files, *told, "--task", task]) == 0
    out = capsys.readouterr().out
    assert "1 slides have no embedding: s99" in out
    assert "60 slides, 8 numbers each" in out
    shown = float(next(line for line in out.splitlines() if "all" in line).split("│")[2].split()[0])
    assert shown > (0.5 if task == "multilabel" else 0.9)
    if task == "binary":
        assert main(["slides", "probe", *files, "--label", "unknown", "--task", task]) == 0
        out = capsys.readouterr().out
        row = next(line for line in out.splitlines() if "all" in line)
        assert float(row.split("│")[2].split()[0]) < 0.75
        assert main(["slides", "probe", *files, "--label", "nothing"]) == 2
        assert "must have a column 'nothing'" in capsys.readouterr().err
        assert main(["slides", "probe", files[1], files[1], "--label", "known"]) == 2
