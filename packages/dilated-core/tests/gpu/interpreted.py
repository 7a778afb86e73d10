"""Run by test_triton_interpreter.py in a process of its own: errors of the interpreted kernels.

Prints one JSON object: for each case, the largest relative error against the float64 oracle.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from dilated_core import DilatedPattern
from dilated_core._call import DilatedCall, Scores, Upstream
from dilated_core._reference import attend as reference
from dilated_core._torch.engine import attend_wide, backward_wide
from dilated_core._triton import attend, attend_span, attend_span_backward
from dilated_core._triton._driving import Config
from dilated_core._triton._pattern_plans import PatternTiling

# Segments long enough that every key is visited once, with a weight.
NESTED = DilatedPattern([64, 128, 256], [1, 2, 4])
PLAIN = DilatedPattern([11, 37, 53], [1, 3, 4])
PADDING = DilatedPattern([7, 13, 60], [1, 2, 6], count_padding=True)
# Segments that end inside tiles, and fill steps on both sides.
UNEVEN = DilatedPattern([37, 59], [1, 2])
SPLIT = DilatedPattern([13, 29], [2, 3], head_groups="split", head_offsets="blocked")

# name: (pattern, queries, keys, heads, key heads, head_dim, options)
CASES = {
    "nested": (NESTED, 131, 131, 1, 1, 16, {}),
    "nested, causal": (NESTED, 131, 131, 1, 1, 16, {"is_causal": True}),
    "uneven": (UNEVEN, 131, 131, 2, 1, 16, {}),
    "uneven, packed": (UNEVEN, 131, 131, 2, 1, 16, {"cu_seqlens": [0, 29, 131]}),
    "uneven, padding mask": (UNEVEN, 131, 131, 2, 1, 16, {"padding": 0.3}),
    "uneven, dropout": (UNEVEN, 71, 71, 2, 2, 16, {"dropout_p": 0.3}),
    "later scores far above": (UNEVEN, 83, 83, 2, 2, 16, {"key_factors": (1.0, 70.0)}),
    "later scores far below": (UNEVEN, 83, 83, 2, 2, 16, {"key_factors": (70.0, 1.0)}),
    "causal, far above": (
        NESTED, 97, 97, 1, 1, 16, {"key_factors": (1.0, 70.0), "is_causal": True}
    ),
    "cross lengths": (PLAIN, 41, 59, 2, 1, 16, {}),
    "cross lengths, causal": (PLAIN, 41, 59, 2, 1, 16, {"is_causal": True}),
    "head_dim 19": (PLAIN, 37, 37, 1, 1, 19, {}),
    "head_dim 117, in halves": (PLAIN, 23, 23, 1, 1, 117, {"dtype": torch.float16}),
    "head_dim 43": (PLAIN, 37, 37, 2, 1, 43, {"scale": -0.2}),
    "head_dim 48, in two": (PLAIN, 37, 37, 2, 1, 48, {}),
    "causal, scale 0": (NESTED, 35, 35, 1, 1, 16, {"is_causal": True, "scale": 0.0}),
    "causal, negative scale": (
        NESTED, 35, 35, 1, 1, 16, {"is_causal": True, "scale": -0.7, "padding": 0.3}
    ),
    "padding mask": (PLAIN, 43, 43, 2, 2, 16, {"padding": 0.4}),
    "all keys ignored": (PLAIN, 19, 19, 1, 1, 16, {"padding": 1.1}),
    "count_padding": (PADDING, 47, 29, 2, 1, 16, {}),
    "dropout": (PLAIN, 43, 43, 2, 2, 16, {"dropout_p": 0.3}),
    "dropout, causal": (PLAIN, 43, 43, 2, 1, 16, {"dropout_p": 0.3, "is_causal": True}),
    "split heads": (SPLIT, 31, 31, 5, 5, 16, {"scale": -0.3}),
    "packed": (PLAIN, 61, 61, 2, 1, 16, {"cu_seqlens": [0, 17, 17, 61], "dropout_p": 0.2}),
    "packed, count_padding": (PADDING, 61, 61, 2, 1, 16, {"cu_seqlens": [0, 23, 61]}),
    "packed, causal": (
        NESTED, 61, 61, 2, 2, 16, {"cu_seqlens": [0, 23, 61], "is_causal": True, "padding": 0.2}
    ),
    "span": (PLAIN, 41, 41, 2, 1, 16, {"first_key": 71, "padding": 0.2, "dropout_p": 0.2}),
    "span, causal": (NESTED, 67, 67, 2, 2, 16, {"first_key": 53, "is_causal": True}),
    "half": (NESTED, 35, 35, 1, 1, 16, {"dtype": torch.float16}),
    # Weights relative to the first scores are beyond float16 on either side.
    "half, later scores above": (
        UNEVEN, 83, 83, 2, 2, 16, {"dtype": torch.float16, "key_factors": (1.0, 30.0)}
    ),
    "half, later scores below": (
        UNEVEN, 83, 83, 2, 2, 16, {"dtype": torch.float16, "key_factors": (30.0, 1.0)}
    ),
    "half, causal, packed": (
        NESTED, 61, 61, 2, 2, 16,
        {"dtype": torch.float16, "cu_seqlens": [0, 23, 61], "is_causal": True, "padding": 0.2},
    ),
    "the first keys are padding": (UNEVEN, 83, 83, 2, 1, 16, {"leading_padding": 41}),
}  # fmt: skip


def largest_error(name: str) -> float:
    """The largest relative error of out, lse and the gradients of a case."""
    pattern, length, key_length, heads, kv_heads, head_dim, options = CASES[name]
    generator = torch.Generator().manual_seed(0)
    ends = options.get("cu_seqlens")
    # The interpreter is slow: where segments end in tiles, one sequence shows it.
    batch = 1 if ends or pattern is UNEVEN else 2

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dtype = options.get("dtype", torch.float32)
    inputs = [draw(batch, n, h, head_dim).to(dtype) for n, h in
              ((length, heads), (key_length, kv_heads), (key_length, kv_heads))]  # fmt: skip
    if "key_factors" in options:
        early, late = options["key_factors"]
        inputs[1] *= torch.where(torch.arange(key_length) < 59, early, late)[:, None, None]
    upstream = draw(batch, length, heads, head_dim), draw(batch, heads, length)
    padding = options.get("padding")
    mask = torch.rand(batch, key_length, generator=generator) < padding if padding else None
    if "leading_padding" in options:
        mask = torch.arange(key_length).expand(batch, -1) < options["leading_padding"]
    scores = Scores(
        options.get("is_causal", False),
        options.get("scale", head_dim**-0.5),
        mask,
        options.get("dropout_p", 0.0),
        torch.tensor(2**40 + 12345) if options.get("dropout_p") else None,
    )
    call = DilatedCall(pattern, scores, torch.tensor(ends) if ends else None)
    results = []
    if "first_key" in options:
        first = options["first_key"]
        for kind, forward, backward, place in (
            (dtype, attend_span, attend_span_backward, {"first_key": first}),
            (torch.float64, attend_wide, backward_wide, {"start": first, "whole_length": 999}),
        ):
            rows = [x.to(kind) for x in inputs]
            part = forward(call, *rows, **place)
            seen = part.lse > -torch.inf
            given = Upstream(upstream[0].to(kind), upstream[1].to(kind), *rows, part)
            grads = backward(call, given, **place)
            results.append([part.out, part.lse.masked_fill(~seen, 999.0), *grads])
        return _largest(results)
    for function, kind in ((attend, dtype), (reference, torch.float64)):
        tensors = [x.to(kind).requires_grad_() for x in inputs]
        out, lse = function(call, *tensors)
        seen = lse > -torch.inf
        total = (out * upstream[0]).sum() + (lse.masked_fill(~seen, 0.0) * upstream[1]).sum()
        grads = torch.autograd.grad(total, tensors)
        results.append([out, lse.masked_fill(~seen, 999.0), *grads])
    return _largest(results)


def _largest(results: list[list[Tensor]]) -> float:
    errors = [
        torch.linalg.vector_norm(a.double() - b) / torch.linalg.vector_norm(b).clamp(min=1e-3)
        for a, b in zip(*results, strict=True)
    ]
    # Unlike the built-in function, this one is NaN if an error is.
    return float(torch.stack(errors).max())


if __name__ == "__main__":
    PatternTiling.choose = lambda *_: Config(16, 16, 4, 1)
    json.dump({name: largest_error(name) for name in CASES}, sys.stdout)
