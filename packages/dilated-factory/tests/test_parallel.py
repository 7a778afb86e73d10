"""Several processes train like one, and read each other's checkpoints."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import factory_programs as programs
from dilated_factory import InputError, LongNetConfig, TrainConfig, train
from dilated_factory.training.loop import Trainer
from dilated_factory.training.parallel import DataParallel, Parallel, join
from dilated_factory.training.run_folder import RunFolder
from process_ranks import Ranks, World

from .conftest import TINY_OPTIONS, losses, start
from .tokenizer_files import byte_level, saved

pytest.importorskip("dilated_ring", reason="dilated-ring is not installed")

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("factory_distributed")]

STEPS = 8


@pytest.fixture(scope="module")
def config(tiny_model: LongNetConfig, corpus_folder: Path) -> TrainConfig:
    model = tiny_model.model_copy(update={"embed_dim": 32, "num_heads": 2})
    return TrainConfig(model=model, paths=(str(corpus_folder),), steps=STEPS, batch_size=4)


@pytest.fixture(scope="module")
def alone(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = start(config, tmp_path_factory.mktemp("alone") / "run")
    trainer.train()
    return trainer


def assert_same_curve(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal but for rounding, which Muon amplifies: it iterates in bfloat16."""
    assert losses(found[:2]) == pytest.approx(losses(expected[:2]), rel=1e-6)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-3)


both_kinds = pytest.mark.parametrize("data_parallel", ["ddp", "fsdp"])


class Kind(NamedTuple):
    """How processes train together."""

    world_size: int
    sequence_parallel: int = 1
    data_parallel: DataParallel = "ddp"

    def __str__(self) -> str:
        return f"{self.world_size}-{self.sequence_parallel}-{self.data_parallel}"


@pytest.fixture(scope="module")
def get_ranks() -> Iterator[Callable[[int], Ranks]]:
    """One pool of processes for each world size."""
    with ExitStack() as stack:
        yield cache(lambda world_size: stack.enter_context(Ranks(world_size)))


@pytest.fixture(scope="module")
def four(get_ranks: Callable[[int], Ranks]) -> Ranks:
    return get_ranks(4)


@both_kinds
@pytest.mark.parametrize("sequence_parallel", [1, 2, 4])
def test_four_processes_train_like_one(
    config: TrainConfig,
    alone: Trainer,
    four: Ranks,
    tmp_path: Path,
    sequence_parallel: int,
    data_parallel: str,
) -> None:
    path = tmp_path / "run"
    curves = four.run(
        programs.train, path, config, sequence_parallel, None, data_parallel, timeout=120
    )
    run = RunFolder.open(tmp_path / "run")
    metrics = run.read_metrics()
    assert curves == [losses(metrics)] * 4
    assert_same_curve(metrics, alone.run.read_metrics())
    files = {path.name for path in run.path.rglob("*") if path.is_file()}
    assert sum(name.startswith("shard-") for name in files) >= 4
    kinds = {Path(name).suffix for name in files - {"lock"}}
    assert kinds == {".json", ".jsonl", ".safetensors", ".sha256"}


def test_processes_share_tokens_as_they_share_bytes(
    config: TrainConfig, four: Ranks, tmp_path: Path
) -> None:
    values = {"tokenizer": str(saved(byte_level(), tmp_path)), "steps": 2, "validate_every": 2}
    model = config.model.model_copy(update={"vocab_size": 320})
    config = config.model_copy(update=values | {"model": model, "validation_bytes": 400})
    alone = train(config, tmp_path / "alone").run.read_metrics()
    four.run(programs.train, tmp_path / "run", config, 2, None, "ddp", timeout=120)
    for found, expected in zip(RunFolder.open(tmp_path / "run").read_metrics(), alone, strict=True):
        assert found["bytes_read"] == expected["bytes_read"] > found["tokens_read"]
        for name in ("bits_per_byte", "validation_bits_per_byte"):
            assert found.get(name) == pytest.approx(expected.get(name), rel=1e-4)


@pytest.fixture(scope="module")
def exact(
    config: TrainConfig,
    get_ranks: Callable[[int], Ranks],
    tmp_path_factory: pytest.TempPathFactory,
) -> RunFolder:
    """What one process does in float64."""
    path = tmp_path_factory.mktemp("exact") / "run"
    get_ranks(1).run(programs.train_exactly, path, config, 1, timeout=120)
    return RunFolder.open(path)


@both_kinds
@pytest.mark.parametrize("sequence_parallel", [1, 2, 4])
def test_in_float64_four_processes_are_one(
    config: TrainConfig,
    exact: RunFolder,
    four: Ranks,
    tmp_path: Path,
    sequence_parallel: int,
    data_parallel: str,
) -> None:
    path = tmp_path / "run"
    four.run(programs.train_exactly, path, config, sequence_parallel, data_parallel, timeout=120)
    assert_same_run(RunFolder.open(path), exact)


def assert_same_run(four_run: RunFolder, one_run: RunFolder) -> None:
    """Equal in float64, in every step and in the last checkpoint."""
    for expected, found in zip(one_run.read_metrics(), four_run.read_metrics(), strict=True):
        # Without the norm, a wrong scale of the gradients would hide behind its clipping.
        for name in ("step", "loss", "gradient_norm", "learning_rate", "bytes_read", "progress"):
            assert found[name] == pytest.approx(expected[name], rel=1e-10)
    checkpoint, whole = four_run.load(), one_run.load()
    assert checkpoint.optimizer
    for found_tensors, tensors in (
        (checkpoint.model, whole.model),
        (checkpoint.optimizer, whole.optimizer),
    ):
        assert set(found_tensors) == set(tensors)
        for name, tensor in tensors.items():
            torch.testing.assert_close(found_tensors[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("first_target", [0, 5, 23, 24])
@both_kinds
def test_the_loss_of_ranks_is_the_mean_over_the_targets_of_all(
    get_ranks: Callable[[int], Ranks], world_size: int, first_target: int, data_parallel: str
) -> None:
    """However the targets are divided: evenly, unevenly, on one rank only, or none at all."""
    generator = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(23, (2, 24), generator=generator) for _ in range(2))
    targets[:, :first_target] = -100
    targets[0, first_target + 3 :] = -100
    torch.set_default_dtype(torch.float64)
    one = programs.Shares(ring=False)
    torch.set_default_dtype(torch.float32)
    true = one(tokens, targets, torch.arange(24))
    true.backward()
    found = get_ranks(world_size).run(programs.train_shares, tokens, targets, data_parallel)
    shares = [share for share, _ in found]
    assert sum(shares) / world_size == pytest.approx(true.item(), rel=1e-10)
    n = 24 // world_size
    for rank, share in enumerate(shares):
        empty = bool((targets[:, rank * n : rank * n + n] == -100).all())
        assert (share == 0) == empty
    for _, grads in found:
        for found_grad, parameter in zip(grads, one.parameters(), strict=True):
            torch.testing.assert_close(found_grad, parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_packed_documents_over_ranks_are_those_of_one_process(
    get_ranks: Callable[[int], Ranks], world_size: int
) -> None:
    """Documents lie across ranks; the model attends each alone, and counts from its beginning."""
    generator = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(23, (1, 24), generator=generator) for _ in range(2))
    ends = torch.tensor([0, 5, 5, 16, 24])
    targets[:, ends[1:] - 1] = -100
    torch.set_default_dtype(torch.float64)
    one = programs.Shares(ring=False)
    torch.set_default_dtype(torch.float32)
    true = one.model.loss(tokens, targets, cu_seqlens=ends, label_smoothing=programs.SMOOTHING)
    true.backward()
    found = get_ranks(world_size).run(programs.train_shares, tokens, targets, "ddp", ends)
    assert sum(share for share, _ in found) / world_size == pytest.approx(true.item(), rel=1e-10)
    for _, grads in found:
        for found_grad, parameter in zip(grads, one.parameters(), strict=True):
            torch.testing.assert_close(found_grad, parameter.grad, rtol=1e-9, atol=1e-12)


KINDS = [
    (Kind(4, 2, "fsdp"), Kind(1)),
    (Kind(4, 4), Kind(1)),
    (Kind(1), Kind(4, 2, "fsdp")),
    (Kind(1), Kind(4, 4)),
    (Kind(4, 2, "fsdp"), Kind(4, 1, "ddp")),
    (Kind(4, 4), Kind(2, 2)),
    (Kind(2, 1, "fsdp"), Kind(4, 4, "fsdp")),
    (Kind(4, 1, "fsdp"), Kind(2, 1, "fsdp")),
    (Kind(2, 2, "ddp"), Kind(4, 1, "fsdp")),
]


@pytest.mark.parametrize(("first", "then"), KINDS[::2], ids=str)
def test_another_number_and_kind_of_processes_goes_on(
    config: TrainConfig,
    alone: Trainer,
    get_ranks: Callable[[int], Ranks],
    tmp_path: Path,
    first: Kind,
    then: Kind,
) -> None:
    path = tmp_path / "run"
    for kind, stop_at in ((first, 5), (then, None)):
        get_ranks(kind.world_size).run(
            programs.train, path, config, kind.sequence_parallel, stop_at, kind.data_parallel,
            timeout=120,
        )  # fmt: skip
    metrics = RunFolder.open(path).read_metrics()
    assert [record["step"] for record in metrics] == list(range(1, STEPS + 1))
    assert_same_curve(metrics, alone.run.read_metrics())


@pytest.mark.parametrize(("first", "then"), KINDS, ids=str)
def test_in_float64_they_go_on_as_if_they_had_done_it_all(
    config: TrainConfig,
    exact: RunFolder,
    get_ranks: Callable[[int], Ranks],
    tmp_path: Path,
    first: Kind,
    then: Kind,
) -> None:
    path = tmp_path / "run"
    for kind, stop_at in ((first, 5), (then, None)):
        get_ranks(kind.world_size).run(
            programs.train_exactly, path, config, kind.sequence_parallel, kind.data_parallel,
            stop_at, timeout=120,
        )  # fmt: skip
    assert_same_run(RunFolder.open(path), exact)


def test_a_run_stopped_before_its_first_step_goes_on(
    config: TrainConfig, exact: RunFolder, get_ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    """Its checkpoint has no state of an optimizer."""
    path = tmp_path / "run"
    for world_size, data_parallel, stop_at in ((2, "fsdp", 0), (4, "fsdp", 0), (1, "ddp", None)):
        get_ranks(world_size).run(
            programs.train_exactly, path, config, 1, data_parallel, stop_at, timeout=120
        )
    assert_same_run(RunFolder.open(path), exact)


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_rank_holds_its_part_of_weights_and_optimizers(
    config: TrainConfig, get_ranks: Callable[[int], Ranks], tmp_path: Path, world_size: int
) -> None:
    ranks = get_ranks(world_size)
    whole, *others = ranks.run(programs.held, tmp_path / "ddp", config, "ddp", timeout=120)
    assert all(other == whole for other in others)
    parts = ranks.run(programs.held, tmp_path / "fsdp", config, "fsdp", timeout=120)
    assert sum(part.parameters for part in parts) == whole.parameters
    for part in parts:
        # All sizes are multiples of 4. AdamW counts the steps of each parameter on every rank.
        assert part.parameters * world_size == whole.parameters
        assert part.state * world_size == pytest.approx(whole.state, rel=0.01)


def test_ranks_may_have_no_part_of_a_small_tensor(
    config: TrainConfig, get_ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    """Five rows on four ranks are 2, 2, 1 and none."""
    model = config.model.model_copy(update={"ffn_dim": 5})
    small = config.model_copy(update={"model": model, "steps": 3})
    runs = {}
    for name, world_size, data_parallel in (("one", 1, "ddp"), ("four", 4, "fsdp")):
        get_ranks(world_size).run(
            programs.train_exactly, tmp_path / name, small, 1, data_parallel, timeout=120
        )
        runs[name] = RunFolder.open(tmp_path / name)
    assert_same_run(runs["four"], runs["one"])


def test_mixed_precision_is_that_of_whole_weights(
    config: TrainConfig, get_ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    mixed = config.model_copy(update={"dtype": "bfloat16"})
    whole, parts = (
        get_ranks(2).run(programs.train, tmp_path / kind, mixed, 1, None, kind, timeout=120)[0]
        for kind in ("ddp", "fsdp")
    )
    assert parts[:2] == pytest.approx(whole[:2], rel=1e-5)
    assert parts == pytest.approx(whole, rel=1e-2)


@pytest.mark.slow
@both_kinds
def test_compiled_blocks_train_like_eager_ones(
    config: TrainConfig,
    alone: Trainer,
    get_ranks: Callable[[int], Ranks],
    tmp_path: Path,
    data_parallel: str,
) -> None:
    path = tmp_path / "run"
    micro = config.model_copy(update={"micro_batch_size": 1})
    get_ranks(2).run(programs.train_traced, path, micro, data_parallel, timeout=240)
    assert_same_curve(RunFolder.open(path).read_metrics(), alone.run.read_metrics())


@both_kinds
def test_accumulated_and_validated_steps_are_those_of_one_process(
    config: TrainConfig, get_ranks: Callable[[int], Ranks], tmp_path: Path, data_parallel: str
) -> None:
    fields = {
        "micro_batch_size": 1, "validate_every": 3, "validation_bytes": 192,
        "short_context": config.model.context // 2, "short_share": 0.5,
    }  # fmt: skip
    config = config.model_copy(update=fields | {"micro_batch_size": None, "validate_every": None})
    both = config.model_copy(update=fields)
    runs = []
    for world_size, kind, each in ((1, "ddp", config), (2, data_parallel, both)):
        get_ranks(world_size).run(
            programs.train_exactly, tmp_path / str(world_size), each, 1, kind, timeout=120
        )
        runs.append(RunFolder.open(tmp_path / str(world_size)))
    one, two = runs
    assert_same_run(two, one)
    whole = config.model_copy(update={**fields, "micro_batch_size": None})
    get_ranks(1).run(programs.train_exactly, tmp_path / "whole", whole, 1, timeout=120)
    expected = RunFolder.open(tmp_path / "whole").read_metrics()
    looks = [
        [line.get("validation_bits_per_byte") for line in metrics]
        for metrics in (two.read_metrics(), expected)
    ]
    assert [look is None for look in looks[0]] == [
        True,
        True,
        False,
        True,
        True,
        False,
        True,
        False,
    ]
    assert [x for x in looks[0] if x] == pytest.approx([x for x in looks[1] if x], rel=1e-6)
    assert two.newest()[1].best_step == RunFolder.open(tmp_path / "whole").newest()[1].best_step


@pytest.mark.parametrize(
    "kind", [Kind(2), Kind(2, 2), Kind(4, 2), Kind(4, 2, "fsdp"), Kind(2, 1, "fsdp")], ids=str
)
def test_separate_documents_are_those_of_one_process(
    config: TrainConfig, get_ranks: Callable[[int], Ranks], tmp_path: Path, kind: Kind
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(50):
        (folder / f"{index:02}.txt").write_bytes(
            bytes(range(60 + index, 61 + index + index * 7 % 37))
        )
    fields = {
        "documents": "separate", "paths": (str(folder),), "steps": 4, "validate_every": 2,
        "validation_bytes": 192, "validation_fraction": 0.3,
    }  # fmt: skip
    whole = config.model_copy(update=fields)
    get_ranks(1).run(programs.train_exactly, tmp_path / "one", whole, 1, timeout=120)
    parts = whole.model_copy(update={"micro_batch_size": 1})
    get_ranks(kind.world_size).run(
        programs.train_exactly, tmp_path / "many", parts, kind.sequence_parallel,
        kind.data_parallel, timeout=120,
    )  # fmt: skip
    one, many = (RunFolder.open(tmp_path / name) for name in ("one", "many"))
    assert_same_run(many, one)
    looks = [x.read_metrics()[3]["validation_bits_per_byte"] for x in (one, many)]
    assert looks[0] == pytest.approx(looks[1], rel=1e-6)


@pytest.mark.parametrize("kind", [Kind(4, 2), Kind(4, 2, "fsdp")], ids=str)
def test_short_sequences_that_ranks_share_are_those_of_one_process(
    config: TrainConfig, get_ranks: Callable[[int], Ranks], tmp_path: Path, kind: Kind
) -> None:
    short = config.model_copy(
        update={"short_context": config.model.context // 4, "short_share": 0.5, "steps": 4}
    )
    get_ranks(1).run(programs.train_exactly, tmp_path / "one", short, 1, timeout=120)
    get_ranks(kind.world_size).run(
        programs.train_exactly, tmp_path / "many", short, kind.sequence_parallel,
        kind.data_parallel, timeout=120,
    )  # fmt: skip
    one, many = (RunFolder.open(tmp_path / name) for name in ("one", "many"))
    assert_same_run(many, one)
    plain = short.model_copy(update={"short_context": None, "short_share": 0.75})
    get_ranks(1).run(programs.train_exactly, tmp_path / "plain", plain, 1, timeout=120)
    losses = [[x["loss"] for x in RunFolder.open(path).read_metrics()]
              for path in (tmp_path / "one", tmp_path / "plain")]  # fmt: skip
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.multi_gpu
@both_kinds
@pytest.mark.parametrize("sequence_parallel", [1, 2])
def test_two_gpus_train_like_one(
    config: TrainConfig, tmp_path: Path, sequence_parallel: int, data_parallel: str
) -> None:
    curves = []
    for world_size, *kind in ((1, 1, None, "ddp"), (2, sequence_parallel, None, data_parallel)):
        with Ranks(World(world_size, "cuda")) as ranks:
            path = tmp_path / str(world_size)
            curves.append(ranks.run(programs.train, path, config, *kind, timeout=120)[0])
    one, two = curves
    assert two[:2] == pytest.approx(one[:2], rel=1e-4)
    assert two == pytest.approx(one, rel=1e-2)


def test_what_cannot_be_shared_evenly_is_refused(
    config: TrainConfig, four: Ranks, tmp_path: Path
) -> None:
    odd = config.model_copy(update={"batch_size": 3})
    outcomes = four.outcomes(programs.train, tmp_path / "a", odd, 2)
    assert {str(outcome.error) for outcome in outcomes} == {
        "batch_size must be a multiple of the processes that share it (2). Got 3."
    }
    model = config.model.model_copy(update={"context": 46})
    odd = config.model_copy(update={"model": model})
    outcomes = four.outcomes(programs.train, tmp_path / "b", odd, 4)
    assert {str(outcome.error) for outcome in outcomes} == {
        "context must be a multiple of --sequence-parallel (4). Got 46."
    }
    odd = config.model_copy(update={"short_context": 2})
    outcomes = four.outcomes(programs.train, tmp_path / "s", odd, 4)
    assert {str(outcome.error) for outcome in outcomes} == {
        "short_context must be a multiple of --sequence-parallel (4). Got 2."
    }
    outcomes = four.outcomes(programs.train, tmp_path / "c", config, 3)
    assert {str(outcome.error) for outcome in outcomes} == {
        "--sequence-parallel must divide the number of processes (4). Got 3."
    }
    assert not any(tmp_path.iterdir())


def test_one_process_cannot_share_a_sequence_or_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join(torch.device("cpu")) == Parallel(torch.device("cpu"))
    with pytest.raises(InputError, match="torchrun --nproc-per-node 2 -m dilated_factory train"):
        join(torch.device("cpu"), sequence_parallel=2)
    with pytest.raises(InputError, match="--data-parallel fsdp needs several processes"):
        join(torch.device("cpu"), data_parallel="fsdp")
    with pytest.raises(InputError, match="data_parallel must be 'ddp' or 'fsdp'"):
        join(torch.device("cpu"), data_parallel="zero")  # type: ignore[arg-type]  # the wrong value


def test_ranks_that_read_different_data_all_say_so(four: Ranks) -> None:
    four.run(programs.compare_digests, ["ab" * 32] * 4)
    outcomes = four.outcomes(programs.compare_digests, ["ab" * 32] * 3 + ["cd" * 32])
    assert {str(outcome.error) for outcome in outcomes} == {
        "the corpus must be the same on all ranks. It is not."
    }


# Rank 1 dies in step 6 of the first attempt, rank 0 runs out of memory in step 7 of the second.
FAULTY = """
import os, signal, sys
import torch
from dilated_factory.cli import main
from dilated_factory.training.loop import Trainer

take_step = Trainer._take_step

def faulty_step(trainer):
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if (attempt, os.environ["RANK"], trainer.step) == (0, "1", 5):
        os.kill(os.getpid(), signal.SIGKILL)
    if (attempt, os.environ["RANK"], trainer.step) == (1, "0", 6):
        raise torch.OutOfMemoryError("tried to allocate 7 PiB")
    return take_step(trainer)

Trainer._take_step = faulty_step
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_torchrun_restarts_from_the_last_checkpoint_to_the_same_losses(
    config: TrainConfig, alone: Trainer, tmp_path: Path
) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    options = [*TINY_OPTIONS, "--embed-dim", "32", "--num-heads", "2", "--batch-size", "4"]
    command = [
        *torchrun, "--nproc-per-node", "2", "--max-restarts", "2", str(script),
        "train", *config.paths, "--out", str(tmp_path / "run"), "--steps", str(STEPS), *options,
        "--sequence-parallel", "2", "--checkpoint-every", "4", "--dtype", "float32",
    ]  # fmt: skip
    run = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "from step 0" in run.stdout
    assert run.stdout.count("from step 4") == 2
    assert "tried to allocate 7 PiB" in run.stderr
    metrics = RunFolder.open(tmp_path / "run").read_metrics()
    assert [record["step"] for record in metrics] == list(range(1, STEPS + 1))
    assert_same_curve(metrics, alone.run.read_metrics())
