"""Activations in host memory: equal gradients, within the budget, returned on every path."""

import gc
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
    parked = sorted(info.shape[0] // 8 for info in pool.outstanding())
    assert parked == [11, 11, 11 * 7, 11 * 13, 11 * 13, 11 * 13]
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
        assert len(pool.outstanding()) == 2
    second.backward()
    assert (weight.grad == 3).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


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
        assert {info.shape for info in pool.outstanding()} == {(11 * 7 * 4,)}
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


class Save(torch.autograd.Function):
    """Give back what was saved, as it comes in the backward."""

    @staticmethod
    def forward(ctx, weight, *tensors):
        ctx.save_for_backward(*tensors)
        return weight.clone()

    @staticmethod
    def backward(ctx, grad):
        Save.seen = ctx.saved_tensors
        return grad, *(None for _ in ctx.saved_tensors)


def brought_back(pool, *tensors, **options):
    """What comes back of tensors, and the bytes that were parked for them meanwhile."""
    weight = torch.zeros(1, requires_grad=True)
    with offload_activations(pool, **{"min_bytes": 0, **options}):
        out = Save.apply(weight, *tensors)
    parked = sum(info.shape[0] for info in pool.outstanding())
    out.sum().backward()
    assert pool.outstanding() == ()
    return Save.seen, parked


def fill(shape, dtype=torch.float32):
    return torch.arange(math.prod(shape)).to(dtype).view(shape) + 1


VIEWS = {
    "expanded": (lambda: fill((1, 31)).expand(29, 31), 31 * 4),
    "expanded inside": (lambda: fill((5, 1, 7, 1)).expand(5, 11, 7, 13), 5 * 7 * 4),
    "transposed": (lambda: fill((5, 7, 3)).transpose(0, 2), 105 * 4),
    "channels last": (
        lambda: fill((2, 3, 5, 7)).to(memory_format=torch.channels_last), 210 * 4
    ),
    "every third": (lambda: fill((31,))[1::3], 31 * 4),
    "a diagonal": (lambda: fill((7, 7)).diagonal(), 49 * 4),
    "overlapping windows": (lambda: fill((31,)).unfold(0, 5, 1), 31 * 4),
    "conjugated": (lambda: torch.complex(fill((5, 7)), fill((5, 7))).conj(), 35 * 8),
    "negated": (lambda: torch.complex(fill((5, 7)), fill((5, 7))).conj().imag, 0),
    "narrow": (lambda: fill((5, 7), torch.bfloat16), 35 * 2),
    "one number": (lambda: torch.tensor(3.0), 4),
    "nothing": (lambda: fill((0, 3)), 0),
    "a part of a large storage": (lambda: fill((1000,))[500:507], 7 * 4 + 500 * 4 % 64),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_a_tensor_costs_its_storage_and_comes_back_as_it_was(name):
    make, size = VIEWS[name]
    tensor = make()
    (back,), parked = brought_back(UnifiedMemoryPool(), tensor)
    assert parked == size
    assert torch.equal(back, tensor)
    assert (back.dtype, back.shape, back.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert (back.is_conj(), back.is_neg()) == (tensor.is_conj(), tensor.is_neg())


@given(data=st.data())
@settings(max_examples=50)
def test_any_views_of_one_storage_come_back_and_cost_no_more_than_it(data):
    base = fill((data.draw(st.integers(1, 300)),), torch.float64)
    views = []
    for _ in range(data.draw(st.integers(1, 4))):
        sizes = data.draw(st.lists(st.integers(1, 5), max_size=3))
        steps = [data.draw(st.integers(0, 9)) for _ in sizes]
        last = sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
        if last < len(base):
            offset = data.draw(st.integers(0, len(base) - 1 - last))
            views.append(base.as_strided(sizes, steps, offset))
    back, parked = brought_back(UnifiedMemoryPool(), *views)
    assert all(map(torch.equal, back, views))
    assert [x.stride() for x in back] == [x.stride() for x in views]
    whole = [v for v in views if _span(v) * 4 >= base.nbytes]
    assert parked <= base.nbytes + sum(_span(v) + 64 for v in views if _span(v) * 4 < base.nbytes)
    assert not whole or parked >= base.nbytes


def _span(x):
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.itemsize


def test_views_of_one_storage_are_parked_and_brought_back_once():
    packed = fill((5, 3, 11))
    query, key, value = packed.unbind(1)
    again = packed.view(11, 15).T
    back, parked = brought_back(
        UnifiedMemoryPool(), query, key, value, again, packed.view(torch.int32)
    )
    assert parked == packed.nbytes
    assert all(map(torch.equal, back, (query, key, value, again, packed.view(torch.int32))))
    assert len({x.untyped_storage().data_ptr() for x in back}) == 1


def test_what_is_small_stays_even_where_it_is_expanded():
    _, parked = brought_back(UnifiedMemoryPool(), fill((1, 31)).expand(4096, 31), min_bytes=200)
    assert parked == 0


def test_parameters_that_are_frozen_stay_and_so_do_their_views():
    frozen = nn.Parameter(fill((5, 7)), requires_grad=False)
    _, parked = brought_back(UnifiedMemoryPool(), frozen, frozen.T)
    assert parked == 0


CHANGES = {
    "itself": lambda x: x.fill_(3),
    "a view": lambda x: x[:1].fill_(3),
    "its transpose": lambda x: x.T.fill_(3),
    "what it is a view of": lambda x: x._base.add_(1),
    "nothing": lambda x: x.add(1),
}


@pytest.mark.parametrize("min_bytes", [0, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_is_found_as_torch_finds_it(min_bytes, dtype, change):
    """Whether a tensor was parked or stayed, for the pool may have had no room for it."""
    weight = torch.ones(3, 4, dtype=dtype, requires_grad=True)
    for context in (Nothing(), offload_activations(UnifiedMemoryPool(), min_bytes=min_bytes)):
        with context:
            x = torch.full((4, 3), 2.0, dtype=dtype).mT
            loss = (weight * x).sum().abs()
            CHANGES[change](x)
        if change == "nothing":
            (grad,) = torch.autograd.grad(loss, weight)
            assert (grad.abs() == 2).all()
        else:
            with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*version 0"):
                loss.backward()


@pytest.mark.parametrize("min_bytes", [0, 1 << 20])
def test_an_output_that_its_node_saves_is_freed_with_the_graph(min_bytes):
    leaf = torch.randn(37, requires_grad=True)
    with offload_activations(UnifiedMemoryPool(), min_bytes=min_bytes):
        out = leaf.exp()
    alive = weakref.ref(out)
    del out
    assert alive() is None


def test_only_what_chosen_modules_save_is_parked():
    net, inputs = model(), torch.randn(11, 7, dtype=torch.float64)
    pool = UnifiedMemoryPool()
    expected = gradients(net, inputs, Nothing())
    with offload_activations(pool, min_bytes=0, modules=[net[1]]):
        loss = net(inputs).square().mean()
        assert [info.shape for info in pool.outstanding()] == [(11 * 13 * 8,)]
    assert not net[1]._forward_hooks
    assert not net[1]._forward_pre_hooks
    net.zero_grad()
    loss.backward()
    actual = [loss.detach(), *(parameter.grad for parameter in net.parameters())]
    assert all(map(torch.equal, actual, expected))


def test_a_module_whose_forward_fails_parks_nothing_after_it():
    class Broken(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError

    pool, broken = UnifiedMemoryPool(), Broken()
    leaf = torch.randn(37, requires_grad=True)
    with offload_activations(pool, min_bytes=0, modules=[broken]):
        with pytest.raises(ZeroDivisionError):
            broken(leaf)
        loss = (leaf * 2).square().sum()
        assert pool.outstanding() == ()
    loss.backward()


def test_modules_are_modules():
    with (
        pytest.raises(TypeError, match=r"modules must hold torch modules\. Got str\."),
        offload_activations(UnifiedMemoryPool(), modules=["encoder"]),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("where", ["around the model", "inside the function"])
def test_it_parks_what_compiled_code_saves(where):
    net, pool = model(), UnifiedMemoryPool()
    compiled = torch.compile(net, backend="aot_eager")

    def step(x):
        with offload_activations(pool, min_bytes=1):
            return net(x).square().mean()

    if where == "inside the function":
        step = torch.compile(step, backend="aot_eager")
    for rows in (4, 6):
        inputs = torch.randn(rows, 7, dtype=torch.float64)
        expected = gradients(net, inputs, Nothing())
        net.zero_grad()
        if where == "inside the function":
            loss = step(inputs)
        else:
            with offload_activations(pool, min_bytes=1):
                loss = compiled(inputs).square().mean()
        assert len(pool.outstanding()) >= 3
        loss.backward()
        actual = [loss.detach(), *(parameter.grad for parameter in net.parameters())]
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)
        assert pool.outstanding() == ()


@pytest.mark.parametrize("name", ["min_bytes", "prefetch"])
def test_wrong_settings_say_what_is_wrong(name):
    with (
        pytest.raises(ValueError, match=f"{name} .* Got -1"),
        offload_activations(UnifiedMemoryPool(), **{name: -1}),
    ):
        pass
