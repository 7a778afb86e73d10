"""Run folders from anywhere: what is not as it was written is told in one line, never obeyed."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dilated_factory import InputError, RunError, TrainConfig
from dilated_factory.cli import main
from dilated_factory.configs.files import MOST_BYTES, read_values
from dilated_factory.training.corpus import _EARLIER, _load, load_corpus
from dilated_factory.training.loop import Trainer
from dilated_factory.training.run_folder import MOST_LINE_BYTES, RunFolder
from dilated_factory.training.shards import read_shards

from .conftest import TINY_OPTIONS, start

CHECKPOINT = "checkpoint-00000003"
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def original(tiny_train: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "original"
    trainer = start(tiny_train, path)
    trainer.train(should_stop=lambda: trainer.step == 3)
    return path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "run"))


def restore(folder: Path) -> Trainer:
    run = RunFolder.open(folder)
    trainer = Trainer(run, load_corpus(run.config.paths))
    trainer.restore()
    trainer._leave_folder()
    return trainer


def without_new_checksums(folder: Path) -> None:
    """Make it as folders were before all files had checksums."""
    for file in folder.rglob("*.sha256"):
        file.unlink()
    state = folder / CHECKPOINT / "state.json"
    values = json.loads(state.read_bytes())
    del values["metrics_digest"]
    state.write_text(json.dumps(values))


def repaired(folder: Path) -> None:
    """Give all files the checksums of what they hold now."""
    state = folder / CHECKPOINT / "state.json"
    values = json.loads(state.read_bytes())
    for name in values["checksums"]:
        content = (folder / CHECKPOINT / name).read_bytes()
        values["checksums"][name] = hashlib.sha256(content).hexdigest()
    state.write_text(json.dumps(values))
    (folder / CHECKPOINT / "state.json.sha256").unlink(missing_ok=True)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(RunError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_without_the_newer_checksums_is_resumed(folder: Path, original: Path) -> None:
    without_new_checksums(folder)
    again, expected = restore(folder), restore(original)
    assert again.step == 3
    torch.testing.assert_close(again.model.state_dict(), expected.model.state_dict())


@pytest.mark.parametrize("name", ["config.json", f"{CHECKPOINT}/state.json"])
def test_a_changed_number_in_a_valid_range_is_told(folder: Path, name: str) -> None:
    file = folder / name
    before = file.read_text()
    changed = before.replace('"batch_size": 3', '"batch_size": 2')
    file.write_text(changed.replace('"elapsed_seconds": ', '"elapsed_seconds": 9'))
    assert file.read_text() != before
    said = refused(lambda: restore(folder))
    assert ".json.sha256" in said
    (folder / f"{name}.sha256").unlink()  # as it says
    restore(folder)


@pytest.mark.parametrize("line", [0, 1, 2])
def test_every_changed_byte_of_the_metrics_that_counts_is_told(folder: Path, line: int) -> None:
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    for at in range(0, len(lines[line]) - 1, 7):
        torn = bytearray(lines[line])
        torn[at] ^= 1
        file.write_bytes(b"".join([*lines[:line], torn, *lines[line + 1 :]]))
        said = refused(lambda: restore(folder))
        assert "metrics.jsonl' is damaged" in said
        assert "remove it to go on without them" in said
    file.unlink()
    assert restore(folder).step == 3


@pytest.mark.parametrize(
    "line",
    [
        b"null",
        b"7",
        b"[]",
        b"{}",
        b'{"step": "2", "loss": 1.0, "bits_per_byte": 1.0, "bytes_read": 1}',
        b'{"step": 2, "loss": true, "bits_per_byte": 1.0, "bytes_read": 1}',
        b'{"step": 2, "loss": 1.0, "bits_per_bite": 1.0, "bytes_read": 1}',
        b'{"step": 3, "loss": 1.0, "bits_per_byte": 1.0, "bytes_read": 1}',
        b"[" * 60_000,
        b'{"step": ' + b"9" * 6_000 + b"}",
        b"\xff",
        b" " * (MOST_LINE_BYTES + 1),
    ],
    ids=lambda line: line[:12].decode("latin-1"),
)
def test_a_line_that_is_not_the_metrics_of_the_next_step_is_told(folder: Path, line: bytes) -> None:
    without_new_checksums(folder)
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([lines[0], line, lines[2], b""]))
    assert "line 2 is not" in refused(lambda: restore(folder))


def test_only_the_checkpoints_own_regular_files_are_opened(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"secret")
    state = folder / CHECKPOINT / "state.json"
    original = json.loads(state.read_bytes())
    (folder / CHECKPOINT / "state.json.sha256").unlink()
    for name in ("../../secret.safetensors", str(secret), "pipe", "", "state.json"):
        checksums = original["checksums"] | {name: hashlib.sha256(b"secret").hexdigest()}
        state.write_text(json.dumps(original | {"checksums": checksums}))
        assert "tensor files are not those" in refused(lambda: restore(folder))
    state.write_text(json.dumps(original | {"checksums": {}}))
    assert "tensor files are not those" in refused(lambda: restore(folder))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes in folders")
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "config.json.sha256",
        "metrics.jsonl",
        *(
            f"{CHECKPOINT}/{each}"
            for each in ("state.json", "state.json.sha256", "model.safetensors")
        ),
    ],
)
def test_a_pipe_in_place_of_a_file_is_told_and_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "must be a regular file" in refused(lambda: restore(folder))


def test_a_configuration_of_any_size_is_read_up_to_a_bound(folder: Path, tmp_path: Path) -> None:
    for file in (folder / "config.json", tmp_path / "any.json", tmp_path / "any.toml"):
        file.write_bytes(b" " * (MOST_BYTES + 1))
    assert "at most 1,048,576 bytes" in refused(lambda: restore(folder))
    for name in ("any.json", "any.toml"):
        with pytest.raises(InputError, match="at most 1,048,576 bytes"):
            read_values(tmp_path / name)
    (tmp_path / "any.json").write_text('{"a": ' + "9" * 6000 + "}")
    with pytest.raises(InputError, match="is not valid JSON"):
        read_values(tmp_path / "any.json")
    (tmp_path / "any.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is not valid JSON"):
        read_values(tmp_path / "any.json")


def test_a_lock_that_is_a_link_does_not_empty_what_it_points_at(
    folder: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("all of it")
    (folder / "lock").unlink()
    (folder / "lock").symlink_to(precious)
    with pytest.warns(UserWarning, match="cannot be locked"):
        assert RunFolder.open(folder).lock() is None
    assert precious.read_text() == "all of it"


def header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        header(b""),
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        header(b"{" * 5000),
        header(b"[" * 90_000),
        header(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}') + bytes(4),
        header(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}') + bytes(4),
        b"\x80\x04cos\nsystem\n.",
    ],
    ids=range(10),
)
def test_a_file_that_is_no_safetensors_is_told(
    folder: Path, capsys: Captured, name: str, content: bytes
) -> None:
    (folder / CHECKPOINT / name).write_bytes(content)
    repaired(folder)
    for command in (["train", "--resume", "--out", str(folder)], ["generate", str(folder)]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith("dilated: error: ")
        assert said.count("\n") == 1


def edited(folder: Path, name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / CHECKPOINT / name
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    repaired(folder)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.pop(next(n for n in t if n.endswith("/momentum_buffer"))), "is missing"),
        (lambda t: t.pop("embedding.weight/exp_avg"), "embedding.weight/exp_avg is missing"),
        (lambda t: t.update({"nothing/exp_avg": torch.ones(2)}), "nothing/exp_avg is of no"),
        (lambda t: t.update({"noslash": torch.ones(2)}), "noslash is of no parameter"),
        (lambda t: t.update({"embedding.weight/other": torch.ones(2)}), "other is of no parameter"),
        (
            lambda t: t.update({"embedding.weight/exp_avg": torch.ones(2, 3)}),
            "must be torch.float32",
        ),
        (lambda t: t.update({"embedding.weight/exp_avg": torch.ones(())}), "must be torch.float32"),
        (
            lambda t: t.update({"embedding.weight/exp_avg": t["embedding.weight/exp_avg"].half()}),
            "Got torch.float16",
        ),
        (
            lambda t: t.update({"embedding.weight/exp_avg": t["embedding.weight/exp_avg"].int()}),
            "Got torch.int32",
        ),
        (lambda t: t.update({"embedding.weight/step": torch.tensor(3)}), "Got torch.int64"),
        (lambda t: t["embedding.weight/step"].fill_(0), "at least 1"),
        (lambda t: t["embedding.weight/step"].fill_(-3), "at least 1"),
        (lambda t: t["embedding.weight/exp_avg"].fill_(torch.nan), "must be finite"),
    ],
    ids=range(13),
)
def test_an_optimizer_that_is_not_this_models_is_told(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], says: str
) -> None:
    edited(folder, "optimizer.safetensors", edit)
    said = refused(lambda: restore(folder))
    assert "does not fit its configuration" in said
    assert says in said


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_told_by_every_command(
    folder: Path, capsys: Captured, number: float
) -> None:
    edited(folder, "model.safetensors", lambda t: t["norm.weight"].fill_(number))
    for command in (
        ["train", "--resume", "--out", str(folder)],
        ["generate", str(folder)],
        ["evaluate", str(folder), "--contexts", "16"],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "weights of the checkpoint must be finite. Got others in norm.weight" in said
        assert said.count("\n") == 1


def test_weights_so_large_that_predictions_are_not_finite_are_told(
    folder: Path, capsys: Captured
) -> None:
    edited(folder, "model.safetensors", lambda t: t["norm.weight"].fill_(3e38))
    for command in (["generate", str(folder)], ["evaluate", str(folder), "--contexts", "16"]):
        assert main(command) == 2
        assert "finite" in capsys.readouterr().err


def sharding(offsets: str, shape: str = "[2,2]") -> bytes:
    text = (
        b'{"__metadata__":{"DCP_SHARDING_INFO":%s},"a":{"dtype":"F32","shape":%s,'
        b'"data_offsets":[0,16]}}'
    ) % (json.dumps(offsets).encode(), shape.encode())
    return header(text) + bytes(16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        sharding("{"),
        sharding("[" * 20_000),
        sharding("{}"),
        sharding("[]"),
        sharding('{"a": {"saved_offsets": "zz"}}'),
        sharding('{"a": {"saved_offsets": [0, null]}}'),
        sharding('{"a": {"saved_offsets": [-1, 0]}}'),
        sharding('{"a": {"saved_offsets": [1000000000000, 0]}}'),
        sharding(f'{{"a": {{"saved_offsets": [{10**30}, 0]}}}}'),
    ],
    ids=range(10),
)
def test_parts_that_make_up_no_tensor_are_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "are damaged" in refused(lambda: read_shards(tmp_path))


def test_a_checkpoint_under_another_steps_name_is_told(folder: Path) -> None:
    (folder / CHECKPOINT).rename(folder / "checkpoint-00000005")
    assert "its state is of step 3" in refused(lambda: restore(folder))


def test_what_a_killed_process_left_is_gone_once_the_folder_is_held(
    folder: Path, tiny_train: TrainConfig
) -> None:
    left = [".checkpoint-00000002.tmp", ".metrics.jsonl.77.tmp", ".config.json.sha256.5.tmp"]
    left += [".curves.png.9.tmp", ".genome.json.9.tmp"]
    for name in left[1:]:
        (folder / name).write_text("torn")
    (folder / left[0]).mkdir()
    (folder / left[0] / "model.safetensors").write_bytes(bytes(1000))
    kept = folder / ".mine.tmp"
    kept.write_text("of somebody else")
    trainer = restore(folder)
    assert not [name for name in left if (folder / name).exists()]
    assert kept.exists()
    # A run that was killed before its configuration was there left nothing that is in the way.
    empty = folder.with_name("empty")
    empty.mkdir()
    (empty / ".config.json.12.tmp").write_text("{")
    RunFolder.create(empty, tiny_train)
    assert trainer.step == 3


def test_a_checkpoint_is_complete_until_it_is_dropped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.open(folder)
    saved = run.load()

    def killed(path: Path, ignore_errors: bool = False) -> None:
        next(path.glob("*.safetensors")).unlink()
        raise KeyboardInterrupt

    def save(step: int) -> None:
        run.save(saved.model, saved.optimizer, saved.state.model_copy(update={"step": step}))

    save(4)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(5)
    assert len(run.checkpoints()) == 2
    for path in run.checkpoints():
        assert len(list(path.glob("*.safetensors"))) == 2


def test_a_run_inside_its_corpus_is_no_part_of_it(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for index in range(9):
        Path(f"{index}.txt").write_text(f"some text {index} " * 40)
    seen = load_corpus([tmp_path]).digest
    assert main(["train", ".", "--steps", "2", *TINY_OPTIONS]) == 0
    assert load_corpus([tmp_path]).digest == seen
    assert main(["train", "--resume"]) == 0
    assert main(["evaluate", "runs/longnet", "--contexts", "16"]) == 0
    assert main(["train", ".", "--steps", "2", *TINY_OPTIONS, "--out", "runs/second"]) == 0
    assert RunFolder.open("runs/second").corpus_digest() == seen
    # A corpus that was read with the runs inside, as it once was, is read so again.
    earlier = _load(["."], (), 0.05, _EARLIER, with_runs=True)[1]
    assert earlier != seen
    assert load_corpus(["."], digest=earlier).digest == earlier
    assert load_corpus(["."], digest="another").digest == seen
