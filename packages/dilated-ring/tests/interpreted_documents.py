"""Run by test_documents_interpreter.py in a process of its own: the kernels on packed documents.

Prints one JSON object: for each case, the largest relative error against the float64 oracle.
"""

import json
import os
import sys
from dataclasses import replace
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"

import torch

from dilated_core import DilatedPattern, _triton
from dilated_core._triton._driving import Config
from dilated_core._triton._pattern_plans import PatternTiling
from dilated_ring._documents import Documents
from dilated_testing import Problem, relative_error
from ring_programs import varlen
from span_by_span import run_by_spans

PATTERN = DilatedPattern([8, 24, 1000], [1, 2, 5])
ENDS = (0, 7, 7, 30, 53)

# name: (causal, share of keys that are ignored)
CASES = {
    "causal": (True, 0.0),
    "padded": (False, 0.3),
}


def largest_error(name: str) -> float:
    """The largest relative error of out, lse and gradients."""
    is_causal, padding = CASES[name]
    problem = Problem(PATTERN, 1, ENDS[-1], ENDS[-1], 6, 2, 11, is_causal, padding, 0.0, 5)
    query, key, value = (x.detach().float().double().requires_grad_() for x in problem.tensors())
    attention = partial(varlen, ends=list(ENDS[:-1]))
    expected = problem.run("reference", (query, key, value), attention=attention)
    packed = replace(problem, pattern=Documents(PATTERN, ENDS))  # type: ignore[arg-type]  # a pattern too
    actual = run_by_spans(packed, 23, torch.float32)
    return max(relative_error(actual[name], expected[name]) for name in expected)


def main() -> None:
    """Print the errors."""
    PatternTiling.choose = lambda *_: Config(32, 32, 4, 1)  # type: ignore[method-assign]  # small
    _triton.unsupported = lambda query, key: None
    json.dump({name: largest_error(name) for name in CASES}, sys.stdout)


if __name__ == "__main__":
    main()
