"""Attention that a registry builds over ranks is what it builds on one device."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from dilated_factory import create_attention, default_registry
from process_ranks import Ranks, World, worlds
from registry_programs import attend, tensors

LAYOUT = {"layout": {"kind": "bigbird", "block_size": 8}}
PATTERN = {"segment_lengths": [8, 64], "dilation_rates": [1, 4]}
LENGTH = 128


@pytest.fixture(scope="module", params=worlds(4)[:1])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    world: World = request.param
    with Ranks(world) as group:
        yield group


@pytest.mark.parametrize(
    ("kind", "local", "fields", "mesh"),
    [
        ("ring", "dilated", PATTERN, None),
        ("block_sparse_ring", "block_sparse", LAYOUT, None),
        ("block_sparse_ring_distributed", "block_sparse", LAYOUT, (2, 2)),
    ],
)
def test_ranks_compute_what_one_device_computes(
    ranks: Ranks, kind: str, local: str, fields: dict[str, Any], mesh: tuple[int, ...] | None
) -> None:
    parts = ranks.run(attend, {"kind": kind, **fields}, LENGTH, mesh)
    got = [torch.cat(pieces, 1) for pieces in zip(*parts, strict=True)]
    module = create_attention({"kind": local, **fields}, default_registry())
    query, key, value, upstream = tensors(LENGTH)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    out = module(*inputs, is_causal=True)
    expected = [out, *torch.autograd.grad(out, inputs, upstream)]
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 1e-10


def test_a_mesh_of_one_dimension_is_an_error() -> None:
    values = {"kind": "block_sparse_ring_distributed", **LAYOUT}
    with pytest.raises(ValueError, match="group must be a DeviceMesh of two dimensions"):
        create_attention(values, default_registry(), group=cast(Any, object()))
