"""Linear layers whose float32 products are convolutions: what they compute, and when they are."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dilated_core import DilatedPattern, MultiheadDilatedAttention, _linear
from dilated_core.extending import linear
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
    out = linear(layer, x)
    parameters = [x, *layer.parameters()]
    return [out, *torch.autograd.grad(out, parameters, upstream.to(out.dtype))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(ROWS,), (2, ROWS), (3, 2, ROWS), (1, ROWS)])
def test_products_and_gradients_by_convolution_are_those_of_float64(convolutions, bias, shape):
    layer = nn.Linear(IN, OUT, bias=bias)
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
    layer, wide = nn.Linear(IN, OUT), torch.randn(2, ROWS, 3, IN)
    for x in (wide[:, :, 1], wide[0, :, :, ::2].repeat(1, 1, 2), torch.randn(IN, ROWS).T):
        assert relative_error(linear(layer, x), F.linear(x, layer.weight, layer.bias)) < 2e-6
    assert len(convolutions) == 3


def test_second_derivatives_are_those_of_torch(convolutions):
    layer, x = nn.Linear(IN, OUT), torch.randn(ROWS, IN)
    found = []
    for each in (layer, partial(linear, layer)):
        inputs = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(each(inputs).pow(3).sum(), inputs, create_graph=True)
        found += torch.autograd.grad(grad.square().sum(), inputs)
    assert len(convolutions) == 1
    assert relative_error(*found) < 5e-6


def test_what_convolutions_do_not_serve_goes_to_torch(convolutions, monkeypatch):
    layer, x = nn.Linear(IN, OUT), torch.randn(ROWS, IN)
    linear(layer, x[:1])  # too small
    linear(layer, x[:0])
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(layer, x).dtype == torch.bfloat16
    torch.func.vmap(partial(linear, layer))(x.expand(2, ROWS, IN))
    linear(nn.Linear(IN, OUT, dtype=torch.bfloat16), x.bfloat16())
    linear(nn.Linear(IN, OUT, device="meta"), x.to("meta"))
    torch.set_num_threads(1)
    linear(layer, x)
    torch.set_num_threads(2)
    monkeypatch.setattr(_linear, "_prefers_convolutions", lambda: False)
    linear(layer, x)
    assert not convolutions


def test_a_layer_that_is_more_than_its_forward_is_called(convolutions, monkeypatch):
    x = torch.randn(ROWS, IN, requires_grad=True)

    def seen(watch):
        layer, calls = nn.Linear(IN, OUT), []
        handle = watch(layer, lambda *_: calls.append(1))
        linear(layer, x).sum().backward()
        handle.remove()
        return calls

    hooks = (
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
        lambda _, hook: nn.modules.module.register_module_forward_hook(hook),
    )
    assert [seen(watch) for watch in hooks] == [[1]] * len(hooks)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT))
    assert torch.equal(linear(layer, x), layer(x))
    layer = nn.Linear(IN, OUT)
    monkeypatch.setattr(layer, "forward", lambda given: given)  # as accelerate does
    assert linear(layer, x) is x
    assert not convolutions


def test_rows_of_another_width_are_refused_in_torchs_words(convolutions):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(nn.Linear(IN, OUT), torch.randn(4 * ROWS, 2 * IN))
    assert not convolutions


def test_projections_of_attention_are_torchs_layers_and_convolutions(convolutions):
    model = MultiheadDilatedAttention(IN, 2, DilatedPattern((4,), (1,)))
    assert [type(each) for each in model.children()].count(nn.Linear) == 4
    model(torch.randn(1, 2 * ROWS, IN))
    assert len(convolutions) == 4
