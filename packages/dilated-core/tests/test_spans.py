"""Attention span by span is attention of the whole, for any cut of the sequence into spans."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_core import DilatedPattern, dilated_attention
from dilated_core.interfaces import AttentionPattern, KeyRows, SpanCall
from dilated_testing import Problem, problems, relative_error


def cut(length, shard):
    """Spans of `shard` positions, the last one short."""
    return [range(start, min(length, start + shard)) for start in range(0, length, shard)]


def gather(call, pattern, spans, key, value, padding, kv_heads):
    """What ranks would exchange: for one span of queries, packed rows of all the others."""
    packed, parts = [], []
    for keys in spans:
        if keys == call.queries:
            continue
        rows = pattern.spans.packed_rows(
            call.queries, keys, call.heads, kv_heads, is_causal=call.is_causal
        )
        row, head = rows.index()
        assert rows.count == sum(rows.parts) == len(row)
        first = 0
        for size in rows.parts:
            part = torch.stack([row, head])[:, first : first + size]
            assert part.unique(dim=1).shape[1] == size
            first += size
        packed.append(rows)
        row = row + keys.start
        mask = None if padding is None else padding[:, row]
        parts.append((key[:, row, head], value[:, row, head], mask, row, head))
    return packed, parts


def run_by_spans(problem, shard):
    """As `Problem.run`, each span alone."""
    query, key, value = (x.detach() for x in problem.tensors())
    pattern, padding, batch = problem.pattern, problem.mask(), problem.batch
    torch.manual_seed(problem.seed)
    seed = torch.randint(2**62, ()) if problem.dropout_p else None
    spans = cut(problem.length, shard)
    calls = []
    for span in spans:
        call = SpanCall(
            span, problem.length, problem.is_causal, problem.head_dim**-0.5, problem.dropout_p, seed
        )
        object.__setattr__(call, "heads", problem.heads)
        calls.append(call)
    out = torch.empty_like(query)
    lse = query.new_empty(batch, problem.heads, problem.length)
    totals, exchanged = [], []

    def local(x, span):
        return None if x is None else x[:, span.start : span.stop]

    for call in calls:
        span = call.queries
        rows = KeyRows(*(local(x, span) for x in (key, value, padding)))
        total = pattern.spans.attend_span(call, local(query, span), rows)
        packed, parts = gather(call, pattern, spans, key, value, padding, problem.kv_heads)
        exchanged.append((packed, parts))
        if packed:
            remote = KeyRows(
                *(
                    None if c[0] is None else torch.cat(c, 1)
                    for c in list(zip(*parts, strict=True))[:3]
                )
            )
            pattern.spans.attend_packed_(call, total, local(query, span), remote, packed)
        totals.append(total)
        out[:, span.start : span.stop], lse[:, :, span.start : span.stop] = total
    generator = torch.Generator().manual_seed(problem.seed + 2)
    grad_out, grad_lse = (
        torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in (out, lse)
    )
    grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0.0)
    dq, dk, dv = (torch.zeros_like(x) for x in (query, key, value))
    for call, total, (packed, parts) in zip(calls, totals, exchanged, strict=True):
        span = call.queries
        rows = KeyRows(*(local(x, span) for x in (key, value, padding)))
        upstream = local(grad_out, span), grad_lse[:, :, span.start : span.stop], local(query, span)
        grads = pattern.spans.attend_span_backward(call, *upstream, rows, total)
        if packed:
            remote = KeyRows(
                *(
                    None if c[0] is None else torch.cat(c, 1)
                    for c in list(zip(*parts, strict=True))[:3]
                )
            )
            grad_keys = KeyRows(torch.empty_like(remote.key), torch.empty_like(remote.value))
            add = pattern.spans.attend_packed_backward(
                call, *upstream, remote, packed, total, grad_keys
            )
            add(grads[0])
            row, head = torch.cat([p[3] for p in parts]), torch.cat([p[4] for p in parts])
            for b in range(batch):
                dk[b].index_put_((row, head), grad_keys.key[b], accumulate=True)
                dv[b].index_put_((row, head), grad_keys.value[b], accumulate=True)
        for grad, part in zip((dq, dk, dv), grads, strict=True):
            grad[:, span.start : span.stop] += part
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


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
    assert isinstance(problem_of(pattern), Problem)


def problem_of(pattern):
    return Problem(pattern, 1, 24, 24, 4, 1, 3, False, 0.0, 0.0, 1)
