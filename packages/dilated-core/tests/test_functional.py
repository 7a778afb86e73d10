"""The public edge: every bad argument is named, with what it must be and what it was."""

import pytest
import torch

from dilated_core import (
    DilatedPattern,
    dilated_attention,
    dilated_attention_varlen,
    reference_attention,
    select_backend,
)

PATTERN = DilatedPattern([4, 8], [1, 2])
X = torch.randn(2, 11, 3, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a Tensor. Got list"),
        ({"query": X[0]}, ValueError, r"query must have shape \(batch, length.*Got \(11, 3, 5\)"),
        ({"query": X.int()}, TypeError, "query must be float16.*Got torch.int32"),
        (
            {"key": X.double()},
            TypeError,
            "key must have query's dtype torch.float32. Got torch.float64",
        ),
        ({"key": X.to("meta")}, ValueError, "key must be on query's device cpu. Got meta"),
        ({"value": X[:, :7]}, ValueError, r"value must have key's shape.*Got \(2, 7, 3, 5\)"),
        ({"query": X[:1]}, ValueError, "key must have query's batch size 1. Got 2"),
        ({"query": X[..., :4]}, ValueError, "key must have query's head_dim 4. Got 5"),
        ({"query": X[:, :, :2]}, ValueError, "unless enable_gqa=True. Got 3"),
        ({"query": X[:, :, :2], "enable_gqa": True}, ValueError, "multiple of key heads.*2 and 3"),
        ({"query": X[..., :0], "key": X[..., :0], "value": X[..., :0]}, ValueError, "head_dim 1"),
        ({"pattern": [4, 8]}, TypeError, "pattern must be a DilatedPattern. Got list"),
        ({"is_causal": 1}, TypeError, "is_causal must be a bool. Got 1"),
        ({"enable_gqa": None}, TypeError, "enable_gqa must be a bool"),
        ({"return_lse": "yes"}, TypeError, "return_lse must be a bool"),
        ({"scale": "big"}, TypeError, "scale must be a float or None. Got 'big'"),
        ({"scale": float("nan")}, ValueError, "scale must be finite. Got nan"),
        (
            {"scale": 1e39},
            ValueError,
            r"scale must be between -1.7e\+38 and 1.7e\+38 here. Got 1e\+39",
        ),
        ({"scale": 10**400}, ValueError, "scale must be between"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\). Got 1.0"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\). Got -0.1"),
        ({"dropout_p": "p"}, TypeError, "dropout_p must be a float. Got 'p'"),
        ({"key_padding_mask": [True]}, TypeError, "key_padding_mask must be a Tensor or None"),
        ({"key_padding_mask": X[:, :, 0, 0]}, TypeError, "key_padding_mask must be bool"),
        (
            {"key_padding_mask": torch.zeros(2, 10, dtype=torch.bool)},
            ValueError,
            r"key_padding_mask must have shape \(batch, key length\)=\(2, 11\). Got \(2, 10\)",
        ),
        ({"backend": "cuda"}, ValueError, "backend must be None or one of .* Got 'cuda'"),
        (
            {"key": X[:, :7], "value": X[:, :7], "is_causal": True},
            ValueError,
            "query length must not exceed key length when is_causal=True. Got 11 and 7",
        ),
        (
            {"pattern": DilatedPattern([1, 2, 3, 4], [1] * 4, head_groups="split")},
            ValueError,
            r"at least the number of branches \(4\)",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"query": X, "key": X, "value": X, "pattern": PATTERN} | change
    with pytest.raises(error, match=message):
        dilated_attention(**arguments)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        ([0, 11], TypeError, "cu_seqlens must be a Tensor"),
        (torch.tensor([0.0, 11.0]), TypeError, "cu_seqlens must be int32 or int64"),
        (torch.tensor([[0, 11]]), ValueError, r"cu_seqlens must have shape \(sequences \+ 1,\)"),
        (
            torch.tensor([0, 7]),
            ValueError,
            r"must rise from 0 to the total .* \(11\). Got \[0, 7\]",
        ),
        (torch.tensor([1, 11]), ValueError, "must rise from 0"),
        (torch.tensor([0, 7, 5, 11]), ValueError, "must rise from 0"),
    ],
)
def test_bad_cu_seqlens_are_named(cu_seqlens, error, message):
    x = X[0]
    with pytest.raises(error, match=message):
        dilated_attention_varlen(x, x, x, cu_seqlens, PATTERN)


def test_packed_shapes_are_checked():
    x, ends = X[0], torch.tensor([0, 11])
    with pytest.raises(ValueError, match=r"query must have shape \(total, heads, head_dim\)"):
        dilated_attention_varlen(X, X, X, ends, PATTERN)
    with pytest.raises(ValueError, match=r"key must have query's total 11\. Got 7"):
        dilated_attention_varlen(x, x[:7], x[:7], ends, PATTERN)


def test_return_lse_changes_only_what_is_returned():
    out, lse = dilated_attention(X, X, X, PATTERN, return_lse=True)
    assert torch.equal(out, dilated_attention(X, X, X, PATTERN))
    assert lse.shape == (2, 3, 11)
    assert lse.dtype == torch.float32
    assert dilated_attention(X.half(), X.half(), X.half(), PATTERN).dtype == torch.float16
    half = X.bfloat16()
    assert dilated_attention(half, half, half, PATTERN, return_lse=True)[1].dtype == torch.float32


def test_scale_multiplies_the_scores():
    expected = dilated_attention(X * 3.0, X, X, PATTERN, scale=0.1)
    torch.testing.assert_close(dilated_attention(X, X, X, PATTERN, scale=0.3), expected)
    default = dilated_attention(X, X, X, PATTERN, scale=5**-0.5)
    torch.testing.assert_close(dilated_attention(X, X, X, PATTERN), default)


def test_reference_attention_is_the_reference_backend():
    out = reference_attention(X, X, X, PATTERN, is_causal=True)
    forced = dilated_attention(X, X, X, PATTERN, is_causal=True, backend="reference")
    assert torch.equal(out, forced)


def test_selection_says_why():
    choice = select_backend(X, X)
    assert choice.backend == "torch"
    assert dict(choice.rejected).keys() == {"reference", "triton"}
    assert dict(choice.rejected)["triton"] == "it needs CUDA tensors, these are on cpu"
    forced = select_backend(X, X, "reference")
    assert forced.backend == "reference"
    assert "given" in forced.reason


def test_an_impossible_force_is_an_error():
    message = r"backend must be able to serve the call\. Got 'triton', but it needs CUDA tensors"
    with pytest.raises(ValueError, match=message):
        dilated_attention(X, X, X, PATTERN, backend="triton")
