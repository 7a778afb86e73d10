"""Run by test_gelu_norm.py in a process of its own: errors of the interpreted kernels.

Prints one JSON object: for each case, the largest relative error against float64, over the
rounding of its dtype.
"""

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F

from dilated_factory.models import _gelu_norm_kernels as kernels

# name: (rows, features, dtype)
CASES = {
    "one row": (1, 3072, torch.bfloat16),
    "more rows than programs": (61, 48, torch.float16),
    "a second block that is filled in part": (7, 139, torch.bfloat16),
    "features no power of two": (7, 97, torch.bfloat16),
}

# Programs are few, so that one serves several rows.
kernels._MULTIPROCESSORS = 1


def largest_error(name: str) -> float:
    """The largest relative error of out and gradients."""
    rows, features, dtype = CASES[name]
    torch.manual_seed(0)
    x, grad = (torch.randn(rows, features).to(dtype) for _ in range(2))
    weight, bias = torch.randn(features), torch.randn(features)
    out, grad_x, moments = torch.empty_like(x), torch.empty_like(x), torch.empty(2, rows)
    kernels.forward(x, weight, bias, out, moments, 1e-5)
    parts = kernels.backward(grad, x, weight, moments, grad_x).sum(1)
    wide = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = F.layer_norm(F.gelu(wide[0]), (features,), wide[1], wide[2], 1e-5)
    wanted = torch.autograd.grad(expected, wide, grad.double())
    pairs = zip((out, grad_x, *parts), (expected.detach(), *wanted), strict=True)
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
    return max(errors) / torch.finfo(dtype).eps


print(json.dumps({name: largest_error(name) for name in CASES}))
