"""An eager call hands its layout on as it is: after the first, nothing is made or hashed again."""

import hashlib
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from dilated_core.interfaces import KeyRows, SpanCall
from dilated_sparse import _blocks, block_sparse_attention, layouts
from dilated_sparse._blocks import Layout

X = torch.randn(1, 32, 2, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def counts(monkeypatch):
    """How many layouts were made, and how many digests of their tensors."""
    found = Counter()
    make = Layout.__init__

    def counted(layout, *arguments, **named):
        found["layouts"] += 1
        make(layout, *arguments, **named)

    def blake2b(*arguments, **options):
        found["digests"] += 1
        return hashlib.blake2b(*arguments, **options)

    monkeypatch.setattr(Layout, "__init__", counted)
    monkeypatch.setattr(_blocks, "hashlib", SimpleNamespace(blake2b=blake2b))
    return found


def step(layout, **options):
    tensors = [X.clone().requires_grad_() for _ in range(3)]
    out = block_sparse_attention(*tensors, layout, **options)
    torch.autograd.grad(out, tensors, torch.ones_like(out))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.5}], ids=str)
def test_after_the_first_call_no_layout_is_made_and_none_is_hashed(counts, options):
    layout = layouts.bigbird(32, block_size=4)
    step(layout, **options)
    assert counts["layouts"]
    assert counts["digests"]
    counts.clear()
    for _ in range(3):
        step(layout, **options)
    assert not counts


def test_the_first_forward_hashes_a_layout_once_and_its_backward_makes_none(counts):
    layout = layouts.sliding_window(32, 5, block_size=8)
    counts.clear()
    step(layout)
    assert counts == {"digests": 1}


def test_spans_that_were_attended_before_make_and_hash_no_layout(counts):
    layout = layouts.bigbird(32, block_size=4)
    call = SpanCall(range(16), 32, False, 0.5)
    near, far = (KeyRows(x, x) for x in X.split(16, 1))

    def attend():
        spans = layout.spans
        total = spans.attend_span(call, near.key, near)
        packed = spans.packed_rows(range(16), range(16, 32), 2, 2, is_causal=False)
        row, head = packed.index()
        keys = KeyRows(*(x[:, row, head] for x in far[:2]))
        spans.attend_packed_(call, total, near.key, keys, [packed])
        spans.attend_span_backward(call, total.out, None, near.key, near, total)

    attend()
    counts.clear()
    attend()
    assert not counts
