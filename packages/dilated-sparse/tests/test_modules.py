"""Modules: alone, inside multihead attention, and together with a dilated pattern."""

import copy
import pickle

import pytest
import torch
from hypothesis import given

from dilated_core import DilatedPattern, MultiheadDilatedAttention
from dilated_sparse import (
    BlockSparseAttention,
    BlockSparseDilatedAttention,
    block_sparse_attention,
    layouts,
)
from dilated_testing import relative_error, stretch
from sparse_problems import problems

PATTERN = DilatedPattern([7, 14], [1, 2])
LAYOUT = layouts.sliding_window(23, 4, block_size=4)


def test_the_module_is_the_function():
    x = torch.randn(2, 23, 3, 5)
    mask = torch.rand(2, 23) < 0.3
    layer = BlockSparseAttention(LAYOUT, scale=0.3, dropout=0.5).eval()
    expected = block_sparse_attention(
        x, x, x, LAYOUT, scale=0.3, is_causal=True, key_padding_mask=mask
    )
    assert torch.equal(layer(x, x, x, is_causal=True, key_padding_mask=mask), expected)
    layer.train()
    assert not torch.equal(layer(x, x, x), layer(x, x, x))
    assert "scale=0.3, dropout=0.5" in repr(layer)


@given(problems(dropout=False, max_length=23))
def test_the_union_with_a_pattern_counts_multiplicities(problem):
    """Against dense attention in which each key has the weight of its count."""
    layout, n, m = problem.layout, problem.layout.length, problem.layout.key_length
    tensors = problem.tensors()
    layer = BlockSparseDilatedAttention(PATTERN, layout, scale=problem.scale)
    mask = problem.mask()
    out = layer(*tensors, is_causal=problem.is_causal, key_padding_mask=mask)

    count = layout.to_dense().long()
    if problem.is_causal:
        count = count * (torch.arange(m) <= torch.arange(n)[:, None] + m - n)
    count = count + PATTERN.multiplicity(
        n, problem.heads, is_causal=problem.is_causal, key_length=m
    )
    count = count.expand(problem.batch, -1, -1, -1).double()
    if mask is not None:
        count = count * ~mask[:, None, None]
    q, k, v = tensors
    k, v = (x.repeat_interleave(problem.heads // problem.kv_heads, 2) for x in (k, v))
    scale = problem.head_dim**-0.5 if problem.scale is None else problem.scale
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    weights = count * scores.exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    expected = torch.einsum("bhnm,bmhd->bnhd", weights, v)
    assert relative_error(out, expected) < 1e-10
    upstream = torch.randn(out.shape, dtype=torch.float64)
    factors = stretch(problem.scale, problem.head_dim), 1.0, 1.0
    for factor, a, b in zip(
        factors, *(torch.autograd.grad(o, tensors, upstream) for o in (out, expected)), strict=True
    ):
        assert relative_error(a * factor, b * factor) < 1e-10


@pytest.mark.parametrize(
    "attention",
    [BlockSparseAttention(LAYOUT), BlockSparseDilatedAttention(PATTERN, LAYOUT)],
    ids=lambda layer: type(layer).__name__,
)
def test_inside_multihead_attention(attention):
    layer = MultiheadDilatedAttention(48, 6, None, num_kv_heads=2, attention=attention)
    x = torch.randn(2, 23, 48, requires_grad=True)
    mask = torch.zeros(2, 23, dtype=torch.bool)
    mask[1, 17:] = True
    out, weights = layer(x, is_causal=True, key_padding_mask=mask)
    assert out.shape == x.shape
    assert weights is None
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(x, is_causal=True, key_padding_mask=mask)[0], out)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"layout must be a BlockLayout. Got list"):
        BlockSparseAttention([3])
    with pytest.raises(TypeError, match=r"pattern must be a DilatedPattern. Got BlockLayout"):
        BlockSparseDilatedAttention(LAYOUT, LAYOUT)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\). Got 1.0"),
        ({"dropout": "a"}, TypeError, "dropout must be a float. Got 'a'"),
        ({"scale": "x"}, TypeError, "scale must be a float or None. Got 'x'"),
        ({"scale": float("inf")}, ValueError, "scale must be finite. Got inf"),
        ({"backend": "nope"}, ValueError, "backend must be None or one of .*'triton'. Got 'nope'"),
    ],
)
def test_options_are_checked_at_construction(options, error, message):
    for make in (
        BlockSparseAttention,
        lambda *x, **y: BlockSparseDilatedAttention(PATTERN, *x, **y),
    ):
        with pytest.raises(error, match=message):
            make(LAYOUT, **options)


def test_the_union_with_a_pattern_refuses_flex_at_construction():
    """No call could be served: flex gives no lse on the CPU, and patterns have no such backend."""
    message = "backend must be None or one of 'reference', 'torch', 'triton'. Got 'flex'"
    with pytest.raises(ValueError, match=message):
        BlockSparseDilatedAttention(PATTERN, LAYOUT, backend="flex")
