"""Launches: the binary of the first one serves again where all that it depends on is the same."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton import JITFunction, knobs

from dilated_core import DilatedPattern
from dilated_core._call import DilatedCall, Scores, Upstream
from dilated_core._triton import _launch, _pattern_plans, _triton_internals
from dilated_core._triton._plan import PlanCache, TilePlan
from dilated_core._triton._triton_internals import Launch, Relaunch, can_relaunch


class Kernel(JITFunction):
    """A kernel (a, tables, b, c, d, number, WIDE, TALL) that notes how it is launched."""

    def __init__(self):
        self.arg_names = ["a", *"tables", "b", "c", "d", "number", "WIDE", "TALL"]
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
    return Kernel()


def launch_of(kernel):
    plan = TilePlan(*(torch.zeros(64) for _ in range(5)), largest_step=1, mask=0)
    launch = Launch(kernel, 5, plan, [0.5], {"TALL": 2, "WIDE": 1}, {"num_warps": 4})
    return launch, plan.tensors()


def addresses(*tensors):
    return [x.data_ptr() for x in tensors]


def test_the_second_launch_runs_the_binary_with_addresses(kernel):
    launch, tables = launch_of(kernel)
    a, b = torch.zeros(64), torch.zeros(64)
    launch(77, [a], (None, b, None))
    given = a, *tables, tables[0], b, tables[0], 0.5
    assert kernel.launched == [((5,), given, {"TALL": 2, "WIDE": 1, "num_warps": 4})]
    other = torch.zeros(64)
    # Compile-time arguments are in the order of the kernel.
    for others, last in (
        ((None, other, None), (tables[0], other, tables[0])),
        ((), tables[:1] * 3),
    ):
        launch(77, [other], others)
        expected = addresses(other, *tables, *last)
        binary = 5, 1, 1, 77, "f", "m", None, None, None
        assert kernel.relaunched.pop() == (*binary, *expected, 0.5, 1, 2)
    assert len(kernel.launched) == 1


@pytest.mark.parametrize("place", [0, 1])
def test_an_address_that_16_does_not_divide_goes_through_the_door(kernel, place):
    launch, _ = launch_of(kernel)
    a = torch.zeros(64)
    for tensor in (a, a, a[1:], a):
        given = [a, a]
        given[place] = tensor
        launch(0, given[:1], (None, None, given[1]))
    assert len(kernel.launched) == 2
    assert len(kernel.relaunched) == 2


def test_a_first_address_that_16_does_not_divide_leaves_no_binary(kernel):
    launch, _ = launch_of(kernel)
    a = torch.zeros(64)
    for tensor in (a[1:], a, a):
        launch(0, [tensor], ())
    assert len(kernel.launched) == 2


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_each_launch(kernel, name):
    launch, _ = launch_of(kernel)
    a = torch.zeros(64)
    launch(0, [a], ())
    hook = getattr(knobs.runtime, name)
    hook.add(print)
    try:
        launch(0, [a], ())
    finally:
        hook.remove(print)
    launch(0, [a], ())
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


def test_a_kernel_is_relaunched_by_the_binary_of_the_same_facts(kernel, monkeypatch):
    monkeypatch.setattr(_triton_internals, "raw_stream", lambda device: 70 + device)
    launch = Relaunch(kernel)
    a, b = torch.zeros(64), torch.zeros(64)
    for tensors, facts, rest in (
        ((a, None, b), "one", (0.5, 2)),
        ((b, None, a), "one", (0.25, 2)),  # by the binary
        ((a, b, b), "two", (0.5, 2)),
        ((a[1:], None, b), "one", (0.5, 2)),  # 16 does not divide it
        ((a, None, a), "one", (0.5, 2)),  # by the binary
    ):
        launch(facts, 5, tensors, rest, num_warps=4)
    assert [given[1] for given in kernel.launched] == [
        (a, None, b, 0.5, 2), (a, b, b, 0.5, 2), (kernel.launched[2][1][0], None, b, 0.5, 2)
    ]  # fmt: skip
    assert {given[0] for given in kernel.launched} == {(5,)}
    assert all(given[2] == {"num_warps": 4} for given in kernel.launched)
    binary = 5, 1, 1, 69, "f", "m", None, None, None  # a tensor of the CPU says device -1
    assert kernel.relaunched == [
        (*binary, b.data_ptr(), None, a.data_ptr(), 0.25, 2),
        (*binary, a.data_ptr(), None, a.data_ptr(), 0.5, 2),
    ]
    monkeypatch.setattr(_triton_internals, "_MOST_BINARIES", 2)
    launch("three", 5, (a, None, b), (0.5, 2))
    launch("one", 5, (a, None, b), (0.5, 2))
    assert len(kernel.launched) == 5


class Recorded:
    """Stands in for `Launch`: which launches are made, and each time that one is launched."""

    made: list["Recorded"]
    launched: list["Recorded"]

    def __init__(self, kernel, grid, plan, numbers, constants, options):
        self.kernel, self.plan, self.numbers, self.constants = kernel, plan, numbers, constants
        self.stream = plan.stream
        self.made.append(self)

    def __call__(self, stream, tensors, others):
        self.launched.append(self)


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(Recorded, "made", [], raising=False)
    monkeypatch.setattr(Recorded, "launched", [], raising=False)
    monkeypatch.setattr(_launch, "Launch", Recorded)
    monkeypatch.setattr(_pattern_plans, "_cache", PlanCache())
    return Recorded


BASE = {
    "pattern": DilatedPattern([61, 127], [1, 2]), "length": 127, "key_length": 127, "heads": 6,
    "kv_heads": 6, "is_causal": False, "scale": 0.25, "padding": False, "dropout_p": 0.0,
    "dtype": torch.bfloat16, "first_key": 0, "spread": 1, "grad_lse": None, "wide": False,
    "grad_dtype": torch.bfloat16, "cu_seqlens": None,
}  # fmt: skip


def step(**changed):
    """A forward and a backward."""
    case = BASE | changed
    dtype, spread = case["dtype"], case["spread"]

    def rows(length, heads):
        return torch.zeros(2, length, heads * spread, 32, dtype=dtype)[:, :, ::spread]

    query = rows(case["length"], case["heads"])
    key, value = (rows(case["key_length"], case["kv_heads"]) for _ in "kv")
    mask = torch.zeros(2, case["key_length"], dtype=torch.bool) if case["padding"] else None
    seed = torch.tensor(1) if case["dropout_p"] else None
    scores = Scores(case["is_causal"], case["scale"], mask, case["dropout_p"], seed)
    asked = DilatedCall(case["pattern"], scores, case["cu_seqlens"])
    call = _launch.pattern_call(asked, query, key, value, case["first_key"])
    total = _launch.forward(call, wide=case["wide"])
    grad_out = torch.zeros(total.out.shape, dtype=case["grad_dtype"])
    grad_lse = None if case["grad_lse"] is None else case["grad_lse"](total.lse)
    upstream = Upstream(grad_out, grad_lse, query, key, value, total)
    _launch.backward(call, upstream, wide=case["wide"])


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"pattern": DilatedPattern([61, 127], [1, 3])},
        {"length": 113},
        {"length": 113, "is_causal": True},
        {"key_length": 131},
        {"heads": 12},
        {"is_causal": True},
        {"scale": 0.5},
        {"padding": True},
        {"dropout_p": 0.5},
        {"dtype": torch.float16},
        {"first_key": 61},
        {"spread": 3},
        {"grad_lse": torch.zeros_like},
        {"grad_lse": lambda lse: lse},
        {"wide": True},
        {"grad_dtype": torch.float32},
    ],
)  # fmt: skip
def test_launches_are_made_once_for_all_that_they_depend_on(recorded, changed):
    # A plan that is built clears the launches, so all plans come first.
    for case in ({}, changed, {}, changed):
        step(**case)
    del recorded.launched[:], recorded.made[:]
    for case in ({}, changed, {}, changed):
        step(**case)
    plain, other, *rest = (recorded.launched[at : at + 3] for at in range(0, 12, 3))
    assert rest == [plain, other]
    assert not recorded.made
    assert (plain == other) is (not changed)


def test_a_gradient_to_lse_that_is_lse_itself_is_one(recorded):
    for _ in range(2):
        step()
        step(grad_lse=lambda lse: lse)
    given = [made.constants["GRAD_LSE"] for made in recorded.launched[-5::3]]
    assert given == [False, True]


def test_launches_of_a_plan_that_is_gone_are_gone(recorded):
    step()
    first = recorded.launched[0]
    for length in range(200, 230):
        step(length=length, key_length=length)
    step()
    assert recorded.launched[-3] is not first
    assert recorded.launched[-3].plan is not first.plan


def test_packed_sequences_launch_anew_with_each_plan(recorded):
    for _ in range(2):
        step(cu_seqlens=torch.tensor([0, 61, 127]))
    assert len(recorded.made) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("most", [0, 2**20])
@pytest.mark.parametrize("wide", [False, True])
def test_gradients_are_contiguous_aligned_and_apart(monkeypatch, dtype, most, wide):
    monkeypatch.setattr(_launch, "_ONE_ALLOCATION", most)
    _launch._rooms.cache_clear()
    query = torch.zeros(2, 5, 3, 7, dtype=dtype)
    key, lse = torch.zeros(2, 11, 1, 7, dtype=dtype), torch.zeros(2, 3, 5)
    found = _launch.empty_grads(query, key, lse, wide)
    monkeypatch.undo()
    _launch._rooms.cache_clear()
    assert [x.shape for x in found] == [query.shape, key.shape, key.shape, lse.shape]
    kind = torch.float32 if wide else dtype
    assert [x.dtype for x in found] == [kind, kind, kind, torch.int64]
    assert all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in found)
    for number, x in enumerate(found):
        x.fill_(number)
    assert all((x == number).all() for number, x in enumerate(found))
    # A change of one is not one of the others to autograd.
    assert [x._version for x in found] == [1] * 4
    assert len({x.untyped_storage().data_ptr() for x in found}) == (1 if most else 4)
