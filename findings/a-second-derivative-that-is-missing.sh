#!/usr/bin/env bash
# torch 2.13.0: torch.autograd.function.once_differentiable, by which kernels of attention, of norms
# and of losses say that they have no second derivatives, and of which the documentation says that
# an attempt at one produces an error, mostly produces none: only where what arrives at the backward
# needs a gradient itself (it does not where the loss is a plain sum of what the function gives),
# and then only in a `backward()`. torch.autograd.functional.hessian is all zeros in both cases, and
# a penalty on a gradient to which something else adds lacks the function's own term.
#
# The values look like any others, so a model trains on wrong ones.
#
# What to do: have the gradients pass through a Function of their own in the backward, which takes
# the saved inputs as well and whose own backward raises; or raise at once where
# torch.is_grad_enabled() in a backward, which is create_graph=True.
#
# Seen on Linux, Python 3.11, torch 2.13.0+cpu, attention of three rows in float64:
#   hessian of the sum: 0.0 by once_differentiable, 3.136 by torch's operations
#   hessian of the sum of squares: 0.0 and 8.733
#   the same by backward() of a gradient: an error
#   gradient of a penalty on the gradient: 5.9% off
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy<3"
cat > "$folder/twice.py" <<'PY'
import torch
from torch.autograd.function import once_differentiable

torch.manual_seed(0)
key, value = torch.randn(2, 3, 4, dtype=torch.float64)
query = torch.randn(3, 4, dtype=torch.float64)


def by_operations(query):
    return (query @ key.T).softmax(-1) @ value


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query):
        ctx.save_for_backward(query)
        return by_operations(query)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (query,) = ctx.saved_tensors
        weights = (query @ key.T).softmax(-1)
        slopes = grad @ value.T
        return weights * (slopes - (weights * slopes).sum(-1, keepdim=True)) @ key


def penalty(attend):
    leaf = query.clone().requires_grad_()
    total = attend(leaf).sum() + leaf.pow(3).sum()
    (slope,) = torch.autograd.grad(total, leaf, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), leaf)[0]


hessian = torch.autograd.functional.hessian
for what, of in (("sum", torch.sum), ("sum of squares", lambda out: out.square().sum())):
    expected = hessian(lambda x: of(by_operations(x)), query).norm().item()
    found = hessian(lambda x: of(Attention.apply(x)), query).norm().item()
    print(f"hessian of the {what}: {found} by once_differentiable, {expected:.3f} by operations")
    assert found == 0.0 and expected > 0.1

leaf = query.clone().requires_grad_()
total = Attention.apply(leaf).square().sum()
(slope,) = torch.autograd.grad(total, leaf, create_graph=True)
try:
    slope.sum().backward()
except RuntimeError as error:
    print("backward() of a gradient:", str(error).splitlines()[0])
else:
    raise AssertionError("no error of backward() either")

right, wrong = penalty(by_operations), penalty(Attention.apply)
error = ((right - wrong).norm() / right.norm()).item()
print(f"gradient of a penalty on the gradient: {error:.1%} off")
assert error > 0.001
PY
"$folder/venv/bin/python" "$folder/twice.py"
