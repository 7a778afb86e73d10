"""Run by test_spans_interpreter.py in a process of its own: the kernels in attention by spans.

Prints one JSON object: for each case, the largest relative error against the float64 oracle, and
the same with each of some faults planted.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from dilated_core import DilatedPattern, _row_attention, _triton
from dilated_core._spans import DilatedSpans
from dilated_core._torch import rows as _rows
from dilated_core._triton._driving import Config
from dilated_core._triton._pattern_plans import PatternTiling
from dilated_testing import Problem, relative_error
from span_by_span import run_by_spans

WIDE = DilatedPattern([8, 24, 1000], [1, 2, 5])
RARE = DilatedPattern([1000], [13])


def problem(
    pattern: DilatedPattern, length: int, heads: int, kv_heads: int, **rest: Any
) -> Problem:
    """A problem whose sizes are different primes, unless `rest` says otherwise."""
    sizes = {"length": length, "key_length": length, "heads": heads, "kv_heads": kv_heads}
    others = {"batch": 1, "head_dim": 11, "is_causal": False, "padding": 0.0, "dropout_p": 0.0}
    return Problem(pattern, seed=5, **sizes, **others | rest)


# name: (problem, rows of a span, dtype)
CASES = {
    "offsets at once": (problem(RARE, 83, 7, 7), 43, torch.float32),
    "several branches": (problem(WIDE, 61, 7, 7), 23, torch.float32),
    "causal": (problem(WIDE, 61, 5, 5, is_causal=True), 31, torch.float32),
    "key heads that are shared": (problem(WIDE, 53, 6, 2), 29, torch.float32),
    "two sequences, padded": (problem(WIDE, 53, 3, 3, batch=2, padding=0.3), 29, torch.float32),
    "dropout": (problem(WIDE, 43, 3, 3, dropout_p=0.3), 23, torch.float32),
    "half": (problem(RARE, 53, 3, 3), 29, torch.float16),
}


def largest_error(name: str) -> float:
    """The largest relative error of out, lse and gradients of a case; infinite if not finite."""
    case, shard, dtype = CASES[name]
    rounded = [x.detach().to(dtype).double().requires_grad_() for x in case.tensors()]
    expected = case.run("reference", (rounded[0], rounded[1], rounded[2]))
    actual = run_by_spans(case, shard, dtype)
    try:
        return max(relative_error(actual[name], expected[name]) for name in expected)
    except AssertionError:
        return float("inf")


def own_partial(exact: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that does not take the merged partial."""

    def backward(rows: Any, grad_out: Tensor, grad_lse: Tensor | None, *rest: Any) -> Any:
        *tensors, _ = rest
        return exact(rows, grad_out, grad_lse, *tensors, _row_attention.attend(rows, *tensors))

    return backward


def same_heads(exact: Callable[..., Any]) -> Callable[..., Any]:
    """Views in which all groups have the heads of the first."""
    return lambda x, runs, *heads: exact(x, runs, *heads[:3], 0, *heads[4:])


# name: (where, what, the wrong one)
FAULTS = {
    "its own partial": (_row_attention, "attend_backward", own_partial),
    "heads of the first group": (_rows, "grouped", same_heads),
    "no gradient of lse": (
        _triton, "attend_rows_backward",
        lambda exact: lambda *rest: exact(*rest[:3], rest[3]._replace(grad_lse=None)),
    ),
}  # fmt: skip


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """The fault, for the length of a `with` block."""
    place, name, wrong = FAULTS[fault]
    exact = getattr(place, name)
    setattr(place, name, wrong(exact))
    yield
    setattr(place, name, exact)


def main() -> None:
    """Print the errors."""
    PatternTiling.choose = lambda *_: Config(32, 32, 4, 1)
    _triton.unsupported = lambda query, key: None
    # A span's attention to itself is interpreted elsewhere.
    DilatedSpans._has_kernel = lambda *_: False
    errors = {name: largest_error(name) for name in CASES}
    for fault in FAULTS:
        with planted(fault):
            errors[fault] = largest_error("offsets at once")
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
