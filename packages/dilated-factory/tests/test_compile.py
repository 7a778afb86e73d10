"""Compiled layers: what eager ones compute, from one graph for all of them."""

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import factory_programs as programs
from dilated_core import DilatedAttention
from dilated_factory import (
    LongNetConfig,
    LongNetEncoder,
    LongNetEncoderConfig,
    LongNetLM,
    TrainConfig,
)
from dilated_factory.models.stack import Checkpointing
from process_ranks import Ranks

# The tracer looks at it, and hides the warning in a way that an error gets through.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

SHAPE: dict[str, Any] = {
    "embed_dim": 32,
    "num_heads": 4,
    "segment_lengths": (5, 12, 64),
    "dilation_rates": (1, 2, 3),
    "context": 64,
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def whole_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No code is generated, and a layer that is not one graph is an error."""
    strict = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", strict)


def language_model(num_layers: int = 2, **changes: Any) -> LongNetLM:
    torch.manual_seed(0)
    config = LongNetConfig.model_validate({**SHAPE, "num_layers": num_layers, **changes})
    return LongNetLM(config, dtype=torch.float64)


def stepper(model: LongNetLM, **options: Any) -> Callable[[int], list[Tensor]]:
    def step(seed: int) -> list[Tensor]:
        tokens = torch.randint(256, (2, 42), generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(seed)
        loss = model.loss(tokens, **options)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    return step


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_deep_and_shallow_models_compile_one_graph_and_no_step_another() -> None:
    for num_layers in (2, 8):
        torch._dynamo.reset()
        counters.clear()
        model = language_model(num_layers)
        eager = stepper(copy.deepcopy(model))
        model.compile_blocks()
        compiled = stepper(model)
        assert_close(compiled(0), eager(0))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in (1, 2, 3):
                assert_close(compiled(seed), eager(seed))
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


@pytest.mark.usefixtures("whole_graphs")
@pytest.mark.parametrize("checkpointing", [False, True, "pointwise", "selective"])
@pytest.mark.parametrize("positions", ["rotary", "xpos", "none"])
def test_one_graph_serves_all_kinds_of_checkpointing_and_positions(
    positions: str, checkpointing: Checkpointing
) -> None:
    model = language_model(3, positions=positions)
    given = None if positions == "none" else torch.arange(41) * 3
    mask = torch.arange(41).expand(2, -1) < torch.tensor([[0], [9]])
    for options in ({}, {"key_padding_mask": mask, "positions": given}):
        eager = stepper(model, **options)
        other = copy.deepcopy(model)
        other.activation_checkpointing = checkpointing
        other.compile_blocks()
        compiled = stepper(other, **options)
        for seed in (0, 1):
            assert_close(compiled(seed), eager(seed))
    # Aligned rows need no mask, so without positions nothing differs.
    assert counters["stats"]["unique_graphs"] == (1 if positions == "none" else 2)


@pytest.mark.usefixtures("whole_graphs")
@pytest.mark.parametrize("checkpointing", [True, "pointwise", "selective"])
def test_dropout_is_the_same_when_it_is_computed_again(checkpointing: Checkpointing) -> None:
    model = language_model(2, dropout=0.3)
    other = copy.deepcopy(model)
    other.activation_checkpointing = checkpointing
    for one in (model, other):
        one.compile_blocks()
    assert_close(stepper(other)(0), stepper(model)(0))


@pytest.mark.usefixtures("whole_graphs")
def test_an_encoder_compiles_under_autocast_and_without_gradients() -> None:
    torch.manual_seed(0)
    config = LongNetEncoderConfig.model_validate({**SHAPE, "num_layers": 3})
    model, x = LongNetEncoder(config), torch.randn(2, 41, 32, requires_grad=True)
    other = copy.deepcopy(model)
    other.compile_blocks()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(other(x), model(x))
        with torch.no_grad():
            torch.testing.assert_close(other(x.detach()), model(x))
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.usefixtures("whole_graphs")
def test_calls_with_caches_are_not_compiled() -> None:
    model, tokens = language_model(), torch.randint(256, (2, 30))
    expected = model(tokens)
    model.compile_blocks()
    with torch.no_grad():
        caches = model.new_caches()
        found = torch.cat([model(part, caches=caches) for part in tokens.split(11, 1)], dim=1)
    torch.testing.assert_close(found, expected)
    assert not counters["stats"]


@pytest.mark.usefixtures("whole_graphs")
def test_names_copies_and_pickles_are_those_of_the_model() -> None:
    model, tokens = language_model(), torch.randint(256, (2, 30))
    names = list(model.state_dict())
    model.compile_blocks()
    expected = model(tokens)
    assert list(model.state_dict()) == names
    counters.clear()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(tokens), expected)
    assert not counters["stats"]


def test_attention_that_cannot_be_traced_stands_between_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Untraced(DilatedAttention):
        @torch._dynamo.disable
        def forward(self, *tensors: Tensor, **options: Any) -> Tensor:
            return super().forward(*tensors, **options)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    found = []
    for num_layers in (2, 5):
        torch._dynamo.reset()
        counters.clear()
        model = language_model(num_layers)
        pattern = model.config.pattern
        other = LongNetLM(model.config, attention=partial(Untraced, pattern), dtype=torch.float64)
        other.load_state_dict(model.state_dict())
        other.compile_blocks()
        assert_close(stepper(other)(0), stepper(model)(0))
        assert counters["graph_break"]
        found.append(counters["stats"]["unique_graphs"])
    assert found[0] == found[1] < 6


@pytest.mark.parametrize(
    ("checkpointing", "kept"), [(False, 18), ("pointwise", 11), ("selective", 7)]
)
def test_a_compiled_layer_keeps_few_tensors_under_autocast(
    checkpointing: Checkpointing, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    partitioned = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", partitioned)
    config = LongNetConfig.model_validate({**SHAPE, "num_layers": 1, "positions": "none"})
    model = LongNetLM(config, activation_checkpointing=checkpointing)
    model.compile_blocks()
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if 41 in tensor.shape:
            saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        output = model.blocks[0](torch.randn(1, 41, 32, requires_grad=True))
    assert output.shape == (1, 41, 32)
    # Beside them: lse, and means and deviations of four norms, all (B, N) or for each head.
    assert kept <= sum(saved.values()) / (41 * 32 * 2) < kept + 1


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2, group_timeout=120.0) as ranks:
        yield ranks


@pytest.mark.distributed
@pytest.mark.xdist_group("factory_distributed")
@pytest.mark.parametrize("checkpointing", [True, "selective"])
@pytest.mark.parametrize(
    ("sequence_parallel", "data_parallel"), [(1, "ddp"), (1, "fsdp"), (2, "ddp")]
)
def test_processes_that_train_together_compile_no_more_than_one(
    two: Ranks, sequence_parallel: int, data_parallel: Any, checkpointing: Checkpointing
) -> None:
    model = LongNetConfig.model_validate({**SHAPE, "num_layers": 3})
    config = TrainConfig(model=model, steps=3, batch_size=4)
    told = config, sequence_parallel, data_parallel, checkpointing
    for found in two.run(programs.compiled_losses, *told, timeout=200):
        assert found["compiled"] == pytest.approx(found["eager"], rel=1e-10)
        # Attention that speaks with other processes is not traced: it parts a graph.
        assert (found["graphs"] == 1) == (sequence_parallel == 1)
        assert found["graphs"] < 8
        assert found["more"] == 0


@pytest.mark.parametrize("value", ["all", None, 2])
def test_an_unknown_kind_of_checkpointing_is_named(value: Any) -> None:
    with pytest.raises(
        ValueError, match=f"must be a bool, 'pointwise' or 'selective'. Got {value!r}"
    ):
        LongNetLM(LongNetConfig.model_validate(SHAPE), activation_checkpointing=value)
