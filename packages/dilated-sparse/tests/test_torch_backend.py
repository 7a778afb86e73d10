"""The torch backend against the oracle: every option, outputs and gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_sparse import BlockLayout, _schedule, block_sparse_attention, layouts
from dilated_testing import relative_error
from sparse_problems import NAMES, Problem, problems


def check(problem, tensors, **options):
    expected = problem.run("reference", problem.tensors(), **options)
    actual = problem.run("torch", tensors, **options)
    for name in NAMES:
        assert relative_error(actual[name], expected[name]) < 1e-10, name


@given(problems(), st.booleans())
def test_torch_equals_reference(problem, lse_gradient):
    check(problem, problem.tensors(), lse_gradient=lse_gradient)


@given(problems(), st.integers(1, 200))
def test_splitting_into_many_tiles_changes_nothing(problem, scores):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_schedule, "MAX_SCORES", scores)
        _schedule.schedule.cache_clear()
        check(problem, problem.tensors())
    _schedule.schedule.cache_clear()


@given(problems(dropout=False))
def test_non_contiguous_inputs(problem):
    q, k, v = (x.detach() for x in problem.tensors())
    tensors = (
        q.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
        torch.stack([k, k + 1], -1)[..., 0],
        v.transpose(1, 2).contiguous().transpose(1, 2),
    )
    check(problem, tuple(x.requires_grad_() for x in tensors))


@given(problems(dropout=False))
def test_reference_equals_softmax_over_the_dense_mask(problem):
    """The oracle itself, against torch's own attention with a mask."""
    q, k, v = (x.detach() for x in problem.tensors())
    seen = problem.layout.to_dense()
    if problem.is_causal:
        n, m = seen.shape[1:]
        seen = seen & (torch.arange(m) <= torch.arange(n)[:, None] + m - n)
    seen = seen.expand(problem.batch, problem.heads, -1, -1)
    if problem.padding:
        seen = seen & ~problem.mask()[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), *(
            x.transpose(1, 2).repeat_interleave(problem.heads // problem.kv_heads, 1)
            for x in (k, v)
        ), attn_mask=seen, scale=problem.scale,
    ) if seen.numel() else torch.zeros_like(q).transpose(1, 2)  # fmt: skip
    expected = expected.masked_fill(~seen.any(-1, keepdim=True), 0.0).transpose(1, 2)
    actual = problem.run("reference", problem.tensors())["out"]
    assert relative_error(actual, expected) < 1e-10


def test_rows_that_see_nothing_give_zeros_and_zero_gradients():
    seen = torch.rand(29, 31) < 0.5
    seen[5:17] = False
    seen[:, 3:11] = False
    problem = Problem(BlockLayout.from_dense(seen, block_size=4), padding=0.2)
    result = problem.run("torch", problem.tensors())
    assert not result["out"][:, 5:17].any()
    assert (result["lse"][:, :, 5:17] == -math.inf).all()
    assert not result["dq"][:, 5:17].any()
    assert not result["dk"][:, 3:11].any()
    assert not result["dv"][:, 3:11].any()


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "grouped": {"kv_heads": 1},
    "padding_causal": {"padding": 0.3, "is_causal": True},
    "dropout": {"dropout_p": 0.4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name):
    layout = layouts.sliding_window(7, 1, block_size=2) | layouts.random_blocks(
        7, 1, heads=3, block_size=2
    )
    problem = Problem(layout, batch=1, head_dim=2, **OPTIONS[name])

    def attend(*tensors):
        torch.manual_seed(0)
        out, lse = block_sparse_attention(
            *tensors, layout, is_causal=problem.is_causal, key_padding_mask=problem.mask(),
            dropout_p=problem.dropout_p, enable_gqa=True, return_lse=True,
        )  # fmt: skip
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(attend, problem.tensors())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_loses_no_more_than_twice_what_fused_attention_loses(dtype):
    """A full layout is dense attention: torch's own error is known there."""
    layout = BlockLayout.from_dense(torch.ones(256, 256, dtype=torch.bool), block_size=64)
    problem = Problem(layout, head_dim=32)
    rounded = tuple(x.detach().to(dtype).requires_grad_() for x in problem.tensors())
    exact = problem.run(
        "reference", [x.detach().double().requires_grad_() for x in rounded], lse_gradient=False
    )
    ours = problem.run("torch", rounded, lse_gradient=False)

    def dense(*tensors, **_options):
        folded = [x.transpose(1, 2) for x in tensors[:3]]
        out = torch.nn.functional.scaled_dot_product_attention(*folded).transpose(1, 2)
        return out, out.new_zeros(2, 3, 256)

    theirs = problem.run(None, rounded, lse_gradient=False, attention=dense)
    for name in ("out", "dq", "dk", "dv"):
        allowed = 2 * relative_error(theirs[name], exact[name])
        assert relative_error(ours[name], exact[name]) < allowed, name


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_scores_stay_finite(size):
    layout = layouts.sliding_window(23, 4, block_size=4)
    q = torch.full((1, 23, 3, 1), 100.0, requires_grad=True)
    k = torch.full((1, 23, 3, 1), size / 100)
    k[:, ::2] += 1
    v = torch.randn(1, 23, 3, 1)
    out, lse = block_sparse_attention(q, k, v, layout, scale=1.0, return_lse=True)
    exact, exact_lse = block_sparse_attention(
        q.double(), k.double(), v.double(), layout, scale=1.0, return_lse=True, backend="reference"
    )
    torch.testing.assert_close(out, exact.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, exact_lse.float())
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.isfinite().all()


def test_results_are_the_same_bits_each_time():
    problem = Problem(layouts.bigbird(300, block_size=16), is_causal=True)
    first, second = (problem.run("torch", problem.tensors(torch.float32)) for _ in range(2))
    for name in NAMES:
        assert torch.equal(first[name], second[name])
