"""Run by test_triton_interpreter.py in a process of its own: errors of the interpreted kernels.

Prints the largest relative error against the float64 oracle of each case or, given the argument
"random", of random problems. What the kernels do not write stays NaN, which is no small error.
"""

import json
import math
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from hypothesis import given, settings

from dilated_core._triton import _launch
from dilated_core.extending import Config, Scores
from dilated_sparse import BlockLayout, layouts
from dilated_sparse._call import BlockCall
from dilated_sparse._operators import TRITON
from dilated_sparse._reference import attend as reference
from dilated_sparse._triton_backend import LayoutTiling
from dilated_testing import poisoned, stretch
from sparse_problems import Problem, problems

CHOOSE = LayoutTiling.choose
WIDE = Config(16, 16, 4, 1)
# Steps of more columns than full ones have, of a word, and of two words of bits.
STEPS = {"forward": WIDE, "query": Config(16, 32, 4, 1), "key": Config(16, 64, 4, 1, 64)}
SMALL = {"forward": WIDE, "query": WIDE, "key": WIDE}


def random_layout(heads, length, key_length, block_size, share=0.5):
    """Some blocks full, some empty, others random and, unless these are full, an empty row."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(heads, *shape, generator=generator)

    kind = draw(-(-length // block_size), -(-key_length // block_size))
    kind = kind.repeat_interleave(block_size, 1).repeat_interleave(block_size, 2)
    kind = kind[:, :length, :key_length]
    seen = (kind < 0.4) | ((kind < 0.7) & (draw(length, key_length) < share))
    if share < 1.0:
        seen[:, 3] = False
    return BlockLayout.from_dense(seen, block_size=block_size)


def one_busy_row():
    """A block sees itself, and the first one all: enough work to be started before the others."""
    seen = torch.eye(10).bool().repeat_interleave(16, 0).repeat_interleave(16, 1)
    seen[:16] = True
    return BlockLayout.from_dense(seen, block_size=16)


# name: (layout, what else the problem has, block sizes)
CASES = {
    "full blocks": (random_layout(1, 64, 80, 16, share=1.0), {"heads": 1, "kv_heads": 1}, SMALL),
    "window": (layouts.sliding_window(83, 31, block_size=16), {"heads": 1, "kv_heads": 1}, SMALL),
    "block size that does not divide": (random_layout(1, 47, 59, 21), {}, SMALL),
    "causal": (random_layout(1, 41, 53, 16), {"is_causal": True}, SMALL),
    "causal, wide steps": (random_layout(1, 67, 89, 40), {"is_causal": True}, STEPS),
    "per head": (random_layout(3, 37, 43, 16), {}, SMALL),
    "grouped": (random_layout(1, 37, 43, 16), {"heads": 4, "kv_heads": 2}, SMALL),
    "grouped, per head": (random_layout(4, 37, 43, 16), {"heads": 4, "kv_heads": 2}, SMALL),
    "one key head, causal": (
        random_layout(3, 37, 43, 16), {"kv_heads": 1, "is_causal": True}, STEPS
    ),
    "padding": (random_layout(1, 37, 43, 16), {"padding": 0.4}, SMALL),
    "all keys ignored": (random_layout(1, 19, 23, 16), {"padding": 1.1}, SMALL),
    "dropout": (random_layout(1, 41, 43, 16), {"dropout_p": 0.3}, SMALL),
    "dropout, causal, grouped": (
        random_layout(2, 41, 43, 16),
        {"dropout_p": 0.3, "is_causal": True, "heads": 2, "kv_heads": 1},
        SMALL,
    ),
    "one busy row": (one_busy_row(), {"heads": 2, "kv_heads": 2}, SMALL),
    "words": (random_layout(1, 131, 139, 70), {"heads": 1, "kv_heads": 1}, STEPS),
    "head_dim 19": (random_layout(1, 37, 37, 16), {"head_dim": 19}, SMALL),
    "half": (random_layout(1, 35, 37, 16), {"head_dim": 16, "dtype": torch.float16}, SMALL),
    "no keys": (BlockLayout.from_dense(torch.zeros(5, 0).bool(), block_size=4), {}, SMALL),
    "nothing visible": (BlockLayout.from_dense(torch.zeros(19, 23).bool()), {}, SMALL),
    "short of a block": (layouts.sliding_window(5, 2), {"head_dim": 3}, {}),
}  # fmt: skip


def force(blocks):
    """Block sizes by pass, instead of those that the tiling chooses."""
    LayoutTiling.choose = lambda tiling, which, *rest: (
        blocks.get(which) or CHOOSE(tiling, which, *rest)
    )


def poison():
    """Outputs start as NaN."""
    for name in ("empty_like", "empty_lse", "empty_grads"):
        setattr(_launch, name, poisoned(getattr(_launch, name)))


def largest_error(problem, dtype=torch.float32):
    """The largest relative error of out, lse and the gradients."""
    seed = torch.tensor(2**40 + 12345) if problem.dropout_p else None
    scale = problem.head_dim**-0.5 if problem.scale is None else problem.scale
    scores = Scores(problem.is_causal, scale, problem.mask(), problem.dropout_p, seed)
    call = BlockCall(problem.layout, scores)
    generator = torch.Generator().manual_seed(1)
    inputs = [x.detach().to(dtype) for x in problem.tensors()]
    upstream = None
    results = []
    for function, kind in ((TRITON.attend, dtype), (reference, torch.float64)):
        tensors = [x.to(kind).requires_grad_() for x in inputs]
        out, lse = function(call, *tensors)
        if upstream is None:
            upstream = [torch.randn(x.shape, generator=generator) for x in (out, lse)]
        seen = lse > -math.inf
        total = (out * upstream[0]).sum() + (lse.masked_fill(~seen, 0.0) * upstream[1]).sum()
        dq, *grads = torch.autograd.grad(total, tensors)
        dq = dq * stretch(problem.scale, problem.head_dim)
        results.append([out, lse.masked_fill(~seen, 999.0), dq, *grads])
    return worse(*(error(a, b) for a, b in zip(*results, strict=True)))


def worse(*errors):
    """The largest; NaN if one is."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def error(actual, expected):
    """Relative, NaN where anything is NaN; gradients may cancel to a few roundings."""
    floor = 1e-2 * math.sqrt(max(1, expected.numel()))
    norm = torch.linalg.vector_norm(expected).clamp(min=floor)
    return float(torch.linalg.vector_norm(actual.double() - expected) / norm)


def random_problems():
    """The largest error of some random problems."""
    worst = 0.0

    @settings(max_examples=25, database=None, derandomize=True, deadline=None)
    @given(problems(max_length=37))
    def examine(problem):
        nonlocal worst
        worst = worse(worst, largest_error(problem))
        assert worst < math.inf, problem

    examine()
    return worst


def measure(name):
    """The error of a case."""
    layout, rest, blocks = CASES[name]
    force(blocks)
    dtype = rest.pop("dtype", torch.float32)
    return largest_error(Problem(layout, **rest), dtype)


if __name__ == "__main__":
    poison()
    force(SMALL)
    random = sys.argv[1:] == ["random"]
    json.dump(random_problems() if random else {name: measure(name) for name in CASES}, sys.stdout)
