"""Selection: what it picks runs, is the cheapest, and every other is rejected with a reason."""

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dilated_core import DilatedPattern, dilated_attention, select_backend
from dilated_factory import InputError
from dilated_factory.configs.attention import AutoConfig
from dilated_factory.errors import MissingPackageError
from dilated_factory.kinds.cost import estimate
from dilated_factory.kinds.default import default_registry
from dilated_factory.kinds.registry import create_attention
from dilated_factory.kinds.selection import Environment, Selection

HEADS, HEAD_DIM = 6, 8
RING = {"ring": ("dilated-ring",), "ring_multihead": ("dilated-ring",)}
SPARSE = {"block_sparse": ("dilated-sparse",), "block_sparse_dilated": ("dilated-sparse",)}
BOTH = ("dilated-ring", "dilated-sparse")
RING_SPARSE = {"block_sparse_ring": BOTH, "block_sparse_ring_distributed": BOTH}
ALL_KINDS = frozenset({"dilated", "dilated_multihead", "auto", *RING, *SPARSE, *RING_SPARSE})
HAS = set(default_registry())

PATTERNS: list[dict[str, Any]] = [
    {"segment_lengths": (16,), "dilation_rates": (1,)},
    {"segment_lengths": (8, 16, 48), "dilation_rates": (1, 2, 5)},
    {"segment_lengths": (4, 8), "dilation_rates": (1, 2), "head_offsets": "blocked"},
    {"segment_lengths": (4, 40), "dilation_rates": (1, 3), "head_groups": "split"},
    {"segment_lengths": (7, 64), "dilation_rates": (2, 4), "count_padding": True},
]
LAYOUTS: list[dict[str, Any]] = [
    {"layout": {"kind": "sliding_window", "window": 9, "block_size": 8}},
    {"layout": {"kind": "bigbird", "block_size": 8}},
    {"layout": {"kind": "strided", "stride": 5, "block_size": 4}},
]
FUNCTIONS = [*PATTERNS, *LAYOUTS, PATTERNS[1] | LAYOUTS[0], PATTERNS[2] | LAYOUTS[1]]


def installed(*packages: str) -> Environment:
    """An environment on a CPU with these packages beside dilated-core."""
    kinds, missing = {"dilated", "dilated_multihead", "auto"}, {}
    for kind, needs in (RING | SPARSE | RING_SPARSE).items():
        absent = tuple(package for package in needs if package not in packages)
        if absent:
            missing[kind] = absent
        else:
            kinds.add(kind)
    return Environment(frozenset(kinds), missing)


ENVIRONMENTS = [
    installed(),
    installed("dilated-ring"),
    installed("dilated-sparse"),
    installed(*BOTH),
]


def requests() -> Iterator[tuple[AutoConfig, Environment]]:
    """More than two thousand requests, each with what is installed."""
    grid = itertools.product(
        FUNCTIONS,
        (48, 600, 4096),
        (1, 2, 8),
        (False, True),
        ("float32", "float64", "bfloat16"),
        ENVIRONMENTS,
    )
    for function, length, world, is_causal, dtype, environment in grid:
        nodes = 2 if world == 8 else 1
        yield (
            AutoConfig(
                length=length,
                heads=HEADS,
                kv_heads=3,
                head_dim=HEAD_DIM,
                is_causal=is_causal,
                dtype=dtype,
                world=world,
                nodes=nodes,
                **function,
            ),
            environment,
        )


@cache
def tensors(dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 48, heads, HEAD_DIM) for heads in (HEADS, 3, 3)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    kind = getattr(torch, dtype)
    return q.to(kind), k.to(kind), v.to(kind)


def test_over_a_grid_of_requests_every_pick_runs() -> None:
    registry = default_registry()
    served: dict[tuple[Any, ...], bool] = {}
    counts = {"picked": 0, "refused": 0}
    for request, environment in requests():
        needs = (("dilated-ring",) if request.world > 1 else ()) + (
            ("dilated-sparse",) if request.layout is not None else ()
        )
        try:
            selection = Selection.of(request, environment)
        except MissingPackageError as refusal:
            said = str(refusal)
            assert any(package in said for package in needs)
            assert environment is not ENVIRONMENTS[3]
            counts["refused"] += 1
            continue
        except InputError:
            # One softmax over both, spread over ranks, is what no package has.
            assert request.world > 1
            assert request.pattern is not None
            assert request.layout is not None
            counts["refused"] += 1
            continue
        counts["picked"] += 1
        assert selection.kind in environment.kinds
        others = {(kind, backend) for kind, backend, _ in selection.rejected}
        assert (selection.kind, selection.backend) not in others
        assert all(reason for _, _, reason in selection.rejected)
        if selection.kind not in HAS:
            continue
        key = (selection.config, selection.backend, request.dtype, request.is_causal)
        if key not in served:
            q, k, v = tensors(request.dtype)
            module = create_attention(selection.config, registry)
            out = module(q, k, v, is_causal=request.is_causal)
            served[key] = bool(out.isfinite().all()) and out.shape == q.shape
        assert served[key], selection
    assert counts["picked"] >= 1000
    assert counts["refused"] >= 1000


def test_the_pick_computes_what_was_asked_for() -> None:
    q, k, v = tensors("float64")
    for function in PATTERNS:
        request = AutoConfig(
            length=48, heads=HEADS, kv_heads=3, head_dim=HEAD_DIM, scale=0.3, **function
        )
        assert request.pattern is not None
        expected = dilated_attention(
            q, k, v, request.pattern, scale=0.3, enable_gqa=True, backend="reference"
        )
        made = create_attention(request, default_registry())
        torch.testing.assert_close(made(q, k, v), expected)


@given(
    st.sampled_from(FUNCTIONS[:-2]),
    st.sampled_from(ENVIRONMENTS),
    st.sampled_from([1, 2, 8]),
    st.booleans(),
)
def test_it_is_pure(
    function: dict[str, Any], environment: Environment, world: int, is_causal: bool
) -> None:
    request = AutoConfig(
        length=64, heads=HEADS, head_dim=HEAD_DIM, world=world, is_causal=is_causal, **function
    )

    def outcome() -> object:
        try:
            return Selection.of(request, environment)
        except InputError as error:
            return str(error)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert outcome() == outcome()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("float32", 64), ("float64", 64), ("bfloat16", 320), ("float16", 8)]
)
def test_the_backend_is_the_one_that_core_takes(dtype: Any, head_dim: int) -> None:
    request = AutoConfig(length=48, heads=HEADS, head_dim=head_dim, dtype=dtype, **PATTERNS[0])
    q = torch.empty(1, 48, HEADS, head_dim, dtype=getattr(torch, dtype))
    selection = Selection.of(request, Environment.of(default_registry()))
    assert selection.backend == select_backend(q, q).backend


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [("float32", 64), ("float64", 64), ("bfloat16", 320), ("float16", 8)]
)
def test_the_backend_is_the_one_that_core_takes_on_a_gpu(dtype: Any, head_dim: int) -> None:
    request = AutoConfig(
        length=48, heads=HEADS, head_dim=head_dim, dtype=dtype, device="cuda", **PATTERNS[1]
    )
    shape = (1, 48, HEADS, head_dim)
    q = torch.randn(shape, dtype=getattr(torch, dtype), device="cuda")
    selection = Selection.of(request, Environment.of(default_registry()))
    assert selection.backend == select_backend(q, q).backend
    assert create_attention(selection.config, default_registry())(q, q, q).isfinite().all()


GPU = Environment(ALL_KINDS, triton=True, capability=(9, 0))


def pick(environment: Environment = GPU, /, **fields: Any) -> Selection:
    shape: dict[str, Any] = {"length": 4096, "heads": HEADS, "head_dim": 64, "dtype": "bfloat16"}
    return Selection.of(AutoConfig(**(shape | fields)), environment)


def why(selection: Selection, kind: str, backend: str) -> str:
    return next(r for k, b, r in selection.rejected if (k, b) == (kind, backend))


@pytest.mark.parametrize(
    ("fields", "kind", "backend"),
    [
        ({}, "dilated", "torch"),
        ({"device": "cuda"}, "dilated", "triton"),
        ({"device": "cuda", "dtype": "float64"}, "dilated", "torch"),
        ({"device": "cuda", "head_dim": 257}, "dilated", "torch"),
        ({"backend": "reference"}, "dilated", "reference"),
        ({"device": "cuda", "backend": "torch"}, "dilated", "torch"),
        ({"world": 2}, "ring", "torch"),
        ({"world": 2, "device": "cuda"}, "ring", "triton"),
        ({"world": 8, "nodes": 4, "device": "cuda"}, "ring", "triton"),
    ],
)
def test_a_pattern_is_served_by(fields: dict[str, Any], kind: str, backend: str) -> None:
    selection = pick(**PATTERNS[1], **fields)
    assert (selection.kind, selection.backend) == (kind, backend)


def test_attention_over_a_layout_is_not_served_by_a_pattern() -> None:
    pytest.importorskip("dilated_sparse", reason="dilated-sparse is not installed")
    selection = pick(**LAYOUTS[0])
    assert selection.kind == "block_sparse"
    assert "needs a dilated pattern" in why(selection, "dilated", "torch")


def test_a_mesh_pays_where_many_ranks_of_a_node_want_the_same_far_blocks() -> None:
    pytest.importorskip("dilated_sparse", reason="dilated-sparse is not installed")
    far = {"kind": "global_tokens", "count": 2048, "block_size": 64}
    spread = {"world": 16, "nodes": 2, "device": "cuda"}
    assert pick(layout=far, length=65536, **spread).kind == "block_sparse_ring_distributed"
    near = {"kind": "sliding_window", "window": 64, "block_size": 64}
    selection = pick(layout=near, length=65536, **spread)
    assert selection.kind == "block_sparse_ring"
    assert "times as long" in why(selection, "block_sparse_ring_distributed", "torch")
    one_node = pick(layout=far, length=65536, world=16, device="cuda")
    assert "needs several nodes" in why(one_node, "block_sparse_ring_distributed", "torch")


@pytest.mark.parametrize(
    ("fields", "rejected", "says"),
    [
        ({}, ("dilated", "triton"), "needs CUDA, the request is for cpu"),
        ({}, ("dilated", "reference"), "slow oracle"),
        ({}, ("block_sparse", "torch"), "leaves out the request's dilated pattern"),
        ({}, ("ring", "torch"), "times as long as the pick"),
        ({"world": 2}, ("dilated", "torch"), "the request spreads it over 2"),
        ({"backend": "torch"}, ("dilated", "reference"), "backend='torch' was given"),
        ({"device": "cuda", "head_dim": 300}, ("dilated", "triton"), "at most 256"),
        ({"device": "cuda", "dtype": "float64"}, ("dilated", "triton"), "is for float64"),
    ],
)
def test_what_is_not_picked_is_told_why(
    fields: dict[str, Any], rejected: tuple[str, str], says: str
) -> None:
    assert says in why(pick(**PATTERNS[1], **fields), *rejected)


def test_old_gpus_and_missing_triton_are_told() -> None:
    old = Environment(ALL_KINDS, triton=True, capability=(7, 5))
    bare = Environment(ALL_KINDS, triton=False, capability=(9, 0))
    for environment, says in ((old, "8.0 or newer"), (bare, "triton is not installed")):
        selection = pick(environment, device="cuda", **PATTERNS[0])
        assert selection.backend == "torch"
        assert says in why(selection, "dilated", "triton")
    with pytest.raises(InputError, match="dilated with torch: there is no CUDA device"):
        pick(installed(*BOTH), device="cuda", **PATTERNS[0])


def test_a_request_that_a_package_would_serve_names_it() -> None:
    with pytest.raises(MissingPackageError, match=r"'ring' serves it\) .*packages/dilated-ring$"):
        pick(installed(), world=2, **PATTERNS[0])
    with pytest.raises(MissingPackageError, match=r"packages/dilated-sparse$"):
        pick(installed("dilated-ring"), **LAYOUTS[0])
    with pytest.raises(InputError, match="no kind of attention serves the request: dilated with"):
        pick(installed(*BOTH), world=2, **(PATTERNS[0] | LAYOUTS[0]))


def test_a_layout_that_does_not_fit_is_an_error() -> None:
    pytest.importorskip("dilated_sparse", reason="dilated-sparse is not installed")
    with pytest.raises(ValueError, match=r"lengths must add up to 4096. Got 7"):
        pick(layout={"kind": "document", "lengths": (7,)})
    with pytest.raises(ValueError, match=r"layout must have 1 head or the request's 6. Got 5."):
        pick(layout={"kind": "random_blocks", "count": 1, "heads": 5})


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2]))
def test_the_estimate_counts_the_operations_and_rows_of_the_definition(
    world: int, nodes: int
) -> None:
    pytest.importorskip("dilated_ring", reason="dilated-ring is not installed")
    nodes = min(world, nodes)
    pattern = DilatedPattern([16, 64, 256], [1, 4, 16])
    request = AutoConfig(
        length=256,
        heads=4,
        kv_heads=2,
        head_dim=8,
        segment_lengths=pattern.segment_lengths,
        dilation_rates=pattern.dilation_rates,
        world=world,
        nodes=nodes,
    )
    cost = estimate(request, "torch", spread=True, mesh=False)
    assert cost.flops == pattern.flops(256, 4, 8) // world
    # Each of the two query heads of a key head keeps rows of its own where the rate is above 1.
    shard, row = 256 // world, 2 * 8 * 4
    groups = [-(-w // shard) for w in pattern.segment_lengths]
    offsets = [len({head % r for head in heads}) for r in (1, 4, 16) for heads in ((0, 1), (2, 3))]
    kept = [a + b for a, b in zip(offsets[::2], offsets[1::2], strict=True)]
    rows = [(g - 1) * (shard // r) * k for g, r, k in zip(groups, (1, 4, 16), kept, strict=True)]
    assert cost.bytes_within + cost.bytes_across == sum(rows) * row
    assert (cost.bytes_across > 0) == (nodes > 1)
