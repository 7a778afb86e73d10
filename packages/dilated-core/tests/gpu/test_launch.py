"""Launches: the binary of the first one serves again where all that it depends on is the same."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton import JITFunction, knobs

from dilated_core._triton import _triton_internals
from dilated_core._triton._triton_internals import Launch, can_relaunch


class Kernel(JITFunction):
    """A kernel (a, table, b, number, WIDE, TALL) that notes how it is launched."""

    def __init__(self):
        self.arg_names = ["a", "table", "b", "number", "WIDE", "TALL"]
        self.pre_run_hooks, self.launched, self.relaunched = [], [], []

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            self.launched.append((grid, arguments, named))
            return SimpleNamespace(run=self.run_binary, function="f", packed_metadata="m")

        return launch

    def run_binary(self, *arguments):
        self.relaunched.append(arguments)


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(_triton_internals, "can_relaunch", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 77, raising=False)
    return Kernel()


def launch_of(kernel):
    table = torch.zeros(64)
    return Launch(kernel, 5, [table], [0.5], {"TALL": 2, "WIDE": 1}, {"num_warps": 4}), table


def test_the_second_launch_runs_the_binary_with_addresses(kernel):
    launch, table = launch_of(kernel)
    a, b = torch.zeros(64), torch.zeros(64)
    launch([a], b)
    assert kernel.launched == [((5,), (a, table, b, 0.5), {"TALL": 2, "WIDE": 1, "num_warps": 4})]
    other = torch.zeros(64)
    launch([other], b)
    assert len(kernel.launched) == 1
    addresses = other.data_ptr(), table.data_ptr(), b.data_ptr()
    # Compile-time arguments are in the order of the kernel.
    rest = 0.5, 1, 2
    assert kernel.relaunched == [(5, 1, 1, 77, "f", "m", None, None, None, *addresses, *rest)]


def test_an_address_that_16_does_not_divide_goes_through_the_door(kernel):
    launch, _ = launch_of(kernel)
    a = torch.zeros(64)
    for tensor in (a, a, a[1:], a):
        launch([tensor], a)
    assert len(kernel.launched) == 2
    assert len(kernel.relaunched) == 2


def test_a_first_address_that_16_does_not_divide_leaves_no_binary(kernel):
    launch, _ = launch_of(kernel)
    a = torch.zeros(64)
    for tensor in (a[1:], a, a):
        launch([tensor], a)
    assert len(kernel.launched) == 2


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_each_launch(kernel, name):
    launch, _ = launch_of(kernel)
    a = torch.zeros(64)
    launch([a], a)
    hook = getattr(knobs.runtime, name)
    hook.add(print)
    try:
        launch([a], a)
    finally:
        hook.remove(print)
    launch([a], a)
    assert len(kernel.launched) == 2
    assert len(kernel.relaunched) == 1


def test_a_triton_that_calls_binaries_in_another_way_is_not_second_guessed(monkeypatch):
    can_relaunch.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert can_relaunch()
    can_relaunch.cache_clear()
    monkeypatch.setattr(JITFunction, "run", lambda *_: None)
    assert not can_relaunch()
    monkeypatch.undo()
    can_relaunch.cache_clear()
