"""Activations in host memory: equal gradients, within the budget, returned on every path."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dilated_pool import UnifiedMemoryPool, offload_activations


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.GELU(), nn.LayerNorm(13), nn.Linear(13, 5)).double()


def gradients(net, inputs, context):
    net.zero_grad()
    with context:
        loss = net(inputs).square().mean()
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in net.parameters())]


class Nothing:
    def __enter__(self): ...

    def __exit__(self, *_): ...


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_losses_and_gradients_are_equal(prefetch):
    net, inputs = model(), torch.randn(11, 3, 7, dtype=torch.float64)
    pool = UnifiedMemoryPool()
    expected = gradients(net, inputs, Nothing())
    offload = offload_activations(pool, min_bytes=0, prefetch=prefetch)
    actual = gradients(net, inputs, offload)
    assert all(map(torch.equal, actual, expected))
    assert pool.stats().total_leases >= 3
    assert pool.outstanding() == ()
    assert pool.stats().idle_bytes == pool.stats().reserved_bytes


def test_what_is_parked_lives_in_the_pool_until_backward_needs_it():
    net, inputs = model(), torch.randn(11, 7, dtype=torch.float64)
    pool = UnifiedMemoryPool()
    with offload_activations(pool, min_bytes=0):
        loss = net(inputs).sum()
    # Inputs of both Linear layers, of GELU and of LayerNorm, with its two statistics.
    shapes = sorted(info.shape for info in pool.outstanding())
    assert shapes == [(11, 1), (11, 1), (11, 7), (11, 13), (11, 13), (11, 13)]
    loss.backward()
    assert pool.outstanding() == ()


def test_a_tensor_that_is_saved_often_is_parked_once():
    pool = UnifiedMemoryPool()
    leaf = torch.randn(37, requires_grad=True)
    with offload_activations(pool, min_bytes=0):
        x = leaf * 2
        loss = (x * x + x * x + x.sin()).sum()
        assert len(pool.outstanding()) == 1
    loss.backward()
    expected = 2 * (8 * leaf + torch.cos(2 * leaf))
    torch.testing.assert_close(leaf.grad, expected.detach())


def test_a_tensor_that_was_changed_in_between_is_parked_again():
    pool = UnifiedMemoryPool()
    weight = torch.randn(37, requires_grad=True)
    with offload_activations(pool, min_bytes=0):
        x = torch.full((37,), 2.0)
        first = (weight * x).sum()
        x.fill_(3)
        second = (weight * x).sum()
    (first + second).backward()
    assert (weight.grad == 5).all()


def test_reused_addresses_are_not_mistaken_for_the_same_tensor():
    pool = UnifiedMemoryPool()
    weight = torch.randn(37, requires_grad=True)
    with offload_activations(pool, min_bytes=0):
        # Each factor is freed once it is parked, so the next one often gets its address.
        loss = sum((weight * torch.full((37,), float(k))).sum() for k in range(20))
    loss.backward()
    assert (weight.grad == sum(range(20))).all()


def test_parameters_and_small_tensors_stay():
    net = nn.Linear(7, 13)
    pool = UnifiedMemoryPool()
    with offload_activations(pool, min_bytes=1 << 20):
        net(torch.randn(11, 7)).square().sum().backward()
    assert pool.stats().total_leases == 0
    with offload_activations(pool, min_bytes=0):
        loss = net(torch.randn(11, 7)).sum()
        assert {info.shape for info in pool.outstanding()} == {(11, 7)}
    loss.backward()


def test_what_exceeds_the_budget_stays_on_the_device():
    net, inputs = model(), torch.randn(110, 7, dtype=torch.float64)
    expected = gradients(net, inputs, Nothing())
    for pool in (UnifiedMemoryPool(15_000), UnifiedMemoryPool()):
        if pool.stats().limit_bytes is None:
            pool.lock()
        actual = gradients(net, inputs, offload_activations(pool, min_bytes=0))
        assert all(map(torch.equal, actual, expected))
        assert pool.stats().peak_reserved_bytes <= 15_000


def test_backward_can_go_twice():
    pool = UnifiedMemoryPool()
    leaf = torch.randn(37, requires_grad=True)
    with offload_activations(pool, min_bytes=0):
        loss = (leaf * 2).square().sum()
    loss.backward(retain_graph=True)
    assert len(pool.outstanding()) == 1
    loss.backward()
    torch.testing.assert_close(leaf.grad, 16 * leaf.detach())
    assert pool.outstanding() == ()


class Fail(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ZeroDivisionError("in backward")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_leaves_nothing_outstanding(where):
    pool = UnifiedMemoryPool()
    net, inputs = model(), torch.randn(11, 7, dtype=torch.float64)

    def step():
        with offload_activations(pool, min_bytes=0), pool.borrow((11, 7), dtype=torch.float64) as x:
            x.copy_(inputs)
            hidden = net(x)
            if where == "forward":
                raise ZeroDivisionError("in forward")
            Fail.apply(hidden).sum().backward()

    with pytest.raises(ZeroDivisionError, match=f"in {where}"):
        step()
    gc.collect()
    assert pool.outstanding() == ()
    stats = pool.stats()
    assert (stats.live_bytes, stats.quarantined_bytes) == (0, 0)


def test_a_graph_that_is_dropped_returns_what_it_parked():
    pool = UnifiedMemoryPool()
    with offload_activations(pool, min_bytes=0):
        loss = model()(torch.randn(11, 7, dtype=torch.float64)).sum()
    assert len(pool.outstanding()) > 0
    del loss
    assert pool.outstanding() == ()


def test_it_goes_together_with_checkpointing():
    net, inputs = model(), torch.randn(11, 7, dtype=torch.float64, requires_grad=True)
    pool = UnifiedMemoryPool()
    expected = gradients(net, inputs, Nothing())
    net.zero_grad()
    with offload_activations(pool, min_bytes=0):
        hidden = checkpoint(net[:2], inputs, use_reentrant=False)
        loss = net[2:](hidden).square().mean()
    loss.backward()
    actual = [loss.detach(), *(parameter.grad for parameter in net.parameters())]
    assert all(map(torch.equal, actual, expected))
    assert pool.outstanding() == ()


@pytest.mark.parametrize("name", ["min_bytes", "prefetch"])
def test_wrong_settings_say_what_is_wrong(name):
    with (
        pytest.raises(ValueError, match=f"{name} .* Got -1"),
        offload_activations(UnifiedMemoryPool(), **{name: -1}),
    ):
        pass
