"""Adaptive selection on the queries and keys of a trained model: its bound holds for every row."""

import inspect
import json
import textwrap

import pytest
import torch

from dilated_factory import LongNetConfig, LongNetLM
from dilated_sparse import select

LENGTH, BLOCK = 8192, 128


def source_bytes(module):
    return torch.tensor(list(inspect.getsource(module).encode()), dtype=torch.int64)


@pytest.fixture(scope="module")
def trained():
    """A small model after 60 short steps on Python sources, and its first and last loss."""
    torch.manual_seed(0)
    model = LongNetLM(LongNetConfig())
    text = torch.cat([source_bytes(module) for module in (inspect, json, pytest, textwrap)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        starts = torch.randint(len(text) - 513, (4,))
        batch = torch.stack([text[start : start + 513] for start in starts.tolist()])
        logits = model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses[0], losses[-1]


def queries_and_keys(model):
    """What each layer's attention gets for a source file of 8192 bytes."""
    found = []
    hooks = [
        block.attention.attention.register_forward_pre_hook(
            lambda _module, inputs: found.append(inputs[:2])
        )
        for block in model.blocks
    ]
    with torch.no_grad():
        model(source_bytes(inspect)[None, 20000 : 20000 + LENGTH])
    for hook in hooks:
        hook.remove()
    return found


def dropped_mass(query, key, layout):
    """(H, N): the share of each row's causal softmax on keys that the layout hides, in float64."""
    dense, n = layout.to_dense(), query.shape[1]
    shares = torch.empty(query.shape[2], n, dtype=torch.float64)
    for head in range(query.shape[2]):
        q, k = (x[0, :, head].double() for x in (query, key))
        for start in range(0, n, 1024):
            rows = slice(start, start + 1024)
            scores = q[rows] @ k.T * q.shape[1] ** -0.5
            later = torch.arange(n) > torch.arange(n)[rows, None]
            weights = scores.masked_fill_(later, -torch.inf).softmax(-1)
            shares[head, rows] = weights.masked_fill_(dense[head, rows], 0.0).sum(-1)
    return shares


def test_the_bound_on_the_dropped_mass_holds_for_every_row(trained):
    model, first, last = trained
    assert last < 0.7 * first
    for query, key in queries_and_keys(model):
        chosen = select.threshold_blocks(query, key, 0.95, is_causal=True, block_size=BLOCK)
        dropped = dropped_mass(query, key, chosen.layout)
        assert (dropped <= chosen.dropped_mass + 1e-6).all()
        # Neither is the bound trivial, nor does the layout show everything.
        assert (chosen.dropped_mass < 0.9).any()
        assert chosen.layout.causal().density() < 0.48
