"""The public edge: every bad argument is named, with what it must be and what it was."""

import pytest
import torch

import dilated_core.extending
from dilated_sparse import BackendChoice, block_sparse_attention, layouts, select_backend

LAYOUT = layouts.sliding_window(11, 2, block_size=4)
X = torch.randn(2, 11, 3, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [1.0]}, TypeError, "query must be a Tensor. Got list"),
        ({"query": X[0]}, ValueError, r"query must have shape \(batch, length.*Got \(11, 3, 5\)"),
        ({"key": X.double()}, TypeError, "key must have query's dtype torch.float32"),
        ({"layout": [4, 8]}, TypeError, "layout must be a BlockLayout. Got list"),
        (
            {"layout": layouts.prefix(12, 2)},
            ValueError,
            r"layout must have the query and key lengths \(11, 11\). Got \(12, 12\). `layout.at`",
        ),
        (
            {"layout": LAYOUT.per_head(2)},
            ValueError,
            "layout must have 1 head or query's 3. Got 2",
        ),
        ({"is_causal": 1}, TypeError, "is_causal must be a bool. Got 1"),
        ({"enable_gqa": None}, TypeError, "enable_gqa must be a bool"),
        ({"return_lse": "yes"}, TypeError, "return_lse must be a bool"),
        ({"scale": "big"}, TypeError, "scale must be a float or None. Got 'big'"),
        ({"scale": float("nan")}, ValueError, "scale must be finite. Got nan"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\). Got 1.0"),
        ({"dropout_p": "p"}, TypeError, "dropout_p must be a float. Got 'p'"),
        ({"key_padding_mask": X[:, :, 0, 0]}, TypeError, "key_padding_mask must be bool"),
        ({"backend": "cuda"}, ValueError, "backend must be None or one of .* Got 'cuda'"),
        (
            {
                "layout": layouts.prefix(11, 2).restrict(range(11), range(11)).transpose(),
                "query": X[:, :, :2],
            },
            ValueError,
            "unless enable_gqa=True. Got 3",
        ),
        (
            {
                "layout": LAYOUT.restrict(range(11), range(8)),
                "key": X[:, :8],
                "value": X[:, :8],
                "is_causal": True,
            },
            ValueError,
            "query length must not exceed key length when is_causal=True. Got 11 and 8",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {"query": X, "key": X, "value": X, "layout": LAYOUT} | change
    with pytest.raises(error, match=message):
        block_sparse_attention(**arguments)


def test_return_lse_changes_only_what_is_returned():
    out, lse = block_sparse_attention(X, X, X, LAYOUT, return_lse=True)
    assert torch.equal(out, block_sparse_attention(X, X, X, LAYOUT))
    assert lse.shape == (2, 3, 11)
    half = X.bfloat16()
    low, lse = block_sparse_attention(half, half, half, LAYOUT, return_lse=True)
    assert low.dtype == torch.bfloat16
    assert lse.dtype == torch.float32


def test_scale_multiplies_the_scores():
    expected = block_sparse_attention(X * 3.0, X, X, LAYOUT, scale=0.1)
    torch.testing.assert_close(block_sparse_attention(X, X, X, LAYOUT, scale=0.3), expected)
    default = block_sparse_attention(X, X, X, LAYOUT, scale=5**-0.5)
    torch.testing.assert_close(block_sparse_attention(X, X, X, LAYOUT), default)


def test_the_choice_of_a_backend_says_why():
    choice = select_backend(X, X, layout=LAYOUT)
    assert BackendChoice is dilated_core.extending.BackendChoice
    assert choice.backend == choice.name == "torch"
    assert choice.reason
    assert dict(choice.rejected).keys() == {"reference", "flex", "triton"}
    assert "cpu" in dict(choice.rejected)["triton"]
    assert select_backend(X, X, "reference", layout=LAYOUT).backend == "reference"
    with pytest.raises(ValueError, match=r"backend must be able to serve the call\. Got 'triton'"):
        select_backend(X, X, "triton", layout=LAYOUT)
    with pytest.raises(TypeError, match=r"layout must be a BlockLayout\. Got NoneType"):
        select_backend(X, X, layout=None)
