"""The flex backend on the CPU: what it serves, what it refuses, and that it never turns dense."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.nn.attention.flex_attention import flex_attention

from dilated_core.extending import Scores
from dilated_sparse import _flex_backend, block_sparse_attention, layouts, select_backend
from dilated_sparse._call import BlockCall
from dilated_testing import relative_error
from sparse_problems import problems

LAYOUT = layouts.longformer(53, 9, 3, block_size=8)
X = torch.randn(1, 53, 3, 16)

eager = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention without the compiler, whose minutes would test torch and not this package."""
    monkeypatch.setattr(_flex_backend, "_compiled", lambda: flex_attention)


def filled(case):
    return case.layout.length and case.layout.key_length and case.batch and not case.padding


@eager
@pytest.mark.usefixtures("uncompiled")
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problems(dropout=False).filter(filled))
def test_flex_equals_reference(case):
    q, k, v = (x.detach() for x in case.tensors(torch.float32))
    ours, theirs = (
        block_sparse_attention(
            q, k, v, case.layout, is_causal=case.is_causal, enable_gqa=True, backend=backend
        )
        for backend in ("flex", "reference")
    )
    assert relative_error(ours, theirs) < 1e-5


@eager
@pytest.mark.usefixtures("uncompiled")
def test_padded_keys_are_hidden_in_full_blocks_too():
    layout = layouts.prefix(53, 53, block_size=8)
    padding = torch.rand(1, 53, generator=torch.Generator().manual_seed(1)) < 0.4
    call = BlockCall(layout, Scores(False, 0.25, padding))
    ours, _ = _flex_backend.attend(call, X, X, X)
    theirs = block_sparse_attention(X, X, X, layout, scale=0.25, key_padding_mask=padding)
    assert relative_error(ours, theirs) < 1e-5


def test_one_layout_has_one_block_mask():
    """Another object would be compiled for again."""
    again = layouts.longformer(53, 9, 3, block_size=8)
    one, two = (_flex_backend._block_mask(x, False, X.device) for x in (LAYOUT, again))
    assert one is two


def test_a_block_mask_that_inference_mode_made_can_be_trained_with():
    with torch.inference_mode():
        mask = _flex_backend._block_mask(layouts.longformer(53, 7, 3, block_size=8), True, X.device)
    assert not mask.kv_num_blocks.is_inference()


def test_beyond_the_limit_of_recompilations_it_raises(monkeypatch):
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend="eager")
    monkeypatch.setattr(_flex_backend, "_compiled", lambda: compiled)
    with torch._dynamo.config.patch(recompile_limit=1):
        block_sparse_attention(X, X, X, LAYOUT, backend="flex")
        with pytest.raises(RuntimeError, match="limit of recompilations is reached"):
            block_sparse_attention(X, X, X, layouts.prefix(53, 9, block_size=8), backend="flex")


REFUSED = {
    "FlexAttention has no dropout": {"dropout_p": 0.1},
    "on the CPU it does not serve gradients": {"needs_gradients": True},
    "on the CPU it does not serve return_lse": {"return_lse": True},
    "on the CPU it does not serve key_padding_mask": {"has_padding": True},
    "its tables would have": {"layout": layouts.sliding_window(1 << 20, 3)},
    "it needs tensors with elements": {"layout": layouts.sliding_window(0, 3)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_it_says_what_it_cannot_serve(reason):
    request = {"layout": LAYOUT, **REFUSED[reason]}
    with pytest.raises(ValueError, match=f"Got 'flex', but {reason}"):
        select_backend(X, X, "flex", **request)
    assert reason in dict(select_backend(X, X, **request).rejected)["flex"]


def test_float64_is_refused():
    with pytest.raises(ValueError, match=r"float32, these are torch\.float64"):
        select_backend(X.double(), X.double(), "flex", layout=LAYOUT)


def test_gradients_are_refused_in_the_call():
    with pytest.raises(ValueError, match="on the CPU it does not serve gradients"):
        block_sparse_attention(X, X.clone().requires_grad_(), X, LAYOUT, backend="flex")


@pytest.mark.parametrize(
    ("head_dim", "block_size", "reason"),
    [(64, 96, "its block sizes are multiples of 128, this is 96"), (8, 128, "at least 16, this")],
)
def test_what_its_cuda_kernels_need(head_dim, block_size, reason):
    assert reason in _flex_backend._unsupported_on_cuda(head_dim, block_size)
    assert _flex_backend._unsupported_on_cuda(64, 256) is None
