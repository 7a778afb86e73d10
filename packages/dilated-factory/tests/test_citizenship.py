"""The package as others meet it: a light import, and torch.func."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from dilated_factory import LongNetConfig, LongNetLM


def test_the_import_leaves_the_command_line_out() -> None:
    code = (
        "import sys, dilated_factory; "
        "print([m for m in ('typer', 'rich', 'matplotlib', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("own", [False, True])
def test_torch_func_has_the_gradients_of_each_sample(own: bool) -> None:
    config = LongNetConfig(
        embed_dim=16, num_heads=2, num_layers=2, context=17, vocab_size=11,
        segment_lengths=(5, 17), dilation_rates=(1, 2),
    )  # fmt: skip
    torch.manual_seed(0)
    model = LongNetLM(config).double()
    tokens = torch.randint(11, (3, 18))
    parameters = {name: x.detach() for name, x in model.named_parameters()}

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, row: Tensor) -> Tensor:
            if own:
                return self.model.loss(row[None])
            return torch.nn.functional.cross_entropy(self.model(row[None, :-1])[0], row[1:])

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        named = {f"model.{name}": x for name, x in values.items()}
        found: Tensor = torch.func.functional_call(Loss(), named, (row,))
        return found

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, tokens)
    for i, row in enumerate(tokens):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(row[None, :-1])[0], row[1:]).backward()
        for name, x in model.named_parameters():
            torch.testing.assert_close(each[name][i], x.grad, rtol=1e-9, atol=1e-12)
