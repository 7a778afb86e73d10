"""A torch citizen: compile, export, autocast, checkpointing, pickling, threads, empty inputs."""

import copy
import multiprocessing
import operator
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from dilated_core import (
    DilatedAttention,
    DilatedPattern,
    MultiheadDilatedAttention,
    dilated_attention,
    dilated_attention_varlen,
)
from dilated_core._torch.engine import OPERATORS
from dilated_testing import Problem, relative_error

PATTERN = DilatedPattern([5, 11], [1, 2])


def qkv(length=23, batch=2, dtype=torch.float64):
    return tuple(torch.randn(batch, length, 3, 7, dtype=dtype, requires_grad=True) for _ in "qkv")


def problem(**options):
    defaults = {
        "batch": 2, "length": 23, "key_length": 23, "heads": 4, "kv_heads": 2, "head_dim": 3,
        "is_causal": True, "padding": 0.3, "dropout_p": 0.0, "seed": 3,
    }  # fmt: skip
    return Problem(PATTERN, **(defaults | options))


# torch.compile itself warns of its own deprecations; ours would still be errors elsewhere.
compiling = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")


@compiling
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.4}, {"is_causal": False, "padding": 0.0}])
def test_compile_fullgraph_equals_eager(options):
    torch.compiler.reset()
    case = problem(**options)
    compiled = torch.compile(dilated_attention, fullgraph=True, backend="aot_eager")
    eager = case.run(None, case.tensors())
    actual = case.run(None, case.tensors(), attention=compiled)
    if case.dropout_p:
        # The compiler draws its own seed; what must hold is that backward uses forward's.
        assert actual["dq"].isfinite().all()
    else:
        for name, expected in eager.items():
            assert relative_error(actual[name], expected) < 1e-10, name


@compiling
def test_compile_does_not_recompile_for_another_batch():
    torch.compiler.reset()
    layer = MultiheadDilatedAttention(48, 6, PATTERN)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for batch in (2, 3, 7):
        x = torch.randn(batch, 23, 48)
        torch.testing.assert_close(compiled(x, is_causal=True)[0], layer(x, is_causal=True)[0])
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 3


@compiling
def test_compile_packed_sequences():
    torch.compiler.reset()
    q, k, v = (x.detach()[0].requires_grad_() for x in qkv())
    ends = torch.tensor([0, 7, 23])
    compiled = torch.compile(dilated_attention_varlen, fullgraph=True, backend="aot_eager")
    expected = dilated_attention_varlen(q, k, v, ends, PATTERN)
    assert relative_error(compiled(q, k, v, ends, PATTERN), expected) < 1e-10


@compiling
def test_operators_pass_opcheck():
    q, k, v = qkv()
    mask = torch.rand(2, 23) < 0.3
    rest = (mask, torch.tensor(5), None, PATTERN.code, False, 0.3, 0.25)
    torch.library.opcheck(OPERATORS.forward, (q, k, v, *rest))
    out, lse = OPERATORS.forward(q, k, v, *rest)
    detached = [x.detach() for x in (q, k, v, out, lse)]
    for grad_lse in (None, torch.randn_like(detached[4])):
        arguments = (torch.randn_like(detached[3]), grad_lse, *detached, *rest)
        torch.library.opcheck(OPERATORS.backward, arguments)


def test_second_derivatives_are_refused_not_wrong():
    q, k, v = qkv()
    out = dilated_attention(q, k, v, PATTERN, backend="torch")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


@compiling
def test_tangents_are_refused_not_dropped():
    q, k, v = (x.detach() for x in qkv())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="jvp"):
            dilated_attention(dual, k, v, PATTERN, backend="torch")
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda x: dilated_attention(x, k, v, PATTERN), (q,), (torch.ones_like(q),))


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "padding": 0.3}])
def test_torch_func_has_the_gradients_of_autograd(options):
    # A torch.library.custom_op has none there (torch 2.13): it must override setup_context.
    q, k, v = (x.detach() for x in qkv())
    padding = options.pop("padding", None)
    options = {**options, "return_lse": True, "backend": "torch"}
    if padding:
        options["key_padding_mask"] = torch.rand(k.shape[:2]) < padding
    weights = torch.randn_like(q), torch.randn(q.shape[0], q.shape[2], q.shape[1]).to(q.dtype)

    def loss(*inputs):
        out, lse = dilated_attention(*inputs, PATTERN, **options)
        return (out * weights[0]).sum() + (lse.clamp(min=-1e3) * weights[1]).sum()

    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    actual = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
    out, pull = torch.func.vjp(loss, q, k, v)
    for one, two, three in zip(actual, pull(torch.ones_like(out)), expected, strict=True):
        assert relative_error(one, three) < 1e-12
        assert torch.equal(one, two)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_torch_func_has_a_gradient_for_each_sample():
    q, k, v = (x.detach() for x in qkv())
    weight = torch.randn_like(q)

    def loss(q, k, v, weight):
        out = dilated_attention(q[None], k[None], v[None], PATTERN, is_causal=True, backend="torch")
        return (out[0] * weight).sum()

    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v, weight)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = dilated_attention(*inputs, PATTERN, is_causal=True, backend="torch")
    for actual, expected in zip(each, torch.autograd.grad(out, inputs, weight), strict=True):
        assert relative_error(actual, expected) < 1e-12


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_torch_func_has_the_jacobian():
    q, k, v = (x.detach() for x in qkv())

    def sums(q):
        return dilated_attention(q, k, v, PATTERN, backend="torch").sum((0, 2, 3))

    expected = torch.autograd.functional.jacobian(sums, q)
    assert relative_error(torch.func.jacrev(sums)(q), expected) < 1e-12


def test_torch_func_has_gradients_of_outer_levels():
    q, k, v = (x.detach() for x in qkv())

    def loss(q, k):
        return dilated_attention(q, k, v, PATTERN, backend="torch").square().sum()

    def value(k):
        return torch.func.grad_and_value(loss)(q, k)[1]

    expected = torch.func.grad(loss, argnums=1)(q, k)
    assert relative_error(torch.func.grad(value)(k), expected) < 1e-12
    leaf = k.clone().requires_grad_()
    value(leaf).backward()
    assert relative_error(leaf.grad, expected) < 1e-12


@pytest.mark.parametrize("outer", ["torch.func", "autograd"])
def test_torch_func_is_refused_second_derivatives(outer):
    q, k, v = (x.detach() for x in qkv())

    def loss(q, k):
        return dilated_attention(q, k, v, PATTERN, backend="torch").square().sum()

    def slope(k):
        return torch.func.grad(loss)(q, k).square().sum()

    def by_autograd(k):
        slope(k.requires_grad_()).backward()

    differentiate = by_autograd if outer == "autograd" else torch.func.grad(slope)
    with pytest.raises(RuntimeError, match="differentiated once"):
        differentiate(k)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # hessian
@pytest.mark.parametrize("loss_is", ["linear", "square"])
@pytest.mark.parametrize("way", ["penalty", "functional", "jvp", "forward mode", "jvp of a slope"])
def test_no_second_derivative_is_silently_zero(way, loss_is):
    # torch's once_differentiable gives none where the gradient of out needs none.
    q, k, v = (x.detach() for x in qkv())
    weight = torch.randn_like(q)

    def loss(q):
        out = dilated_attention(q, k, v, PATTERN, backend="torch")
        return (out * (weight if loss_is == "linear" else out)).sum() + q.pow(3).sum()

    def penalty():
        leaf = q.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        slope.square().sum().backward()

    differentiate = {
        "penalty": penalty,
        "functional": lambda: torch.autograd.functional.hessian(loss, q),
        "jvp": lambda: torch.autograd.functional.jvp(loss, q, weight),
        "forward mode": lambda: torch.func.hessian(loss)(q),
        "jvp of a slope": lambda: torch.func.jvp(torch.func.grad(loss), (q,), (weight,)),
    }[way]
    with pytest.raises(RuntimeError, match=r"differentiated once|implement the jvp"):
        differentiate()


@compiling
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gradients_of_torch_func_are_those_of_eager(backend):
    torch.compiler.reset()
    q, k, v = (x.detach() for x in qkv())
    weight = torch.randn_like(q)

    def slope(q):
        def loss(q):
            out = dilated_attention(q, k, v, PATTERN, is_causal=True, backend="torch")
            return (out * weight).sum()

        return torch.func.grad(loss)(q)

    compiled = torch.compile(slope, fullgraph=True, backend=backend)
    assert relative_error(compiled(q), slope(q)) < 1e-12


@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_mode_sees_each_call_as_one_operator(needs_grad):
    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            self.names.append(function.name())
            return function(*arguments, **(options or {}))

    q, k, v = (x.detach().requires_grad_(needs_grad) for x in qkv())
    with Names() as forward:
        out = dilated_attention(q, k, v, PATTERN, backend="torch")
    assert forward.names.count("dilated_core::torch_forward") == 1
    if needs_grad:
        out = dilated_attention(q, k, v, PATTERN, backend="torch")
        grad_out = Tagged(torch.ones_like(out))
        with Names() as backward:
            torch.autograd.grad(out, q, grad_out)
        assert backward.names.count("dilated_core::torch_backward") == 1


@compiling
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes become constants
def test_a_trace_has_one_operator():
    q, k, v = (x.detach() for x in qkv())
    traced = torch.jit.trace(lambda *x: dilated_attention(*x, PATTERN, backend="torch"), (q, k, v))
    assert str(traced.graph).count("dilated_core::torch_forward") == 1
    doubled = traced(2 * q, k, v)
    assert torch.equal(doubled, dilated_attention(2 * q, k, v, PATTERN, backend="torch"))


class Tagged(torch.Tensor):
    """A tensor of a class of its own."""


def test_lazily_negated_tensors():
    q, k, v = qkv()
    minus = torch._neg_view(q.detach()).requires_grad_()
    assert minus.is_neg()
    ones = torch.ones_like(q)
    expected = dilated_attention(-q, k, v, PATTERN, backend="torch")
    actual = dilated_attention(minus, k, v, PATTERN, backend="torch")
    assert torch.equal(actual, expected)
    (from_view,) = torch.autograd.grad(actual, minus, torch._neg_view(ones))
    (from_copy,) = torch.autograd.grad(expected, q, ones)
    assert torch.equal(from_view, from_copy)


@compiling
# torch.compile looks at `out` where its graph breaks, which is at the backward.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_step_that_is_compiled_with_its_backward():
    def step(q, k, v):
        out = dilated_attention(q, k, v, PATTERN, backend="torch")
        out.square().sum().backward()
        return out.detach()

    inputs = qkv()
    copies = [x.detach().clone().requires_grad_() for x in inputs]
    assert torch.equal(torch.compile(step, backend="eager")(*inputs), step(*copies))
    for x, y in zip(inputs, copies, strict=True):
        assert torch.equal(x.grad, y.grad)


@compiling
def test_export_of_a_module():
    layer = MultiheadDilatedAttention(48, 6, PATTERN).eval()

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, is_causal=True)[0]

    x = torch.randn(2, 23, 48)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Causal(), (x,), dynamic_shapes={"x": {0: batch}})
    torch.testing.assert_close(program.module()(x), layer(x, is_causal=True)[0])
    more = torch.randn(5, 23, 48)
    torch.testing.assert_close(program.module()(more), layer(more, is_causal=True)[0])


def test_autocast_does_not_reach_into_an_operator():
    """Dropout takes the path of plain matrix products, whose accumulator is wide."""
    outs = []
    for enabled in (False, True):
        torch.manual_seed(3)
        q, k, v = (x.detach().bfloat16() for x in qkv())
        torch.manual_seed(4)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outs.append(dilated_attention(q, k, v, PATTERN, dropout_p=0.3))
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype):
    q, k, v = qkv(dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        out = dilated_attention(q, k, v, PATTERN)
        packed = dilated_attention_varlen(q[0], k[0], v[0], torch.tensor([0, 23]), PATTERN)
    assert out.dtype == packed.dtype == dtype
    low = dilated_attention(*(x.to(dtype) for x in (q, k, v)), PATTERN)
    assert torch.equal(out, low)
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert all(g.dtype == torch.float32 for g in grads)
    with torch.autocast("cpu", dtype=dtype):
        assert dilated_attention(*qkv(), PATTERN).dtype == torch.float64


def test_meta_tensors_have_shapes():
    q = torch.randn(2, 23, 6, 8, device="meta")
    k = torch.randn(2, 23, 2, 8, device="meta")
    out, lse = dilated_attention(q, k, k, PATTERN, enable_gqa=True, return_lse=True)
    assert (out.shape, out.device.type) == (q.shape, "meta")
    assert lse.shape == (2, 6, 23)
    layer = MultiheadDilatedAttention(48, 6, PATTERN, device="meta")
    assert layer(torch.randn(2, 23, 48, device="meta"))[0].shape == (2, 23, 48)


def test_deepcopy_pickle_and_state_dict():
    layer = MultiheadDilatedAttention(48, 6, PATTERN, dropout=0.1).eval()
    x = torch.randn(2, 23, 48)
    expected = layer(x)[0]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x)[0], expected)
    fresh = MultiheadDilatedAttention(48, 6, PATTERN).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x)[0], expected)
    assert set(layer.state_dict()) == {
        f"{name}.{part}"
        for name in ("q_proj", "k_proj", "v_proj", "inner_norm", "out_proj")
        for part in ("weight", "bias")
    }


def test_a_module_travels_to_a_spawned_process():
    layer = MultiheadDilatedAttention(48, 6, PATTERN).requires_grad_(False)
    x = torch.randn(1, 7, 48)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        out, _ = pool.apply(operator.call, (layer, x))
    torch.testing.assert_close(out, layer(x)[0])


def test_activation_checkpointing_gives_the_same_gradients():
    layer = MultiheadDilatedAttention(48, 6, PATTERN, dropout=0.3)
    x = torch.randn(2, 23, 48, requires_grad=True)
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        if checkpointed:
            out = torch.utils.checkpoint.checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)
        else:
            out = layer(x)[0]
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(out, [x, *layer.parameters()], torch.randn(2, 23, 48)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_inference_mode():
    layer = MultiheadDilatedAttention(48, 6, PATTERN).eval()
    x = torch.randn(2, 23, 48)
    with torch.inference_mode():
        out = layer(x)[0]
    assert out.is_inference()
    torch.testing.assert_close(out.clone(), layer(x)[0].detach())


@pytest.mark.parametrize(
    ("batch", "length", "key_length"), [(0, 23, 23), (2, 0, 0), (2, 0, 7), (2, 7, 0), (0, 0, 0)]
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_empty_inputs_give_empty_or_zero_outputs(batch, length, key_length, backend):
    q = torch.randn(batch, length, 3, 5, requires_grad=True)
    k = torch.randn(batch, key_length, 3, 5, requires_grad=True)
    out, lse = dilated_attention(q, k, k, PATTERN, return_lse=True, backend=backend)
    assert out.shape == q.shape
    assert lse.shape == (batch, 3, length)
    if not key_length:
        assert not out.any()
        assert (lse == -torch.inf).all()
    dq, dk = torch.autograd.grad(out.sum(), (q, k))
    assert not dq.any() or key_length
    assert dk.shape == k.shape


def test_one_token():
    q, k, v = qkv(length=1)
    out = dilated_attention(q, k, v, DilatedPattern([5], [1]), is_causal=True)
    torch.testing.assert_close(out, v)


def test_threads_agree():
    layer = DilatedAttention(PATTERN)
    inputs = [qkv(length=length) for length in range(1, 33)]
    expected = [layer(*x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        actual = list(pool.map(lambda x: layer(*x), inputs))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_gradients_only_where_they_are_wanted():
    q, k, v = qkv()
    for wanted in (q, k, v):
        inputs = [x if x is wanted else x.detach() for x in (q, k, v)]
        (grad,) = torch.autograd.grad(dilated_attention(*inputs, PATTERN).sum(), wanted)
        assert grad.shape == wanted.shape
