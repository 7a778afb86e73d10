"""Run by test_decode_interpreter.py in a process of its own: errors of the interpreted kernels.

Prints one JSON object: for each case, the largest relative error against the float64 oracle.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from dilated_core import DilatedPattern
from dilated_core._call import DilatedCall, Scores
from dilated_core._held_rows import HeldRows
from dilated_core._reference import attend as reference

NESTED = DilatedPattern([16, 64, 128], [1, 4, 16])
PLAIN = DilatedPattern([11, 37, 53], [1, 3, 4])
UNEVEN = DilatedPattern([7, 61], [3, 5], head_offsets="blocked")
SPLIT = DilatedPattern([13, 29], [2, 3], head_groups="split", head_offsets="blocked")
LONG = DilatedPattern([211], [1])
BEYOND = DilatedPattern([7, 3], [9, 2])

# name: (pattern, prefix of each batch row, rows decoded, heads, key heads, head_dim, options)
CASES = {
    "nested": (NESTED, [61, 61], 4, 5, 5, 16, {}),
    "grouped heads": (PLAIN, [31, 31], 7, 6, 2, 19, {}),
    "one key head": (UNEVEN, [41], 7, 5, 1, 16, {"scale": -0.7}),
    "ragged": (PLAIN, [29, 0, 53], 7, 3, 3, 17, {}),
    "ragged, some rows end": (PLAIN, [29, 7, 53], 7, 4, 2, 17, {"ends": True}),
    "padded": (PLAIN, [17, 36], 7, 2, 1, 16, {"padding": 0.4}),
    "all ignored": (PLAIN, [5], 3, 2, 1, 16, {"padding": 1.1}),
    "split heads": (SPLIT, [23, 24], 7, 5, 5, 16, {}),
    "shares": (LONG, [199], 14, 2, 1, 67, {}),
    "offsets beyond a segment": (BEYOND, [3, 10], 5, 11, 11, 3, {}),
    "scale 0": (PLAIN, [17], 5, 2, 1, 16, {"scale": 0.0}),
    "half": (NESTED, [61], 5, 4, 2, 16, {"dtype": torch.float16}),
}  # fmt: skip


def largest_error(name: str) -> float:
    """The largest relative error of a row's output in a case; inf where a length is wrong."""
    pattern, prefix, steps, heads, kv_heads, head_dim, options = CASES[name]
    generator = torch.Generator().manual_seed(0)
    dtype, batch, whole = options.get("dtype", torch.float32), len(prefix), max(prefix) + steps
    tensors = [
        torch.randn(batch, whole, h, head_dim, generator=generator).to(dtype)
        for h in (heads, kv_heads, kv_heads)
    ]
    ignored = torch.rand(batch, whole, generator=generator) < options.get("padding", 0.0)
    has_padding = "padding" in options
    scores = Scores(True, options.get("scale", head_dim**-0.5))

    held = HeldRows(pattern, heads, tensors[1])
    before = max(prefix)
    first = [x[:, :before] for x in tensors]
    held.append(0, torch.tensor(prefix), *first[1:], ignored[:, :before] if has_padding else None)
    seen = [[*(x[b, :n] for x in tensors), ignored[b, :n]] for b, n in enumerate(prefix)]
    errors = []
    for step in range(steps):
        new = [x[:, before + step : before + step + 1] for x in tensors]
        mask = ignored[:, before + step : before + step + 1] if has_padding else None
        real = torch.tensor([step % (b + 2) > 0 for b in range(batch)]).long()
        given = real if options.get("ends") else None
        out = held.decode(scores._replace(key_padding_mask=mask), given, *new)
        for b in range(batch):
            if given is not None and not given[b]:
                errors.append(out[b].double().norm())
                continue
            rows = [x[b] for x in (*new, ignored[:, before + step : before + step + 1])]
            seen[b] = [torch.cat(pair) for pair in zip(seen[b], rows, strict=True)]
            q, k, v = (x[None].double() for x in seen[b][:3])
            call = DilatedCall(pattern, scores._replace(key_padding_mask=seen[b][3][None]))
            expected = reference(call, q, k, v).out[0, -1]
            difference = torch.linalg.vector_norm(out[b, 0].double() - expected)
            errors.append(difference / expected.norm().clamp(min=1e-3))
    if held.lengths.tolist() != [len(rows[0]) for rows in seen]:
        return float("inf")
    # Unlike the built-in function, this one is NaN if an error is.
    return float(torch.stack(errors).max())


if __name__ == "__main__":
    json.dump({name: largest_error(name) for name in CASES}, sys.stdout)
