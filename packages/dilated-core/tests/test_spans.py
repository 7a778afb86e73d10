"""Attention span by span is attention of the whole, for any cut of the sequence into spans."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_core import DilatedPattern, Partial, dilated_attention
from dilated_core.interfaces import AttentionPattern, Clique, KeyRows, SpanCall
from dilated_testing import problems, relative_error


def cut(length, shard):
    """Spans of `shard` positions, the last one short."""
    return [range(start, min(length, start + shard)) for start in range(0, length, shard)]


def rows_of(x, span):
    """The rows of a span, of anything with rows in its second dimension."""
    return None if x is None else x[:, span.start : span.stop]


class Part:
    """One span of a problem, and what ranks would send it: packed rows of all other spans."""

    def __init__(self, problem, span, spans, seed, keys):
        self.call = SpanCall(
            span, problem.length, problem.is_causal, problem.head_dim**-0.5, problem.dropout_p, seed
        )
        self.spans = problem.pattern.spans
        self.local = KeyRows(*(rows_of(x, span) for x in keys))
        sizes = problem.heads, problem.kv_heads
        others = [other for other in spans if other != span]
        self.packed = [
            self.spans.packed_rows(span, other, *sizes, is_causal=problem.is_causal)
            for other in others
        ]
        rows, heads = [], []
        for packed, other in zip(self.packed, others, strict=True):
            row, head = packed.index()
            assert packed.count == sum(packed.parts) == len(row)
            for part in torch.stack([row, head]).split(packed.parts, 1):
                assert part.unique(dim=1).shape[1] == part.shape[1]
            rows.append(row + other.start)
            heads.append(head)
        none = [torch.empty(0, dtype=torch.int64)]
        self.row, self.head = torch.cat(none + rows), torch.cat(none + heads)
        key, value = (x[:, self.row, self.head] for x in keys[:2])
        self.remote = KeyRows(
            key, value, None if keys.padding is None else keys.padding[:, self.row]
        )

    def forward(self, query):
        total = self.spans.attend_span(self.call, query, self.local)
        self.spans.attend_packed_(self.call, total, query, self.remote, self.packed)
        return total

    def backward(self, grad_out, grad_lse, query, total):
        """Gradients to the span's query, key and value, and to the packed rows."""
        upstream = grad_out, grad_lse, query
        packed = KeyRows(torch.empty_like(self.remote.key), torch.empty_like(self.remote.value))
        add_to = self.spans.attend_packed_backward(
            self.call, *upstream, self.remote, self.packed, total, packed
        )
        grads = self.spans.attend_span_backward(self.call, *upstream, self.local, total)
        add_to(grads[0])
        return grads, packed


def run_by_spans(problem, shard):
    """As `Problem.run`, each span alone."""
    query, *keys = (x.detach() for x in problem.tensors())
    keys = KeyRows(*keys, problem.mask())
    torch.manual_seed(problem.seed)
    seed = torch.randint(2**62, ()) if problem.dropout_p else None
    spans = cut(problem.length, shard)
    parts = [Part(problem, span, spans, seed, keys) for span in spans]
    totals = [part.forward(rows_of(query, part.call.queries)) for part in parts]
    empty = Partial(query[:, :0], query.new_empty(problem.batch, problem.heads, 0))
    out, lse = (
        torch.cat(x, dim) for x, dim in zip(zip(empty, *totals, strict=True), (1, 2), strict=True)
    )
    generator = torch.Generator().manual_seed(problem.seed + 2)
    grad_out, grad_lse = (
        torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in (out, lse)
    )
    grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0.0)
    grads = [torch.zeros_like(x) for x in (query, keys.key, keys.value)]
    for part, total in zip(parts, totals, strict=True):
        span = part.call.queries
        local, packed = part.backward(
            rows_of(grad_out, span),
            grad_lse[:, :, span.start : span.stop],
            rows_of(query, span),
            total,
        )
        for grad, found in zip(grads, local, strict=True):
            rows_of(grad, span).add_(found)
        for grad, found in zip(grads[1:], packed, strict=False):
            for b in range(problem.batch):
                grad[b].index_put_((part.row, part.head), found[b], accumulate=True)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


@given(problems(cross=False), st.integers(1, 47))
def test_spans_together_are_the_whole(problem, shard):
    expected = problem.run("reference", problem.tensors())
    actual = run_by_spans(problem, shard)
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
