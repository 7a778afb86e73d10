"""What is planned for a training is what the training takes, counted on the CPU."""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dilated_factory import LongNetConfig, LongNetLM, TrainConfig
from dilated_factory.cli import main
from dilated_factory.errors import InputError
from dilated_factory.training.flops import flops_per_token
from dilated_factory.training.optimizer import build_optimizers, optimizer_tensors
from dilated_factory.training.parallel import Parallel
from dilated_factory.training.planning import (
    Recomputed,
    Setup,
    count_weights,
    plan_training,
    ways_to_fit,
)
from dilated_factory.training.precision import autocast
from dilated_factory.training.weights import RECOMPUTED, initial_model

ALONE = Setup("cpu", compiled=False)
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"embed_dim": 64, "num_heads": 4, "num_layers": 3, "context": 128},
    "wide": {
        "embed_dim": 48, "num_heads": 2, "num_layers": 2, "ffn_dim": 132, "vocab_size": 997,
        "positions": "xpos", "tie_embeddings": False, "context": 64,
    },
    "dropout": {
        "embed_dim": 32, "num_heads": 4, "num_layers": 2, "vocab_size": 97, "dropout": 0.1,
        "positions": "learned", "embedding_norm": True, "context": 48,
    },
    "relu": {
        "embed_dim": 32, "num_heads": 2, "num_layers": 1, "activation": "relu",
        "positions": "none", "context": 64,
    },
    "swish": {
        "embed_dim": 32, "num_heads": 2, "num_layers": 2, "activation": "swish",
        "positions": "sinusoidal", "context": 64,
    },
}  # fmt: skip


def training(shape: str, **options: Any) -> TrainConfig:
    return TrainConfig(model=LongNetConfig(**SHAPES[shape]), **{"steps": 1, **options})


class Step:
    """A step as the trainer takes it, on one process."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.parallel = config, Parallel(torch.device("cpu"))
        self.model = initial_model(config, self.parallel.attention(config))
        self.model.activation_checkpointing = RECOMPUTED[config.recompute]
        self.optimizers = build_optimizers(self.model, config)
        shape = config.model
        self.windows = torch.randint(shape.vocab_size, (config.batch_size, shape.context + 1))

    def losses(self) -> list[Callable[[], torch.Tensor]]:
        shares = self.parallel.shares(self.windows, self.config.micro_batch_size)

        def loss(share: Any) -> torch.Tensor:
            with autocast(torch.device("cpu"), self.config.dtype):
                return self.model.loss(share.tokens, share.targets, positions=share.positions)

        return [lambda share=share: loss(share) for share in shares]

    def __call__(self) -> None:
        for loss in self.losses():
            loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.3)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def kept(self) -> int:
        """Bytes that a forward keeps for backward, beside parameters and tokens."""
        own = {p.data_ptr() for p in self.model.parameters()}
        own.add(self.windows.data_ptr())
        kept: dict[int, tuple[int, torch.Tensor]] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.losses()[0]()
        return sum(size for size, _ in kept.values())

    def most_allocated(self) -> int:
        """The most bytes at once that a step allocates beside weights and optimizer state."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
            self()
        assert told.profiler is not None
        changes = sorted(
            (event.start_ns(), event.nbytes())
            for event in told.profiler.kineto_results.events()
            if event.name() == "[memory]"
        )
        return max(itertools.accumulate(change for _, change in changes))


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_and_the_state_of_optimizers_are_counted_exactly(shape: str) -> None:
    for optimizer in ("muon", "adamw"):
        config = training(shape, optimizer=optimizer)
        step = Step(config)
        step()
        needs = plan_training(config, ALONE)
        numbers = sum(p.numel() for p in step.model.parameters())
        state = optimizer_tensors(step.model, step.optimizers).values()
        assert needs.parameters == numbers
        assert needs.weights == needs.gradients == 4 * numbers
        assert needs.optimizer == sum(x.nbytes for x in state)


def test_counting_makes_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    before = LongNetLM.__init__

    def init(self: LongNetLM, config: LongNetConfig, **options: Any) -> None:
        made.append(config.num_layers)
        assert options["device"] == "meta"
        before(self, config, **options)

    monkeypatch.setattr(LongNetLM, "__init__", init)
    assert count_weights(LongNetConfig(num_layers=80)).numbers > 0
    assert made == [1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", get_args(Recomputed))
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_kept_for_backward_is_counted_exactly(
    shape: str, recompute: Recomputed, dtype: str
) -> None:
    config = training(shape, batch_size=6, micro_batch_size=3, recompute=recompute, dtype=dtype)
    needs = plan_training(config, ALONE)
    expected = needs.activations
    # The table of positions that is given to a block is held anyway, where a hook sees it or not.
    if recompute != "all" or config.model.positions == "learned":
        expected += needs.inputs - 8 * (2 * 3 + 1) * config.model.context
    assert Step(config).kept() == expected


@pytest.mark.parametrize("recompute", get_args(Recomputed))
@pytest.mark.parametrize(
    ("shape", "options"),
    [("plain", {"batch_size": 4}), ("plain", {"batch_size": 4, "micro_batch_size": 1}),
     ("wide", {"batch_size": 8}), ("plain", {"optimizer": "adamw"})],
)  # fmt: skip
def test_the_peak_is_within_a_few_percent(
    shape: str, options: dict[str, Any], recompute: Recomputed
) -> None:
    config = training(shape, recompute=recompute, **options)
    step = Step(config)
    step()
    needs = plan_training(config, ALONE)
    planned = needs.peak - needs.weights - needs.optimizer
    assert 0.93 < planned / step.most_allocated() < 1.12


def test_operations_are_those_of_the_model_and_of_what_is_computed_again() -> None:
    for recompute in get_args(Recomputed):
        config = training("plain", batch_size=2, recompute=recompute)
        needs, shape = plan_training(config, ALONE), config.model
        model = LongNetLM(shape, attention=lambda: lambda query, key, value, **_: value)
        tokens = 2 * shape.context
        assert needs.flops == pytest.approx(tokens * flops_per_token(LongNetLM(shape)))
        model.activation_checkpointing = RECOMPUTED[recompute]
        with FlopCounterMode(display=False) as counter:
            model.loss(torch.randint(256, (2, shape.context + 1))).backward()
        attention = shape.pattern.flops(shape.context, 4, 16, is_causal=True) * 2
        # Without attention nothing reaches the weights of query and key backward.
        idle = 2 * 2 * shape.embed_dim**2 * 2 * tokens
        again = shape.num_layers * attention if recompute == "all" else 0
        counted = counter.get_total_flops() + shape.num_layers * (3 * attention + idle) + again
        assert needs.flops + needs.flops_again == pytest.approx(counted)


def test_ranks_divide_what_they_share() -> None:
    config = training("plain", batch_size=8)
    whole = plan_training(config)
    ddp = plan_training(config, Setup(ranks=8))
    assert ddp.weights == whole.weights == ddp.buckets
    assert (ddp.flops, ddp.ends < whole.ends) == (whole.flops / 8, True)
    fsdp = plan_training(config, Setup(ranks=8, data_parallel="fsdp"))
    assert fsdp.weights == pytest.approx(whole.weights / 8)
    assert fsdp.optimizer == pytest.approx(whole.optimizer / 8, rel=0.02)
    assert (fsdp.buckets, fsdp.whole > 0) == (0, True)
    with pytest.raises(InputError, match="batch_size must be a multiple"):
        plan_training(config, Setup(ranks=3))
    with pytest.raises(InputError, match="must divide the processes"):
        plan_training(config, Setup(ranks=8, sequence_parallel=3))


def test_ranks_that_share_sequences_have_rows_of_others() -> None:
    pytest.importorskip("dilated_ring", reason="dilated-ring is not installed")
    config = training("plain")
    shared = plan_training(config, Setup(compiled=False, ranks=4, sequence_parallel=4))
    whole = plan_training(config, Setup(compiled=False))
    assert shared.messages > 0
    assert whole.layers / 4 < shared.layers < whole.layers


def test_the_ways_to_fit_are_those_that_fit() -> None:
    config = training("plain", batch_size=12)
    limit = plan_training(config.model_copy(update={"recompute": "feed_forward"}), ALONE).peak
    ways = {way.recompute: way for way in ways_to_fit(config, ALONE, limit)}
    assert ways["feed_forward"].micro_batch == ways["all"].micro_batch == 12
    assert ways["none"].micro_batch in (4, 6)
    for way in ways.values():
        assert way.needs.peak <= limit
        options = {"recompute": way.recompute, "micro_batch_size": way.micro_batch}
        assert plan_training(config.model_copy(update=options), ALONE) == way.needs
    assert list(ways_to_fit(config, ALONE, 1000)) == []


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = main(["plan", "model", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def test_the_command_plans_a_file_a_run_and_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, finished_run: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text("steps = 30\nbatch_size = 4\n[model]\ncontext = 64\nembed_dim = 32\n")
    record = json.loads(said(capsys, file, "--json", "--tflops", 2, "--mfu", 0.5))
    config = record["config"]
    assert (config["batch_size"], config["model"]["embed_dim"]) == (4, 32)
    assert record["run_seconds"] == pytest.approx(30 * record["flops"] / 1e12)
    assert record["epoch_seconds"] is None
    changed = json.loads(said(capsys, file, "--json", "--batch-size", 8, "--dtype", "float32"))
    assert changed["config"]["batch_size"] == 8
    assert changed["weights"] == record["weights"]
    assert changed["layers"] > 2 * record["layers"]
    run = json.loads(said(capsys, finished_run, "--json", "--epoch-tokens", 1000, "--tflops", 1))
    trained = json.loads((finished_run / "config.json").read_text())
    assert run["config"]["model"] == trained["model"]
    assert run["epoch_seconds"] > 0
    assert "--recompute" in said(capsys)


def test_the_command_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    large = ("--num-layers", 40, "--embed-dim", 2048, "--num-heads", 16, "--context", 65536)
    no = said(capsys, *large, "--tflops", 400)
    assert "fits in 80 GB: no" in no
    assert "  --recompute all --micro-batch-size 1: " in no
    assert "--recompute none" not in no
    assert max(map(len, no.splitlines())) < 130
    assert len(no.splitlines()) <= 30
    assert "; 1 sequence of 65,536 tokens a step on 1 cuda rank, bfloat16, compiled\n" in no
    assert "fits in 2000 GB: yes" in said(capsys, *large, "--device-memory", 2000)
    assert "no --recompute and" in said(capsys, *large, "--device-memory", 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--batch-size", 3, "--ranks", 2), "batch_size must be a multiple"),
        (("--batch-size", 10**18), "--batch-size must be at most"),
        (("--num-layers", 10**9), "--num-layers must be at most"),
        (("nowhere.toml",), "nowhere.toml"),
        (("--embed-dim", 7), "embed_dim must be a multiple"),
    ],
)
def test_the_command_refuses(
    capsys: pytest.CaptureFixture[str], options: tuple[object, ...], says: str
) -> None:
    assert main(["plan", "model", *map(str, options)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err


def test_a_billion_tokens_on_16384_devices_are_planned_at_once() -> None:
    pytest.importorskip("dilated_ring", reason="dilated-ring is not installed")
    model = LongNetConfig(context=2**30, num_layers=48, embed_dim=2048, num_heads=16)
    start = time.process_time()
    setup = Setup(compiled=False, ranks=2**14, sequence_parallel=2**14)
    ways = list(ways_to_fit(TrainConfig(model=model, steps=1), setup, 80 * 10**9))
    assert ways[-1].recompute == "all"
    assert time.process_time() - start < 10
