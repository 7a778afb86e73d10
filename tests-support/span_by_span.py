"""Attention span by span, as ranks compute it, in one process."""

import torch

from dilated_core import Partial
from dilated_core.extending import accumulate_dtype
from dilated_core.interfaces import KeyRows, SpanCall
from dilated_testing import stretch


def cut(length, shard):
    """Spans of `shard` positions, the last one short."""
    return [range(start, min(length, start + shard)) for start in range(0, length, shard)]


def rows_of(x, span):
    """The rows of a span, of anything with rows in its second dimension."""
    return None if x is None else x[:, span.start : span.stop]


class Part:
    """One span of a problem, and what ranks would send it: packed rows of all other spans."""

    def __init__(self, problem, span, spans, seed, keys):
        scale = problem.head_dim**-0.5 if problem.scale is None else problem.scale
        self.call = SpanCall(
            span, problem.length, problem.is_causal, scale, problem.dropout_p, seed
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
        """The merged partial of a span's query, out in query's dtype."""
        total = self.spans.attend_span(self.call, query, self.local)
        self.spans.attend_packed_(self.call, total, query, self.remote, self.packed)
        return Partial(total.out.to(query.dtype), total.lse)

    def backward(self, grad_out, grad_lse, query, total):
        """Gradients to the span's query, key and value, and to the packed rows."""
        upstream = grad_out, grad_lse, query
        wide = accumulate_dtype(query.dtype)
        packed = KeyRows(*(torch.empty_like(x, dtype=wide) for x in self.remote[:2]))
        add_to = self.spans.attend_packed_backward(
            self.call, *upstream, self.remote, self.packed, total, packed
        )
        grads = self.spans.attend_span_backward(self.call, *upstream, self.local, total)
        add_to(grads[0])
        return grads, packed


def run_by_spans(problem, shard, dtype=torch.float64):
    """As `Problem.run`, each span alone."""
    query, *keys = (x.detach() for x in problem.tensors(dtype))
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
        torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype)
        for x in (out, lse)
    )
    grad_lse = grad_lse.masked_fill(lse == -torch.inf, 0.0)
    wide = accumulate_dtype(dtype)
    grads = [torch.zeros_like(x, dtype=wide) for x in (query, keys.key, keys.value)]
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
    grads[0] *= stretch(problem.scale, problem.head_dim)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))
