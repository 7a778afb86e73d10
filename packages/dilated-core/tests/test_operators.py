"""Operators: an eager call reaches its backend as it is, and only a traced one is taken apart."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dilated_core import DilatedPattern, _branches, dilated_attention, dilated_attention_varlen
from dilated_core._branches import Branches
from dilated_core._operators import OperatorForm, define
from dilated_core._partial import Partial

PATTERN = DilatedPattern([5, 11], [1, 2])


class RefusedError(Exception):
    """Raised by what must not happen."""


@pytest.fixture
def no_packing(monkeypatch):
    """Names no pattern by its code, makes none from a code, and reads or writes no JSON."""

    def refuse(*_, **__):
        raise RefusedError

    monkeypatch.setattr(_branches.json, "dumps", refuse)
    monkeypatch.setattr(_branches.json, "loads", refuse)
    monkeypatch.setattr(Branches, "from_code", refuse)
    monkeypatch.setattr(Branches, "code", property(refuse))


def inputs():
    return [torch.randn(2, 23, 3, 7, requires_grad=True) for _ in "qkv"]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.3}])
def test_an_eager_call_is_not_taken_apart(no_packing, options):
    x = inputs()
    mask = torch.rand(2, 23) < 0.3
    out = dilated_attention(*x, PATTERN, key_padding_mask=mask, **options)
    torch.autograd.grad(out.sum(), x)
    packed = [t[0] for t in x]
    out = dilated_attention_varlen(*packed, torch.tensor([0, 7, 23]), PATTERN, **options)
    torch.autograd.grad(out.sum(), x)


def test_a_call_that_a_mode_sees_is_taken_apart(no_packing):
    """What the test above must see, were it there."""

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            return function(*arguments, **(options or {}))

    with Watching(), pytest.raises(RefusedError):
        dilated_attention(*inputs(), PATTERN)


def test_what_an_operator_returns_shares_no_memory():
    def forward(call, query, key, value):
        return Partial(query * 2, query.new_zeros(query.shape[:2]))

    def backward(call, upstream):
        return torch.stack([upstream.grad_out, upstream.key, upstream.value]).unbind()

    form = OperatorForm("bool flag", lambda call: (), lambda call: (call,), lambda q, k, flag: flag)
    operators = define("dilated_tests::shared", form, forward, backward, lambda query: query)
    query, key, value = (x.detach() for x in inputs())
    lse = torch.zeros(query.shape[:2])
    grads = operators.backward(query, None, query, key, value, query, lse, True)
    for actual, expected in zip(grads, (query, key, value), strict=True):
        assert torch.equal(actual, expected)
    assert len({x.untyped_storage().data_ptr() for x in grads}) == 3
    wanted = [x.requires_grad_() for x in (query, key, value)]
    eager = torch.autograd.grad(operators.attend(True, *wanted).out.sum(), wanted)
    assert len({x.untyped_storage().data_ptr() for x in eager}) == 1


def test_a_mask_that_changes_before_the_backward_is_an_error():
    x = inputs()
    mask = torch.rand(2, 23) < 0.3
    out = dilated_attention(*x, PATTERN, key_padding_mask=mask, backend="torch")
    mask.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
