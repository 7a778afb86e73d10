"""Attention span by span is attention of the whole, for any cut of the sequence into spans."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dilated_core import DilatedPattern, dilated_attention
from dilated_core.interfaces import AttentionPattern, Clique, KeyRows
from dilated_testing import Problem, patterns, problems, relative_error
from span_by_span import Part, cut, rows_of, run_by_spans


@given(problems(cross=False), st.integers(1, 47))
def test_spans_together_are_the_whole(problem, shard):
    expected = problem.run("reference", problem.tensors())
    actual = run_by_spans(problem, shard)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-10, name


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("rest", [{}, {"dropout_p": 0.3}, {"padding": 0.3}, {"batch": 2}], ids=str)
@pytest.mark.parametrize("head_offsets", ["interleaved", "blocked"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(7, 7), (12, 4)])
def test_offsets_together_are_the_whole(heads, kv_heads, head_offsets, rest, is_causal):
    """Rates above and below the heads; spans of 13 begin at any place of a step."""
    pattern = DilatedPattern([1000, 31], [11, 5], head_offsets=head_offsets)
    sizes = {"length": 61, "key_length": 61, "heads": heads, "kv_heads": kv_heads, "head_dim": 3}
    others = {"batch": 1, "padding": 0.0, "dropout_p": 0.0, "seed": 3}
    problem = Problem(pattern, is_causal=is_causal, **sizes, **others | rest)
    expected = problem.run("reference", problem.tensors())
    actual = run_by_spans(problem, 13)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-10, name


@pytest.mark.parametrize("is_causal", [False, True])
def test_visible_keys_hold_all_that_a_span_sees(is_causal):
    pattern = DilatedPattern([6, 20], [1, 3])
    seen = pattern.multiplicity(43, 5, is_causal=is_causal).sum(0)
    for start in range(43):
        for stop in range(start + 1, 44):
            visible = pattern.spans.visible_keys(range(start, stop), 43, is_causal=is_causal)
            hidden = set(range(43)).difference(*visible)
            assert not seen[start:stop][:, sorted(hidden)].any()


def test_a_pattern_is_an_attention_pattern():
    pattern = DilatedPattern([4], [1])
    assert isinstance(pattern, AttentionPattern)
    x = torch.randn(1, 11, 2, 3)
    torch.testing.assert_close(
        pattern.spans.attend_whole(x, x, x, is_causal=True),
        dilated_attention(x, x, x, pattern, is_causal=True),
    )


def test_packed_rows_are_those_of_the_branches_that_meet():
    """Two heads, rate 2, a segment over two spans of 12: six rows a head, and none if later."""
    pattern = DilatedPattern([4, 24], [1, 2])
    rows = pattern.spans.packed_rows(range(12, 24), range(12), 2, 2, is_causal=True)
    assert rows.count == 12
    assert pattern.spans.packed_rows(range(12), range(12, 24), 2, 2, is_causal=True).count == 0
    assert pattern.spans.packed_rows(range(24, 36), range(12), 2, 2, is_causal=False).count == 0


@pytest.mark.parametrize(
    ("rate", "kv_heads", "tasks"),
    [(1, 12, 1), (4, 12, 1), (8, 12, 2), (16, 12, 1), (16, 4, 1), (5, 4, 2), (1, 4, 3)],
)
def test_offsets_that_are_alike_are_one_task(rate, kv_heads, tasks):
    """Four of eight offsets have two heads of twelve. A key head is read once in a task."""
    rows = DilatedPattern([240], [rate]).spans.packed_rows(
        range(80, 160), range(80), 12, kv_heads, is_causal=False
    )
    assert len(rows.tasks) == tasks


class CountOperations(TorchDispatchMode):
    """Counts the operators that run, but for views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_work_of_many_heads_is_a_few_operations(dropout_p):
    """As for one head, whatever the rate."""
    counts = []
    for heads in (1, 12):
        pattern = DilatedPattern([160], [16])
        problem = Problem(
            pattern, 1, 160, 160, heads, heads, 8, False, 0.0, dropout_p, seed=3
        )  # fmt: skip
        keys = KeyRows(*(x.detach() for x in problem.tensors()[1:]))
        seed = torch.tensor(7) if dropout_p else None
        spans = cut(160, 80)
        part = Part(problem, spans[0], spans, seed, keys)
        query = rows_of(problem.tensors()[0].detach(), spans[0])
        total = part.forward(query)
        with CountOperations() as forward:
            part.spans.attend_packed_(part.call, total, query, part.remote, part.packed)
        grad = KeyRows(*(torch.empty_like(x) for x in part.remote[:2]))
        with CountOperations() as backward:
            part.spans.attend_packed_backward(
                part.call, query, total.lse, query, part.remote, part.packed, total, grad
            )(torch.zeros_like(query))
        counts.append((forward.count, backward.count))
    assert counts[0] == counts[1]


def test_heads_that_read_the_same_rows_share_them():
    """Four query heads of one key head, two offsets: each row of the key head once."""
    pattern = DilatedPattern([24], [2])
    rows = pattern.spans.packed_rows(range(12, 24), range(12), 4, 1, is_causal=False)
    assert rows.count == 12


def test_only_whole_wide_segments_are_cliques():
    """Branches that fit in a span stay; of the others each head's rows see each other."""
    pattern = DilatedPattern([4, 24, 100], [1, 2, 3])
    local, cliques = pattern.spans.cliques(48, 12, 4, is_causal=False)
    assert local.pattern == DilatedPattern([4], [1])
    assert cliques == (Clique(24, 2, (0, 1, 0, 1)), Clique(48, 3, (0, 1, 2, 0)))
    assert DilatedPattern([24], [2]).spans.cliques(48, 12, 4, is_causal=False)[0] is None
    assert DilatedPattern([20], [2]).spans.cliques(48, 12, 4, is_causal=False) is None
    counted = DilatedPattern([24], [2], count_padding=True).spans
    assert counted.cliques(48, 12, 4, is_causal=False) is None
    assert counted.cliques(48, 12, 4, is_causal=True) is not None
    split = DilatedPattern([4, 24], [1, 2], head_groups="split")
    assert split.spans.cliques(48, 12, 4, is_causal=True) is None


@given(patterns(), st.integers(1, 60), st.booleans(), st.data())
def test_pairs_between_spans_are_those_of_the_definition(pattern, length, is_causal, data):
    heads = len(pattern.branches) + data.draw(st.integers(0, 3))
    cuts = st.sets(st.integers(1, length - 1)) if length > 1 else st.just(set())
    queries, keys = ([0, *sorted(data.draw(cuts)), length] for _ in "qk")
    seen = pattern.multiplicity(length, heads, is_causal=is_causal).sum(0)
    expected = [
        [int(seen[a:b, c:d].sum()) for c, d in pairwise(keys)] for a, b in pairwise(queries)
    ]
    edges = torch.tensor(queries), torch.tensor(keys)
    assert pattern.spans.pair_counts(*edges, heads, is_causal=is_causal).tolist() == expected


def test_pairs_of_segments_and_rates_beyond_all_positions_are_counted():
    pattern = DilatedPattern([2**62, 8], [2**62, 3])
    edges = torch.tensor([0, 5, 20])
    seen = pattern.multiplicity(20, 3).sum(0)
    found = pattern.spans.pair_counts(edges, edges, 3, is_causal=False)
    assert found.tolist() == [
        [int(seen[a:b, c:d].sum()) for c, d in ((0, 5), (5, 20))] for a, b in ((0, 5), (5, 20))
    ]
