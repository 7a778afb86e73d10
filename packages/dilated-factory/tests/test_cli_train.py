"""`dilated train`: settings from options, files and other runs, and what it writes beside."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dilated_factory import LongNetConfig, TrainConfig, to_toml
from dilated_factory.cli import main
from dilated_factory.cli.app import load_command
from dilated_factory.configs.pattern import default_pattern
from dilated_factory.training.run_folder import RunFolder
from dilated_factory.training.weights import initial_model

from .conftest import TINY_OPTIONS, losses
from .test_cli import Captured, complaint, run

NARROW = ("--embed-dim", 16, "--num-heads", 1, "--num-layers", 2)


def config_of(out: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((out / "config.json").read_text())
    return read


def test_every_field_has_an_option_that_says_what_it_is() -> None:
    options = {name: option for option in load_command("train").params for name in option.opts}
    own = {"kind", "model", "paths", "parent"}
    for kind in (TrainConfig, LongNetConfig):
        for name, field in kind.model_fields.items():
            if name not in own:
                assert field.description
                assert (
                    options[f"--{name.replace('_', '-')}"]
                    .help[1:]
                    .startswith(field.description[1:])
                )
    assert "default: 8192" in options["--context"].help


def test_options_reach_the_configuration(
    capsys: Captured, corpus_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = {
        "--ffn-dim": 24,
        "--rotary-base": 500.0,
        "--layer-norm-eps": 1e-6,
        "--dropout": 0.25,
        "--micro-batch-size": 1,
        "--optimizer": "adamw",
        "--schedule": "wsd",
        "--decay": 0.5,
        "--warmup-steps": 1,
        "--weight-decay": 0.0,
        "--gradient-clip": 1.0,
        "--validate-every": 2,
        "--validation-bytes": 96,
        "--recompute": "all",
        "--validation-fraction": 0.1,
        "--seed": 3,
    }
    flat = [str(part) for pair in options.items() for part in pair]
    train = ("train", corpus_folder, "--out", out, "--steps", 2, *TINY_OPTIONS, *flat)
    code, said, _ = run(capsys, *train, "--no-tie-embeddings")
    assert code == 0
    assert "held out)" in said
    assert "least on held-out bytes: " in said
    stored = config_of(out)
    assert stored["model"]["tie_embeddings"] is False
    for option, value in options.items():
        name = option[2:].replace("-", "_")
        assert {**stored, **stored["model"]}[name] == value, name
    code, said, _ = run(capsys, "evaluate", out, "--contexts", "16", "--best")
    assert code == 0


def test_a_dtype_is_chosen_for_a_new_run_and_kept_by_an_old_one(
    capsys: Captured, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ("train", corpus_folder, "--device", "cpu", "--steps", 1, *TINY_OPTIONS, "--out")
    for flag, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flag=flag: {"avx512_bf16": flag})
        out = tmp_path / dtype
        assert run(capsys, *train, out)[0] == 0
        assert config_of(out)["dtype"] == dtype
    resume = ("train", "--resume", "--out", tmp_path / "bfloat16", "--dtype")
    assert run(capsys, *resume, "auto")[0] == 0
    assert "dtype is 'bfloat16' there and 'float32' here" in complaint(capsys, *resume, "float32")


def test_a_run_from_a_file_is_that_of_the_options(
    capsys: Captured, corpus_folder: Path, tmp_path: Path
) -> None:
    options = (*TINY_OPTIONS, "--steps", 3, "--dtype", "float32")
    assert run(capsys, "train", corpus_folder, "--out", tmp_path / "a", *options)[0] == 0
    first = RunFolder.open(tmp_path / "a")
    file = tmp_path / "run.toml"
    text = to_toml(first.config).replace(str(corpus_folder), "../" * 40 + str(corpus_folder))
    file.write_text(text)
    assert run(capsys, "train", "--config", file, "--out", tmp_path / "b")[0] == 0
    second = RunFolder.open(tmp_path / "b")
    assert second.config == first.config
    assert losses(second.read_metrics()) == losses(first.read_metrics())
    # Options change what the file says, one duration the other.
    changed = ("--config", file, "--minutes", 0.0001, "--seed", 9, "--out", tmp_path / "c")
    assert run(capsys, "train", *changed)[0] == 0
    third = config_of(tmp_path / "c")
    assert (third["seed"], third["steps"], third["minutes"]) == (9, None, 0.0001)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('kind = "pool"', "must be of kind 'train'. Got 'pool'"),
        ("stepps = 3", "Did you mean 'steps'?"),
        ("steps = 0", "steps"),
        ("model = 3", "model must be a table. Got 3."),
        ("[model]\nembed_dims = 3", "Did you mean 'embed_dim'?"),
        ("paths = 3", "paths must be a list of strings. Got 3."),
        ("steps = ", "is not valid TOML"),
    ],
)
def test_a_bad_file_is_one_line(capsys: Captured, tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    out = tmp_path / "run"
    assert says in complaint(capsys, "train", "--config", file, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--micro-batch-size", "2"], "micro_batch_size must divide batch_size (3). Got 2."),
        (["--schedule", "square"], "'--schedule'"),
        (["--optimizer", "sgd"], "'--optimizer'"),
        (["--recompute", "some"], "'--recompute'"),
        (["--compile", "maybe"], "'--compile'"),
        (["--steps", "3", "--warmup-steps", "3"], "warmup_steps must be less than steps (3)"),
        (
            ["--steps", "3", "--context", "32", "--short-context", "5"],
            "short_context must be a part of context (32) that divides it. Got 5.",
        ),
        (
            ["--steps", "3", "--context", "32", "--short-context", "32"],
            "short_context must be a part of context (32) that divides it. Got 32.",
        ),
        (
            ["--steps", "3", "--short-share", "0.5"],
            "short_share must be given with short_context only",
        ),
        (
            ["--minutes", "1", "--context", "32", "--short-context", "16"],
            "short_context must be none without steps. Got 16.",
        ),
        (["--validate-every", "0"], "validate_every"),
        (["--config", "x.toml", "--from", "y"], "--config and --from must not be given together"),
        (["--from", "nowhere"], "'nowhere' is not a run folder"),
        (["--resume", "--from", "nowhere"], "no --config and no --from"),
    ],
)
def test_a_bad_option_is_one_line(
    capsys: Captured, corpus_folder: Path, tmp_path: Path, options: list[str], says: str
) -> None:
    out = tmp_path / "run"
    assert says in complaint(capsys, "train", corpus_folder, "--out", out, *TINY_OPTIONS, *options)
    assert not out.exists()


def test_a_run_goes_on_from_another_as_a_new_one(
    capsys: Captured, corpus_folder: Path, tmp_path: Path
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    model = (*NARROW, "--context", 48, "--dtype", "float32", "--short-context", 24)
    assert run(capsys, "train", corpus_folder, *model, "--out", old, "--steps", 30)[0] == 0
    train = ("train", "--from", old, "--out", new, "--steps", 4, "--learning-rate", "1e-4")
    assert run(capsys, *train, "--context", 96)[0] == 0
    before, after = RunFolder.open(old), RunFolder.open(new)
    config = after.config
    assert config.parent is not None
    assert (Path(config.parent.run), config.parent.step) == (old, 30)
    assert (config.steps, config.learning_rate, config.seed) == (4, 1e-4, 1)
    assert config.paths == before.config.paths
    assert config.model.pattern == default_pattern(96)
    assert (before.config.short_context, config.short_context) == (24, None)
    # It begins where the other ended, and not with new weights.
    first, last = losses(after.read_metrics())[0], losses(before.read_metrics())[-5:]
    assert first < max(last) + 0.3
    inherited = load_start(after)
    assert torch.equal(inherited, before.load().model["embedding.weight"])
    assert not torch.equal(inherited, initial_model(config).embedding.weight)


def load_start(run: RunFolder) -> torch.Tensor:
    """The embedding at step 0 of a run that was made again, and killed before its first step."""
    from dilated_factory.training.corpus import load_corpus
    from dilated_factory.training.loop import Trainer

    again = run.path.with_name("again")
    Trainer.start(again, run.config, load_corpus(run.config.paths))
    stored = RunFolder.open(again).load()
    assert stored.state.step == 0
    assert any(name.endswith("momentum_buffer") for name in stored.optimizer)
    return stored.model["embedding.weight"]


def test_a_parent_that_does_not_fit_is_one_line(
    capsys: Captured, finished_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train = ("train", "--from", finished_run, "--out", out, "--steps", 2)
    said = complaint(capsys, *train, "--embed-dim", 32)
    assert "do not fit: embed_dim is 16 there and 32 here; hidden_dim is 64 there" in said
    assert not out.exists()
    # Another optimizer has no use for the state of the first.
    assert run(capsys, *train, "--optimizer", "adamw")[0] == 0
    # A pattern of one's own stays.
    assert config_of(out)["model"]["segment_lengths"] == [8, 32]


def test_profile_writes_a_trace_and_prints_a_table(
    capfd: pytest.CaptureFixture[str], corpus_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train = ["train", str(corpus_folder), "--out", str(out), "--steps", "12", *TINY_OPTIONS]
    assert main([*train, "--profile", "--device", "cpu"]) == 0
    said = capfd.readouterr().out
    assert "Self CPU time total" in said
    events = json.loads((out / "trace-0.json").read_text())["traceEvents"]
    assert any("aten::" in event.get("name", "") for event in events)


def test_tensorboard_without_its_package_says_how_to_install_it(
    capsys: Captured, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train = ("train", corpus_folder, "--steps", 2, *TINY_OPTIONS, "--tensorboard", "--out")
    said = complaint(capsys, *train, tmp_path / "run")
    assert (
        "--tensorboard needs tensorboard, which is not installed: pip install tensorboard" in said
    )
    assert not (tmp_path / "run").exists()


def test_tensorboard_is_told_the_numbers_of_each_step(
    capsys: Captured, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder == str(tmp_path / "run" / "tensorboard")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

        def close(self) -> None:
            told.append(("closed", 0.0, 0))

    fake = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    train = ("train", corpus_folder, "--steps", 4, "--validate-every", 2, *TINY_OPTIONS)
    assert run(capsys, *train, "--tensorboard", "--out", tmp_path / "run")[0] == 0
    lines = RunFolder.open(tmp_path / "run").read_metrics()
    expected = [
        (name, value, line["step"])
        for line in lines
        for name, value in line.items()
        if name != "step"
    ]
    assert told == [*expected, ("closed", 0.0, 0)]
    assert sum(name == "validation_bits_per_byte" for name, _, _ in told) == 2
