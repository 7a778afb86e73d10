"""Linear layers whose float32 products are convolutions: what they compute, and when they are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dilated_core import _linear
from dilated_core.extending import Linear
from dilated_testing import relative_error

IN, OUT, ROWS = 128, 256, 300


@pytest.fixture
def convolutions(monkeypatch):
    """How often products are convolutions, on a machine that prefers them and has two threads."""
    calls = []

    def conv2d(*arguments):
        calls.append(arguments)
        return convolve(*arguments)

    convolve, threads = F.conv2d, torch.get_num_threads()
    monkeypatch.setattr(_linear, "_prefers_convolutions", lambda: True)
    monkeypatch.setattr(F, "conv2d", conv2d)
    torch.set_num_threads(2)
    yield calls
    torch.set_num_threads(threads)


def outcome(layer, x, upstream):
    x = x.detach().requires_grad_()
    out = layer(x)
    parameters = [x, *layer.parameters()]
    return [out, *torch.autograd.grad(out, parameters, upstream.to(out.dtype))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(ROWS,), (2, ROWS), (3, 2, ROWS), (1, ROWS)])
def test_products_and_gradients_by_convolution_are_those_of_float64(convolutions, bias, shape):
    layer = Linear(IN, OUT, bias=bias)
    x, upstream = torch.randn(*shape, IN), torch.randn(*shape, OUT)
    actual = outcome(layer, x, upstream)
    assert len(convolutions) == 1
    expected = outcome(layer.double(), x.double(), upstream)
    assert len(convolutions) == 1
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.shape == other.shape
        assert one.is_contiguous()
        assert relative_error(one, other) < 2e-6


def test_rows_that_do_not_lie_together_are_taken_as_they_are(convolutions):
    layer, wide = Linear(IN, OUT), torch.randn(2, ROWS, 3, IN)
    for x in (wide[:, :, 1], wide[0, :, :, ::2].repeat(1, 1, 2), torch.randn(IN, ROWS).T):
        assert relative_error(layer(x), F.linear(x, layer.weight, layer.bias)) < 2e-6
    assert len(convolutions) == 3


def test_second_derivatives_are_those_of_torch(convolutions):
    layer, x = Linear(IN, OUT), torch.randn(ROWS, IN)
    found = []
    for each in (layer, nn.Linear(IN, OUT)):
        each.load_state_dict(layer.state_dict())
        inputs = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(each(inputs).pow(3).sum(), inputs, create_graph=True)
        found += torch.autograd.grad(grad.square().sum(), inputs)
    assert len(convolutions) == 1
    assert relative_error(*found) < 5e-6


def test_what_convolutions_do_not_serve_goes_to_torch(convolutions, monkeypatch):
    layer, x = Linear(IN, OUT), torch.randn(ROWS, IN)
    layer(x[:1])  # too small
    layer(x[:0])
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    torch.func.vmap(layer)(x.expand(2, ROWS, IN))
    Linear(IN, OUT, dtype=torch.bfloat16)(x.bfloat16())
    Linear(IN, OUT, device="meta")(x.to("meta"))
    torch.set_num_threads(1)
    layer(x)
    torch.set_num_threads(2)
    monkeypatch.setattr(_linear, "_prefers_convolutions", lambda: False)
    layer(x)
    assert not convolutions


def test_a_layer_has_the_weights_of_torchs():
    torch.manual_seed(3)
    ours = Linear(IN, OUT)
    torch.manual_seed(3)
    theirs = nn.Linear(IN, OUT)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(ours.weight, theirs.weight)
    assert isinstance(ours, nn.Linear)
    assert repr(ours) == repr(theirs)
