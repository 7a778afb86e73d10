"""Run by test_row_step_kernels.py in a process of its own: errors of the interpreted kernels.

Prints one JSON object: for each case, the largest relative error against float64, over the
rounding of its dtype.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F

from dilated_factory.models import _norm_kernels
from dilated_factory.models import _row_kernels as kernels
from dilated_factory.models.positions import RotaryEmbedding

# name: (batch, heads, key heads, head_dim, whether positions differ, dtype)
CASES = {
    "one place": (3, 4, 2, 10, False, torch.float32),
    "places of their own": (3, 4, 2, 10, True, torch.float16),
    "one query head for a key head": (2, 3, 3, 64, True, torch.bfloat16),
    "one row": (1, 1, 1, 2, True, torch.float32),
}


def largest_error(name: str) -> float:
    """The largest relative error of turned rows, sums and norms."""
    batch, heads, kv_heads, head_dim, own, dtype = CASES[name]
    torch.manual_seed(0)
    embedding = RotaryEmbedding(head_dim)
    positions = torch.randint(2**24, (batch, 1) if own else (1,))
    rows = torch.randn(batch, 1, heads + 2 * kv_heads, head_dim).to(dtype)
    query, key, value = rows.double().split((heads, kv_heads, kv_heads), 2)
    expected = torch.cat((*embedding(query, key, positions, positions), value), 2)
    kernels.turn(rows.view(batch, -1), positions, embedding.turns(rows.device), heads, kv_heads)
    width = heads * head_dim
    hidden, added = torch.randn(2, batch, width).to(dtype)
    weight, bias = torch.randn(2, width)
    total, normed = torch.empty_like(hidden), torch.empty_like(hidden)
    _norm_kernels.forward(hidden, added, weight, bias, total, normed, None, 1e-5, gelu=False)
    exact = (hidden + added).double()
    pairs = [
        (rows, expected),
        (total, exact),
        (normed, F.layer_norm(exact, (width,), weight.double(), bias.double(), 1e-5)),
    ]
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
    return max(errors) / torch.finfo(dtype).eps


print(json.dumps({name: largest_error(name) for name in CASES}))
