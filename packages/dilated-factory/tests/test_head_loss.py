"""The loss of a head: torch's cross-entropy and its gradients, from few logits at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dilated_factory.models import head_loss as module
from dilated_factory.models.head_loss import head_loss
from dilated_testing import relative_error


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 11, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(23, 11, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(23, (37,), generator=generator)
    targets[[0, 5, 36]] = -100
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    logits = F.linear(hidden, weight)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, reduction="sum", label_smoothing=smoothing)


def with_gradients(function: Callable[..., Tensor], *inputs: Any) -> list[Tensor]:
    total = function(*inputs)
    return [total.detach(), *torch.autograd.grad(total / 34, inputs[:2])]


@pytest.mark.parametrize(
    ("rows", "smoothing"), [(1, 0.0), (5, 0.3), (36, 0.0), (37, 0.3), (1000, 0.0)]
)
def test_loss_and_gradients_are_torchs(
    rows: int, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOSS_BYTES", 8 * 23 * rows)
    inputs = *problem(), smoothing
    found, expected = with_gradients(head_loss, *inputs), with_gradients(plain, *inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    hidden, weight, *rest = inputs
    assert torch.autograd.gradcheck(lambda h, w: head_loss(h, w, *rest), (hidden, weight))


@pytest.mark.parametrize("rows", [5, 37])
def test_autocast_is_as_exact_as_torchs(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOSS_BYTES", 4 * 23 * rows)
    inputs = problem(torch.float32)
    exact = with_gradients(plain, *(x.double() if x.is_floating_point() else x for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, usual = with_gradients(head_loss, *inputs), with_gradients(plain, *inputs)
    for one, other, wanted in zip(found, usual, exact, strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one, wanted) < 1.5 * relative_error(other, wanted) + 1e-3


def test_bfloat16_weights_have_a_float32_loss() -> None:
    inputs = problem(torch.bfloat16)
    found, expected = with_gradients(head_loss, *inputs), with_gradients(plain, *inputs)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-2


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.size = max([self.size, *sizes])
        return result


def test_logits_of_the_whole_sequence_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOSS_BYTES", 4 * 1000 * 7)
    hidden = torch.randn(500, 4, requires_grad=True)
    weight = torch.randn(1000, 4, requires_grad=True)
    with LargestTensor() as largest:
        head_loss(hidden, weight, torch.randint(1000, (500,))).backward()
    assert largest.size <= 7 * 1000


def test_gradients_are_made_only_where_they_are_wanted() -> None:
    hidden, weight, targets = problem()
    with torch.no_grad(), LargestTensor() as largest:
        total = head_loss(hidden, weight, targets)
    assert not total.requires_grad
    torch.testing.assert_close(total, plain(hidden, weight, targets))
    frozen = head_loss(hidden, weight.detach(), targets)
    expected = plain(hidden, weight, targets)
    found = torch.autograd.grad(frozen, hidden)
    torch.testing.assert_close(found, torch.autograd.grad(expected, hidden))
    assert largest.size == 37 * 23


def test_nothing_of_a_position_that_is_left_out_is_in_the_loss() -> None:
    hidden, weight, targets = problem()
    broken = hidden.detach().clone()
    broken[[0, 5, 36]] = torch.nan
    broken.requires_grad_()
    found = with_gradients(head_loss, broken, weight, targets)
    assert found[0].isfinite()
    assert found[1].isfinite().all()


@pytest.mark.parametrize("target", [23, -1])
def test_a_target_outside_of_the_vocabulary_is_an_error(target: int) -> None:
    hidden, weight, targets = problem()
    targets[3] = target
    with pytest.raises(RuntimeError, match=f"index {target} is out of bounds"):
        head_loss(hidden, weight, targets)


def test_second_derivatives_are_refused() -> None:
    """Torch's once_differentiable lets them pass, without a term, where the loss is summed."""
    hidden, weight, targets = problem()
    total = head_loss(hidden, weight, targets) + hidden.pow(3).sum()
    with pytest.raises(RuntimeError, match=r"differentiated once only. Got create_graph=True"):
        torch.autograd.grad(total, hidden, create_graph=True)
