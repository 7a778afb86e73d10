"""Packages work together through core's interfaces, whichever of them are installed."""

import importlib.util
from typing import Any

import pytest
import torch

from dilated_core import DilatedPattern, MultiheadDilatedAttention, dilated_attention

NEEDS = {
    "dilated": set(),
    "dilated_multihead": set(),
    "auto": set(),
    "ring": {"dilated_ring"},
    "ring_multihead": {"dilated_ring"},
    "block_sparse": {"dilated_sparse"},
    "block_sparse_dilated": {"dilated_sparse"},
    "block_sparse_ring": {"dilated_ring", "dilated_sparse"},
    "block_sparse_ring_distributed": {"dilated_ring", "dilated_sparse"},
}
PATTERN = DilatedPattern([8, 24], [1, 3])


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 48, 3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    ]


def required(*names: str) -> list[Any]:
    """Import packages, or skip the test and say which is missing."""
    return [
        pytest.importorskip(name, reason=f"{name.replace('_', '-')} is not installed")
        for name in names
    ]


def gradients(out: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, tensors, upstream)]


def test_ring_takes_buffers_from_a_pool_and_a_pattern_from_core(
    tensors: list[torch.Tensor],
) -> None:
    ring, pool_package = required("dilated_ring", "dilated_pool")
    pool = pool_package.UnifiedMemoryPool()
    got = gradients(ring.ring_attention(*tensors, PATTERN, is_causal=True, buffers=pool), tensors)
    expected = gradients(dilated_attention(*tensors, PATTERN, is_causal=True), tensors)
    torch.testing.assert_close(got, expected)
    assert not pool.outstanding()


def test_ring_takes_a_layout_from_sparse(tensors: list[torch.Tensor]) -> None:
    ring, sparse = required("dilated_ring", "dilated_sparse")
    layout = sparse.layouts.sliding_window(48, 5, block_size=8)
    got = gradients(ring.ring_attention(*tensors, layout), tensors)
    expected = gradients(sparse.block_sparse_attention(*tensors, layout), tensors)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["dilated_ring", "dilated_sparse"])
def test_multihead_attention_of_core_takes_the_attention_of(name: str) -> None:
    (package,) = required(name)
    if name == "dilated_ring":
        attention = package.RingDilatedAttention(PATTERN)
    else:
        layout = package.layouts.sliding_window(48, 5, block_size=8)
        attention = package.BlockSparseDilatedAttention(PATTERN, layout)
    module = MultiheadDilatedAttention(24, 3, None, attention=attention)
    out, _ = module(torch.randn(2, 48, 24), is_causal=True)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("kind", NEEDS)
def test_the_registry_has_what_the_installed_packages_can_build(kind: str) -> None:
    (factory,) = required("dilated_factory")
    registry = factory.default_registry()
    if any(importlib.util.find_spec(package) is None for package in NEEDS[kind]):
        with pytest.raises(factory.MissingPackageError, match="pip install packages/dilated-core"):
            registry.create({"kind": kind})
        return
    values: dict[str, Any] = {"kind": kind}
    layout = {"kind": "sliding_window", "window": 5, "block_size": 8}
    pattern = {"segment_lengths": [8, 24], "dilation_rates": [1, 3]}
    fields = registry.config_type(kind).model_fields
    for name, value in {
        **pattern,
        "layout": layout,
        "embed_dim": 24,
        "num_heads": 3,
        "attention": {"kind": "dilated", **pattern},
        "length": 48,
        "heads": 3,
        "head_dim": 8,
    }.items():
        if name in fields and not (kind == "auto" and name == "layout"):
            values[name] = value
    module = registry.create(values)
    if "multihead" in kind:
        assert module(torch.randn(2, 48, 24))[0].shape == (2, 48, 24)
    else:
        q = torch.randn(2, 48, 3, 8)
        assert module(q, q, q, is_causal=True).isfinite().all()
