"""The torch backend against the oracle: every option, outputs and gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_core import DilatedPattern, dilated_attention, dilated_attention_varlen
from dilated_testing import Problem, problems, relative_error, stretch

NAMES = ("out", "lse", "dq", "dk", "dv")


@given(problems(), st.booleans())
def test_torch_equals_reference(problem, lse_gradient):
    expected, actual = (
        problem.run(backend, problem.tensors(), lse_gradient=lse_gradient)
        for backend in ("reference", "torch")
    )
    for name in NAMES:
        assert relative_error(actual[name], expected[name]) < 1e-10, name


@given(problems())
def test_non_contiguous_and_expanded_inputs(problem):
    expected = problem.run("reference", problem.tensors())
    q, k, v = (x.detach() for x in problem.tensors())
    tensors = (
        q.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
        torch.stack([k, k + 1], -1)[..., 0],
        v.transpose(1, 2).contiguous().transpose(1, 2),
    )
    actual = problem.run("torch", tuple(x.requires_grad_() for x in tensors))
    for name in NAMES:
        assert relative_error(actual[name], expected[name]) < 1e-10, name


def test_expanded_batch_gives_the_same_rows():
    pattern = DilatedPattern([4, 11], [1, 3])
    q = torch.randn(1, 13, 3, 5, dtype=torch.float64)
    out = dilated_attention(*[q.expand(7, -1, -1, -1)] * 3, pattern)
    assert relative_error(out, dilated_attention(q, q, q, pattern).expand(7, -1, -1, -1)) < 1e-14


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "grouped": {"kv_heads": 1},
    "scale_zero": {"scale": 0.0, "is_causal": True},
    "scale_negative": {"scale": -0.4, "is_causal": True},
    "padding": {"padding": 0.3},
    "padding_causal": {"padding": 0.3, "is_causal": True},
    "decoding": {"length": 4, "is_causal": True},
    "cross": {"length": 4},
    "dropout": {"dropout_p": 0.4},
    "count_padding": {"pattern": {"count_padding": True}},
    "blocked": {"pattern": {"head_offsets": "blocked"}},
    "split": {"pattern": {"head_groups": "split"}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name):
    options = dict(OPTIONS[name])
    pattern = DilatedPattern([3, 5], [1, 2], **options.pop("pattern", {}))
    sizes = {"batch": 2, "length": 7, "key_length": 7, "heads": 3, "kv_heads": 3, "head_dim": 2}
    rest = {"is_causal": False, "padding": 0.0, "dropout_p": 0.0, "seed": 5}
    problem = Problem(pattern, **(sizes | rest | options))

    def attend(*tensors):
        torch.manual_seed(0)
        out, lse = dilated_attention(
            *tensors,
            pattern,
            is_causal=problem.is_causal,
            scale=problem.scale,
            key_padding_mask=problem.mask(),
            dropout_p=problem.dropout_p,
            enable_gqa=True,
            return_lse=True,
        )
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(attend, problem.tensors())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [-1e4, -0.4, -1e-30, -1e-50, 0.0, 1e-50, 1e-42, 1e-30, 1e4])
def test_a_causal_call_takes_any_factor_in_any_dtype(scale, dtype):
    """Also one that is 0 only when rounded to the dtype in which scores are scaled."""
    pattern, size = DilatedPattern([5, 11], [1, 2]), {"heads": 3, "kv_heads": 3, "head_dim": 7}
    q, k, v = Problem(
        pattern, 2, 13, 13, **size, is_causal=True, padding=0.0, dropout_p=0.0, seed=3
    ).tensors(dtype)  # fmt: skip
    # Scores of thousands would be lost in their own rounding.
    q = (q.detach() / max(1.0, abs(scale))).requires_grad_()
    upstream = torch.randn(q.shape) / 16  # else gradients exceed float16
    results = []
    for backend, kind in (("torch", dtype), ("reference", torch.float64)):
        tensors = [x.detach().to(kind).requires_grad_() for x in (q, k, v)]
        out, lse = dilated_attention(
            *tensors, pattern, is_causal=True, scale=scale, return_lse=True, backend=backend
        )
        dq, dk, dv = torch.autograd.grad(out, tensors, upstream.to(kind))
        results.append((out, lse, dq / max(1.0, abs(scale)), dk, dv))
    bound = {torch.float64: 1e-10, torch.float32: 1e-6, torch.float16: 5e-3}.get(dtype, 4e-2)
    for name, actual, expected in zip(NAMES, *results, strict=True):
        assert relative_error(actual, expected) < bound, name


@given(
    problems(max_length=17, cross=False),
    st.lists(st.integers(0, 19), max_size=4),
)
def test_packed_sequences_are_attended_one_by_one(problem, lengths):
    total = sum(lengths)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    problem.batch, problem.length, problem.key_length = 1, total, total
    q, k, v = problem.tensors()
    mask = problem.mask()
    options = {
        "is_causal": problem.is_causal, "scale": problem.scale, "enable_gqa": True,
        "return_lse": True,
    }  # fmt: skip
    upstream = torch.randn(total, problem.heads, problem.head_dim, dtype=torch.float64)

    def packed(backend):
        torch.manual_seed(problem.seed)
        out, lse = dilated_attention_varlen(
            q[0], k[0], v[0], ends, problem.pattern, **options, backend=backend,
            key_padding_mask=None if mask is None else mask[0], dropout_p=problem.dropout_p,
        )  # fmt: skip
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), upstream)
        return out, lse, dq * stretch(problem.scale, problem.head_dim), dk, dv

    actual, oracle = packed("torch"), packed("reference")
    for a, b in zip(actual, oracle, strict=True):
        assert relative_error(a, b) < 1e-10
    if problem.dropout_p:
        return
    pieces = [
        dilated_attention(
            q[:, a:b], k[:, a:b], v[:, a:b], problem.pattern, **options,
            key_padding_mask=None if mask is None else mask[:, a:b],
        )
        for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    ]  # fmt: skip
    if pieces:
        out = torch.cat([out for out, _ in pieces], 1)[0]
        assert relative_error(actual[0], out) < 1e-10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_causal", [False, True])
def test_low_precision_loses_no_more_than_twice_what_fused_attention_loses(dtype, is_causal):
    """One branch of rate 1 is dense attention of each segment: torch's own error is known there."""
    w, heads, head_dim = 128, 4, 32
    problem = Problem(
        DilatedPattern([w, 256], [1, 2]),
        batch=2, length=512, key_length=512, heads=heads, kv_heads=heads, head_dim=head_dim,
        is_causal=is_causal, padding=0.0, dropout_p=0.0, seed=11,
    )  # fmt: skip
    rounded = tuple(x.detach().to(dtype).requires_grad_() for x in problem.tensors())
    exact_inputs = tuple(x.detach().double().requires_grad_() for x in rounded)
    exact = problem.run("reference", exact_inputs, lse_gradient=False)
    ours = problem.run("torch", rounded, lse_gradient=False)

    def dense(tensors):
        folded = [
            x.detach().unflatten(1, (-1, w)).flatten(0, 1).transpose(1, 2).requires_grad_()
            for x in tensors
        ]
        out = torch.nn.functional.scaled_dot_product_attention(*folded, is_causal=is_causal)
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(out.shape, generator=generator).to(out.dtype)
        grads = torch.autograd.grad(out, folded, upstream)
        return dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True))

    dense_exact, dense_low = dense(exact_inputs), dense(rounded)
    for name in ("out", "dq", "dk", "dv"):
        allowed = 2 * relative_error(dense_low[name], dense_exact[name])
        assert relative_error(ours[name], exact[name]) < allowed, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_scores_stay_finite(dtype, size):
    pattern = DilatedPattern([5, 11], [1, 2])
    q = torch.full((1, 13, 3, 1), 100.0, dtype=dtype, requires_grad=True)
    k = torch.full((1, 13, 3, 1), size / 100, dtype=dtype)
    k[:, ::2] += 1
    v = torch.randn(1, 13, 3, 1, dtype=dtype)
    out, lse = dilated_attention(q, k, v, pattern, scale=1.0, return_lse=True)
    exact, exact_lse = dilated_attention(
        q.double(), k.double(), v.double(), pattern, scale=1.0, return_lse=True, backend="reference"
    )
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert out.isfinite().all()
    assert grad.isfinite().all()
    # A score of 1e4 is itself only known to 1e4 * eps, and weights are its exponential.
    wide = torch.promote_types(dtype, torch.float32)
    assert relative_error(out, exact) < 1e4 * torch.finfo(wide).eps + torch.finfo(dtype).eps
    assert relative_error(lse, exact_lse) < 4 * torch.finfo(wide).eps


def test_rows_that_no_branch_keeps_are_zero():
    """Head 2 at rate 4 in segments of 6 keeps one row of six; the others are kept by nobody."""
    pattern = DilatedPattern([6], [4])
    tensors = tuple(
        torch.randn(2, 13, 3, 5, dtype=torch.float64, requires_grad=True) for _ in "qkv"
    )
    out, lse = dilated_attention(*tensors, pattern, return_lse=True)
    grads = torch.autograd.grad(out, tensors, torch.randn_like(out))
    for position in range(13):
        kept = position % 6 % 4 == 2
        assert bool(out[:, position, 2].any()) == kept
        assert bool((lse[:, 2, position] == -math.inf).all()) == (not kept)
        # A row that sees only itself has a zero dq: its one weight is constantly 1.
        for grad in grads:
            assert kept or not grad[:, position, 2].any()


@pytest.mark.parametrize("is_causal", [False, True])
def test_fully_padded_rows_are_zero_with_zero_gradients(is_causal):
    pattern = DilatedPattern([4, 8], [1, 2])
    tensors = tuple(
        torch.randn(3, 11, 2, 5, dtype=torch.float64, requires_grad=True) for _ in "qkv"
    )
    mask = torch.zeros(3, 11, dtype=torch.bool)
    mask[1] = True
    out, lse = dilated_attention(
        *tensors, pattern, is_causal=is_causal, key_padding_mask=mask, return_lse=True
    )
    grads = torch.autograd.grad(out, tensors, torch.randn_like(out))
    assert not out[1].any()
    assert (lse[1] == -math.inf).all()
    for grad in grads:
        assert grad.isfinite().all()
        assert not grad[1].any()
        assert grad[0].any()


def test_the_future_never_leaks():
    pattern = DilatedPattern([4, 9, 16], [1, 2, 3])
    q, k, v = (torch.randn(1, 31, 4, 3, dtype=torch.float64) for _ in "qkv")
    out = dilated_attention(q, k, v, pattern, is_causal=True)
    for position in range(31):
        later_k, later_v = k.clone(), v.clone()
        later_k[:, position:] = torch.randn_like(k[:, position:])
        later_v[:, position:] = torch.randn_like(v[:, position:])
        changed = dilated_attention(q, later_k, later_v, pattern, is_causal=True)
        assert torch.equal(changed[:, :position], out[:, :position])
