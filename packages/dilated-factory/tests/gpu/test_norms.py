"""Layer norms by kernels: on the CPU through Triton's interpreter, and on a GPU."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dilated_factory.models.norms import can_serve, gelu_norm
from triton_interpreter import case_names, interpret

SCRIPT = Path(__file__).with_name("interpreted_norms.py")
NAMES = case_names(SCRIPT)
FEATURES = [16, 48, 97, 3072, 5000]


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    found: dict[str, float] = interpret(SCRIPT)
    return found


@pytest.mark.xdist_group("norms_interpreter")
@pytest.mark.parametrize("name", NAMES)
def test_interpreted_kernels_agree_with_float64(name: str, errors: dict[str, float]) -> None:
    assert errors[name] < 0.5
    assert sorted(errors) == sorted(NAMES)


@pytest.mark.gpu
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_it_is_as_exact_as_its_dtype(features: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 701, features, device="cuda").to(dtype)
    grad = torch.randn_like(x)
    weight, bias = (torch.randn(features, device="cuda", requires_grad=True) for _ in range(2))
    inputs = (x.requires_grad_(), weight, bias)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    assert can_serve(x)
    out = gelu_norm(*inputs, 1e-5)
    expected = F.layer_norm(F.gelu(wide[0]), (features,), wide[1], wide[2], 1e-5)
    wanted = (expected, *torch.autograd.grad(expected, wide, grad.double()))
    for found, right in zip((out, *torch.autograd.grad(out, inputs, grad)), wanted, strict=True):
        assert (found.double() - right).norm() <= torch.finfo(dtype).eps * right.norm() + 1e-6


@pytest.mark.gpu
def test_the_operator_passes_opcheck_and_takes_no_rows() -> None:
    x = torch.randn(3, 5, 48, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.randn(48, device="cuda", requires_grad=True) for _ in range(2))
    for added, gelu in ((None, True), (None, False), (torch.randn_like(x), False)):
        given = (x, added, weight, bias, 1e-5, x.dtype, gelu)
        torch.library.opcheck(torch.ops.dilated_factory.norm.default, given)
    gelu_norm(x[:0], weight, bias, 1e-5).sum().backward()
    assert not weight.grad.any()  # type: ignore[union-attr]
