"""The kernels of a step of generation: on the CPU through Triton's interpreter, and on a GPU."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dilated_factory import LongNetConfig, LongNetLM
from dilated_factory.models.row_step import RowStep
from triton_interpreter import case_names, interpret

SCRIPT = Path(__file__).with_name("interpreted_row_step.py")
NAMES = case_names(SCRIPT)


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    found: dict[str, float] = interpret(SCRIPT)
    return found


@pytest.mark.xdist_group("row_step_interpreter")
@pytest.mark.parametrize("name", NAMES)
def test_interpreted_kernels_agree_with_float64(name: str, errors: dict[str, float]) -> None:
    assert errors[name] < 1
    assert sorted(errors) == sorted(NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("positions", ["rotary", "xpos", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_a_row_gives_the_states_that_the_model_gives(
    positions: str, dtype: torch.dtype, ragged: bool
) -> None:
    torch.manual_seed(0)
    config = LongNetConfig.model_validate(
        {
            "vocab_size": 23, "embed_dim": 48, "num_heads": 3, "num_layers": 2, "context": 48,
            "segment_lengths": (5, 12), "dilation_rates": (1, 3), "positions": positions,
        }
    )  # fmt: skip
    model = LongNetLM(config).eval()
    for parameter in model.parameters():
        # So that no bias is 0 and no gain 1.
        nn.init.normal_(parameter, std=0.3)
    model = model.to("cuda", dtype)
    exact = LongNetLM(config, dtype=torch.float64).eval()
    exact.load_state_dict({name: x.double() for name, x in model.state_dict().items()})
    tokens = torch.randint(23, (3, 31))
    step, caches, expected = RowStep(model), model.new_caches(), exact.new_caches()
    assert RowStep.can_serve(model)
    with torch.inference_mode():
        first = torch.tensor([7, 3, 5]) if ragged else None
        on = None if first is None else first.cuda()
        model.hidden_states(tokens[:, :7].cuda(), caches=caches, lengths=on)
        exact.hidden_states(tokens[:, :7], caches=expected, lengths=first)
        for i in range(7, 31):
            alive = torch.tensor([1, i % 2, 1]) if ragged else None
            token = tokens[:, i : i + 1]
            states = exact.hidden_states(token, caches=expected, lengths=alive)[:, 0]
            actual = step(token.cuda(), caches, None if alive is None else alive.cuda())
            error = (actual.cpu().double() - states).norm() / states.norm()
            assert error < (3e-2 if dtype == torch.bfloat16 else 1e-5)
