"""Run by test_norms.py in a process of its own: errors of the interpreted kernels.

Prints one JSON object: for each case, the largest relative error against float64, over the
rounding of the dtype of what is compared.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import TypeAlias

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilated_factory.models import _norm_kernels as kernels
from dilated_factory.models import norms

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
Case: TypeAlias = tuple[int, int, torch.dtype, torch.dtype | None, torch.dtype, bool]
# name: (rows, features, dtypes of input, of what is added, of out, whether GELU is first)
CASES: dict[str, Case] = {
    "GELU, one row": (1, 3072, BFLOAT, None, BFLOAT, True),
    "GELU, more rows than programs": (61, 48, HALF, None, HALF, True),
    "GELU, a second block that is filled in part": (7, 139, BFLOAT, None, BFLOAT, True),
    "GELU, features no power of two": (7, 97, BFLOAT, None, BFLOAT, True),
    "rows of float32": (19, 97, FLOAT, None, BFLOAT, False),
    "rows of 16 bits": (7, 768, HALF, None, HALF, False),
    "rows of one 16-bit dtype to the other": (7, 50, HALF, None, BFLOAT, False),
    "one feature": (3, 1, FLOAT, None, HALF, False),
    "many features": (2, 5000, BFLOAT, None, BFLOAT, False),
    "no rows": (0, 48, FLOAT, BFLOAT, BFLOAT, False),
    "a sum of float32 and 16 bits": (19, 768, FLOAT, BFLOAT, BFLOAT, False),
    "a sum of float32 and 16 bits in two blocks": (7, 139, FLOAT, HALF, HALF, False),
    "a sum of 16 bits": (19, 50, BFLOAT, BFLOAT, BFLOAT, False),
    "a sum of float32": (7, 97, FLOAT, FLOAT, HALF, False),
}

# Programs are few, so that one serves several rows; tensors of the CPU are taken for a GPU's.
kernels._MULTIPROCESSORS = 1
norms.has_kernels = lambda x: x.shape[-1] <= norms.MOST_FEATURES


def apply(case: Case, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The norm, and the sum if there is one, by the kernels."""
    *_, second, dtype, gelu = case
    if gelu:
        return (norms.gelu_norm(inputs[0], *inputs[-2:], 1e-5),)
    if second is None:
        return (norms.narrow_norm(inputs[0], *inputs[-2:], 1e-5, dtype),)
    total, normed = norms.sum_and_norm(*inputs, 1e-5, dtype)
    return normed, total


def exact(case: Case, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The same in the dtype of the inputs; a sum is rounded as it is kept."""
    _, features, first, second, _, gelu = case
    parts = [F.gelu(inputs[0])] if gelu else inputs[:-2]
    total = sum(parts)
    if second is not None:
        total = total + ((total.to(first) - total).detach())
    normed = F.layer_norm(total, (features,), *inputs[-2:], 1e-5)
    return (normed,) if second is None else (normed, total)


def largest_error(case: Case) -> float:
    """The largest error of what is given, and of gradients with each part of what is given."""
    rows, features, first, second, dtype, _ = case
    torch.manual_seed(0)
    kinds = [first] if second is None else [first, second]
    # Transposed: kernels want rows that lie one after the other.
    inputs = [torch.randn(features, rows).T.to(x).requires_grad_() for x in kinds]
    inputs += [torch.randn(features).requires_grad_() for _ in range(2)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, wanted = apply(case, inputs), exact(case, wide)
    assert [x.dtype for x in found] == [dtype, first][: len(found)]
    pairs = list(zip(found, wanted, strict=True))
    upstream = [torch.randn(rows, features).to(x.dtype) for x in found]
    for part in ([0], [0, 1], [1])[: 2 * len(found) - 1]:
        grads = [
            torch.autograd.grad(
                [outputs[i] for i in part if i < len(found)], given,
                [upstream[i].to(outputs[i].dtype) for i in part if i < len(found)],
                allow_unused=True, retain_graph=True,
            )
            for outputs, given in ((found, inputs), (wanted, wide))
        ]  # fmt: skip
        assert [x is None for x in grads[0]] == [x is None for x in grads[1]]
        pairs += [pair for pair in zip(*grads, strict=True) if pair[0] is not None]
        assert [x.dtype for x in grads[0] if x is not None] == [
            y.dtype for x, y in zip(grads[0], inputs, strict=True) if x is not None
        ]
    return max(
        float((a.double() - b).norm().detach() / b.norm().detach().clamp(min=1e-3))
        / torch.finfo(dtype if a.dtype == FLOAT else a.dtype).eps
        for a, b in pairs
    )


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(0, 3), features=st.integers(8, 70), narrow=st.sampled_from([HALF, BFLOAT]),
    first=st.sampled_from([HALF, BFLOAT, FLOAT]), sums=st.booleans(),
)  # fmt: skip
def check_any(
    rows: int, features: int, narrow: torch.dtype, first: torch.dtype, sums: bool
) -> None:
    """Errors are within the rounding whatever the shape and the dtypes."""
    if first != FLOAT and sums:
        narrow = first  # the interpreter's rounding of a sum is not torch's
    case = (rows, features, first, narrow if sums else None, narrow, False)
    assert largest_error(case) < 0.6, case


check_any()
print(json.dumps({name: largest_error(case) for name, case in CASES.items()}))
