"""Layer norms by kernels: on the CPU through Triton's interpreter, and on a GPU."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_core import DilatedAttention, DilatedPattern
from dilated_factory import SlideEncoder, SlideEncoderConfig, TransformerEncoderLayer
from dilated_factory.models import norms
from dilated_factory.models.layers import NarrowNorm, Recompute
from dilated_factory.models.norms import can_serve, gelu_norm, narrow_norm, sum_and_norm
from triton_interpreter import case_names, interpret

SCRIPT = Path(__file__).with_name("interpreted_norms.py")
LAYERS = Path(__file__).with_name("interpreted_layers.py")
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


@pytest.fixture(scope="module")
def layers() -> dict[str, Any]:
    found: dict[str, Any] = interpret(LAYERS)
    return found


@pytest.mark.xdist_group("layers_interpreter")
@pytest.mark.parametrize("name", case_names(LAYERS))
def test_layers_with_interpreted_kernels_are_as_exact_and_keep_no_more(
    name: str, layers: dict[str, Any]
) -> None:
    error, saved, launched = layers[name]
    assert error < 1.5
    # GELU's output; on the CPU autocast widens nothing for torch's norms, which may narrow moments.
    sizes = {
        "autocast": 2 * 4 * 48,
        "a memory": 2 * 4 * 48,
        "a hook": 2 * 4 * 48,
        "a 16-bit model": 2 * 4 * 48 - 4 * 4,
    }
    assert saved == sizes.get(name, 0)
    first = [] if name == "float32" else ["norm", "norm", "sum", "gelu"]
    if name in ("selective", "a hook"):  # which make the norm again, and see it alone
        first[2] = "norm"
    assert launched[: len(first)] == first
    assert bool(launched) == bool(first)


def test_a_binary_is_known_by_all_that_it_depends_on_and_not_by_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from dilated_factory.models import _norm_kernels

    seen: list[tuple[object, ...]] = []

    def door(facts: tuple[object, ...], *launch: object, **options: object) -> None:
        seen.append(facts)

    monkeypatch.setattr(_norm_kernels, "_doors", lambda: (door, door))
    half, wide = torch.bfloat16, torch.float32
    base: dict[str, Any] = {
        "x": wide, "added": half, "weight": wide, "out": half, "moments": True, "rows": 5,
        "features": 48, "gelu": False,
    }  # fmt: skip
    changes: list[dict[str, Any]] = [
        {}, {"rows": 64}, {"x": half}, {"added": None}, {"added": wide}, {"weight": half},
        {"out": torch.float16}, {"moments": False}, {"features": 64}, {"features": 768},
        {"gelu": True, "added": None},
    ]  # fmt: skip
    for change in changes:
        case = base | change
        shape = case["rows"], case["features"]
        x = torch.zeros(shape, dtype=case["x"])
        added = None if case["added"] is None else torch.zeros(shape, dtype=case["added"])
        weight = torch.zeros(shape[1], dtype=case["weight"])
        out = torch.zeros(shape, dtype=case["out"])
        moments = torch.zeros(2, shape[0]) if case["moments"] else None
        total = None if added is None else torch.zeros_like(x)
        _norm_kernels.forward(x, added, weight, weight, total, out, moments, 1e-5, case["gelu"])
    assert seen[0] == seen[1]
    assert len(set(seen)) == len(changes) - 1


@pytest.mark.parametrize("shape", [(2, 7), (2, 9), (8, 2)])
def test_rows_of_another_width_are_refused_by_torch(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "has_kernels", lambda x: True)
    norm, x = NarrowNorm(8, dtype=torch.bfloat16), torch.randn(shape).bfloat16()
    for call in (norm, lambda x: norm.of_sum(x, x)):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            call(x)


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
def test_the_operator_passes_opcheck_takes_no_rows_and_refuses_second_derivatives() -> None:
    x = torch.randn(3, 5, 48, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.randn(48, device="cuda", requires_grad=True) for _ in range(2))
    for added, gelu in ((None, True), (None, False), (torch.randn_like(x), False)):
        given = (x, added, weight, bias, 1e-5, x.dtype, gelu)
        torch.library.opcheck(torch.ops.dilated_factory.norm.default, given)
    (once,) = torch.autograd.grad(gelu_norm(x, weight, bias, 1e-5).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        once.sum().backward()
    gelu_norm(x[:0], weight, bias, 1e-5).sum().backward()
    assert not weight.grad.any()  # type: ignore[union-attr]


WIDTHS = [1, 50, 97, 768, 1536, 3072, 5000, 8192, 16384]


@pytest.mark.gpu
@pytest.mark.parametrize("features", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide", [True, False], ids=["float32", "16 bits"])
def test_norms_of_rows_and_sums_are_as_exact_as_their_dtype(
    features: int, dtype: torch.dtype, wide: bool
) -> None:
    shape = (2, 701 if features < 5000 else 37, features)
    kind = torch.float32 if wide else dtype
    x = torch.randn(shape, device="cuda").to(kind).requires_grad_()
    added = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    weight, bias = (torch.randn(features, device="cuda", requires_grad=True) for _ in range(2))
    grads = [torch.randn_like(x), torch.randn(shape, device="cuda").to(dtype)]
    inputs = (x, added, weight, bias)
    found = sum_and_norm(*inputs, 1e-5, dtype)
    total = (x + added).detach()
    assert torch.equal(found[0], total)
    bound = torch.finfo(dtype).eps

    def check(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
        for one, right in zip(found, wanted, strict=True):
            assert (one.double() - right).norm() <= bound * right.norm() + 1e-3

    sums = [y.detach().double().requires_grad_() for y in (total, weight, bias)]
    expected = F.layer_norm(sums[0], (features,), sums[1], sums[2], 1e-5)
    check(found[1:], (expected,))
    for upstream in (grads, [torch.zeros_like(x), grads[1]]):
        if upstream is grads:
            got = torch.autograd.grad(found, inputs, upstream, retain_graph=True)
        else:
            got = torch.autograd.grad(found[1], inputs, upstream[1], retain_graph=True)
        of_sum, *rest = torch.autograd.grad(expected, sums, upstream[1].double(), retain_graph=True)
        of_sum = of_sum + upstream[0].double()
        assert [y.dtype for y in got[:2]] == [kind, dtype]
        check(got, (of_sum, of_sum, *rest))
    alone = total.clone().requires_grad_()
    normed = narrow_norm(alone, weight, bias, 1e-5, dtype)
    # Of another kind, the kernel may add in another order.
    assert (normed.double() - found[1].double()).norm() <= bound / 10 * found[1].double().norm()
    check(
        torch.autograd.grad(normed, (alone, weight, bias), grads[1]),
        torch.autograd.grad(expected, sums, grads[1].double()),
    )


@pytest.mark.gpu
def test_rows_beyond_two_billion_elements_are_found() -> None:
    x = torch.zeros(2**21 + 3, 1024, device="cuda", dtype=torch.bfloat16)
    x[-1] = torch.randn(1024)
    weight, bias = torch.ones(1024, device="cuda"), torch.zeros(1024, device="cuda")
    out = narrow_norm(x, weight, bias, 1e-5, x.dtype)
    expected = F.layer_norm(x[-1].float(), (1024,))
    assert (out[-1].float() - expected).norm() < 1e-2 * expected.norm()
    assert not out[:-1].any()


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [None, "pointwise", "selective"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "16-bit model"])
def test_a_layer_is_as_exact_as_with_torchs_norms_and_keeps_no_more(
    recompute: Recompute | None, dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    attention = DilatedAttention(DilatedPattern([32, 128], [1, 4]))
    layer = TransformerEncoderLayer(256, 8, attention, device="cuda")
    for part in layer.modules():
        if isinstance(part, NarrowNorm):
            torch.nn.init.normal_(part.weight, 1, 0.3)
            torch.nn.init.normal_(part.bias)
    layer.recompute = recompute
    layer.to(torch.float32 if autocast else dtype)
    hidden, upstream = torch.randn(2, 2, 300, 256, device="cuda").to(
        layer.attention_norm.weight.dtype
    )
    names = ["output", "hidden", *(name for name, _ in layer.named_parameters())]

    def outputs(one: TransformerEncoderLayer, kind: torch.dtype) -> tuple[Tensor, ...]:
        given = hidden.clone().to(kind).requires_grad_()
        with torch.autocast("cuda", dtype, enabled=autocast and kind != torch.float64):
            # As asked for: what the allocator gives depends on what was free before.
            before = torch.cuda.memory_stats()["requested_bytes.all.current"]
            out = one(given)
            kept.append(torch.cuda.memory_stats()["requested_bytes.all.current"] - before)
        leaves = [given, *one.parameters()]
        return out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))

    kept: list[int] = []
    exact = outputs(copy.deepcopy(layer).double(), torch.float64)
    outputs(layer, hidden.dtype)  # tables that attention keeps
    found = outputs(layer, hidden.dtype)
    monkeypatch.setattr("dilated_factory.models.layers.narrow_dtype", lambda *_: None)
    plain = outputs(layer, hidden.dtype)
    assert kept[2] <= kept[3]
    for name, ours, torchs, right in zip(names, found, plain, exact, strict=True):
        errors = [float((x.double() - right).detach().norm()) for x in (ours, torchs)]
        assert ours.dtype == torchs.dtype
        # A key bias moves all scores of a query alike: its gradient is rounding.
        assert errors[0] < 2 * errors[1] or "k_proj.bias" in name, name


@pytest.mark.gpu
def test_a_slide_encoder_is_as_exact_as_with_torchs_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = SlideEncoderConfig(
        tile_dim=24, embed_dim=96, num_heads=2, num_layers=3, segment_lengths=(32, 96, 256),
        dilation_rates=(1, 2, 4), global_pool=True,
    )  # fmt: skip
    model = SlideEncoder(config, device="cuda").eval()
    tiles = torch.randn(1, 500, 24, device="cuda")
    places = torch.randint(250_000, (1, 500, 2), device="cuda")

    def errors() -> list[float]:
        with torch.no_grad(), torch.autocast("cuda", torch.float16):
            found = model(tiles, places, all_layer_embed=True)
        pairs = zip(found, exact, strict=True)
        return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]

    with torch.no_grad():
        exact = copy.deepcopy(model).double()(tiles.double(), places, all_layer_embed=True)
    ours = errors()
    monkeypatch.setattr("dilated_factory.models.layers.narrow_dtype", lambda *_: None)
    assert all(a < 2 * b + 1e-6 for a, b in zip(ours, errors(), strict=True))
