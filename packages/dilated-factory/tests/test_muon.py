"""Muon of many matrices at once is torch's Muon, but for rounding."""

import pytest
import torch
from torch import nn
from torch.optim import Muon

from dilated_factory.training.muon import GroupedMuon, orthogonalised

SHAPES = [(7, 11), (11, 7), (5, 5), (7, 11), (5, 5), (11, 7)]


@pytest.mark.parametrize("nesterov", [False, True])
def test_grouped_steps_are_torchs(nesterov: bool) -> None:
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in SHAPES]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    steppers = [
        kind(weights, lr=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw")
        for kind, weights in ((GroupedMuon, ours), (Muon, theirs))
    ]
    for step in range(3):
        for index, shape in enumerate(SHAPES):
            # One matrix without a gradient: it must stay as it is.
            grad = None if index == 4 else torch.randn(shape)
            ours[index].grad = grad
            theirs[index].grad = None if grad is None else grad.clone()
        for stepper in steppers:
            stepper.step()
        assert step >= 2 or not torch.equal(ours[0], start[0])
    for mine, expected, first in zip(ours, theirs, start, strict=True):
        moved = (expected - first).norm()
        assert (mine - expected).norm() <= 0.01 * moved  # bfloat16 inside
    states = [list(stepper.state.values()) for stepper in steppers]
    for mine, expected in zip(*states, strict=True):
        torch.testing.assert_close(mine["momentum_buffer"], expected["momentum_buffer"])


@pytest.mark.parametrize("shape", [(3, 8, 13), (3, 13, 8)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape).bfloat16()
    values = torch.linalg.svdvals(
        orthogonalised(matrices, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    )
    assert values.min() > 0.4
    assert values.max() < 1.4
