"""Selection by content: own blocks kept, nothing after a query matters, bounds hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_sparse import block_sparse_attention, select


@st.composite
def inputs(draw):
    """Query (1, N, H, D) and key (1, M, H_kv, D), some with a few strong keys."""
    is_causal = draw(st.booleans())
    m = draw(st.integers(1, 60))
    n = draw(st.integers(1, m)) if draw(st.booleans()) else m
    kv_heads = draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    query = torch.randn(1, n, 2 * kv_heads, 5, dtype=torch.float64, generator=generator)
    key = torch.randn(1, m, kv_heads, 5, dtype=torch.float64, generator=generator)
    key *= draw(st.sampled_from([0.1, 1.0, 6.0]))
    return query, key, is_causal, draw(st.integers(1, 20))


def true_weights(query, key, is_causal):
    key = key.repeat_interleave(query.shape[2] // key.shape[2], 2)
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key)[0] * query.shape[3] ** -0.5
    n, m = scores.shape[1:]
    if is_causal:
        later = torch.arange(m) > torch.arange(n)[:, None] + m - n
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(-1)


def own_blocks(layout, is_causal):
    """Dense: the blocks at the queries' own positions."""
    n, m, b = layout.length, layout.key_length, layout.block_size
    position = torch.arange(n) + (m - n if is_causal else 0)
    own = torch.zeros(n, m, dtype=torch.bool)
    for start in range(0, n, b):
        for block in {int(p) // b for p in position[start : start + b] if p < m}:
            own[start : start + b, block * b : (block + 1) * b] = True
    return own


@given(inputs(), st.floats(0.01, 1.0))
def test_the_bound_on_the_dropped_mass_holds_for_every_row(case, tau):
    query, key, is_causal, b = case
    layout, bound = select.threshold_blocks(query, key, tau, is_causal=is_causal, block_size=b)
    dropped = (true_weights(query, key, is_causal) * ~layout.to_dense()).sum(-1)
    assert bound.shape == dropped.shape
    assert (dropped <= bound + 1e-12).all()
    assert (bound <= 1).all()
    assert (layout.to_dense() >= own_blocks(layout, is_causal)).all()


@given(inputs(), st.floats(0.01, 1.0), st.sampled_from([0.0, -0.4, -3.0]))
def test_a_factor_of_0_or_below_is_one_on_the_query(case, tau, scale):
    query, key, is_causal, b = case
    options = {"is_causal": is_causal, "block_size": b}
    found = select.threshold_blocks(query, key, tau, scale=scale, **options)
    same = select.threshold_blocks(query * scale, key, tau, scale=1.0, **options)
    assert torch.equal(found.layout.to_dense(), same.layout.to_dense())
    torch.testing.assert_close(found.dropped_mass, same.dropped_mass)


@given(inputs(), st.integers(1, 9))
def test_top_k_keeps_own_blocks_and_so_many_blocks(case, count):
    query, key, is_causal, b = case
    layout = select.top_k_blocks(query, key, count, is_causal=is_causal, block_size=b)
    assert layout.heads == query.shape[2]
    assert (layout.to_dense() >= own_blocks(layout, is_causal)).all()
    sizes = layout.row_offsets.diff()
    # Queries that do not start at a block of the keys have two own blocks.
    assert (sizes <= max(count, 2)).all()
    if not is_causal:
        assert (sizes >= min(count, layout.grid.columns)).all()


@given(inputs(), st.integers(1, 4), st.data())
def test_nothing_after_a_query_changes_what_it_sees(case, count, data):
    query, key, _, b = case
    cut = data.draw(st.integers(0, query.shape[1] - 1))
    shift = key.shape[1] - query.shape[1]
    changed_query, changed_key = query.clone(), key.clone()
    changed_query[:, cut:] += 3.0
    changed_key[:, cut + shift :] *= -5.0
    for choose in (
        lambda q, k: select.top_k_blocks(q, k, count, is_causal=True, block_size=b),
        lambda q, k: select.threshold_blocks(q, k, 0.5, is_causal=True, block_size=b).layout,
    ):
        before, after = (
            choose(q, k).causal().to_dense()
            for q, k in ((query, key), (changed_query, changed_key))
        )
        assert before[:, :cut].equal(after[:, :cut])


def test_the_best_blocks_are_chosen():
    """Keys that point where the queries point are found."""
    query = torch.ones(1, 64, 1, 4)
    key = -torch.ones(1, 64, 1, 4)
    key[:, 40:48] = 1.0
    layout = select.top_k_blocks(query, key, 2, block_size=8)
    assert layout.to_dense()[0, :, 40:48].all()
    selection = select.threshold_blocks(query, key, 0.8, block_size=8)
    assert selection.layout.to_dense()[0, :, 40:48].all()
    assert selection.layout.nnz == 8 + 7
    # All keys of a block are equal here, so the bound is the truth.
    dropped = (true_weights(query, key, False) * ~selection.layout.to_dense()).sum(-1)
    torch.testing.assert_close(selection.dropped_mass, dropped)


def test_the_whole_mass_takes_every_block():
    query, key = torch.randn(1, 50, 2, 4), torch.randn(1, 50, 2, 4)
    layout, bound = select.threshold_blocks(query, key, 1.0, block_size=8)
    assert layout.density() == 1.0
    assert not bound.any()


def test_gradients_follow_the_selected_blocks():
    query, key, value = (torch.randn(1, 48, 2, 4, requires_grad=True) for _ in "qkv")
    layout = select.top_k_blocks(query, key, 2, block_size=8)
    out = block_sparse_attention(query, key, value, layout)
    (grad,) = torch.autograd.grad(out[:, 3].sum(), value)
    seen = layout.to_dense()[:, 3].T
    assert (grad[0].abs().sum(-1) > 0).equal(seen)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tau": 0.0}, ValueError, r"tau must be in \(0, 1\]. Got 0.0"),
        ({"tau": 1.5}, ValueError, r"tau must be in \(0, 1\]. Got 1.5"),
        ({"query": torch.zeros(2, 9, 1, 4)}, ValueError, "key must have query's batch size 2"),
        ({"is_causal": 1}, TypeError, "is_causal must be a bool. Got 1"),
        ({"scale": "x"}, TypeError, "scale must be a float or None. Got 'x'"),
        ({"scale": float("nan")}, ValueError, "scale must be finite. Got nan"),
        ({"block_size": 0}, ValueError, "block_size must be positive. Got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    x = torch.zeros(1, 9, 1, 4)
    with pytest.raises(error, match=message):
        select.threshold_blocks(**({"query": x, "key": x, "tau": 0.5} | arguments))


def test_no_count_of_blocks_is_too_few():
    x = torch.zeros(2, 9, 1, 4)
    with pytest.raises(ValueError, match=r"count must be positive. Got 0"):
        select.top_k_blocks(x[:1], x[:1], 0)


@given(inputs(), st.integers(1, 9))
def test_query_heads_of_a_key_head_choose_together(case, count):
    query, key, is_causal, block_size = case
    options = {"is_causal": is_causal, "share_heads": True, "block_size": block_size}
    chosen = select.threshold_blocks(query, key, 0.7, **options)
    for layout in (select.top_k_blocks(query, key, count, **options), chosen.layout):
        dense = layout.to_dense()
        assert torch.equal(dense[::2], dense[1::2])
        assert (own_blocks(layout, is_causal) <= dense).all()
    dropped = true_weights(query, key, is_causal).masked_fill(chosen.layout.to_dense(), 0).sum(-1)
    assert (dropped <= chosen.dropped_mass + 1e-9).all()
    # One head of each group chooses as it does for itself.
    alone = select.top_k_blocks(query[:, :, ::2], key, count, **options)
    itself = {**options, "share_heads": False}
    assert alone == select.top_k_blocks(query[:, :, ::2], key, count, **itself)


def test_heads_that_choose_together_add_their_shares():
    """Of two heads one wants the first block, the other the second, and more so."""
    key = torch.zeros(1, 12, 1, 4, dtype=torch.float64)
    for block in range(3):
        key[0, 4 * block : 4 * block + 4, 0, block] = 1
    query = torch.zeros(1, 12, 2, 4, dtype=torch.float64)
    query[0, :, 0, 0], query[0, :, 1, 1] = 2.0, 6.0
    layout = select.top_k_blocks(query, key, 2, share_heads=True, block_size=4)
    dense = layout.to_dense()[:, ::4, ::4]
    assert dense[0, 2].tolist() == dense[1, 2].tolist() == [False, True, True]
