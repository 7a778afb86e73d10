"""Rotary and xPos: products depend on positions through their difference only."""

import copy
import math
import pickle
from typing import Any

import mpmath  # type: ignore[import-untyped]  # torch brings it
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dilated_factory import LongNetConfig, LongNetEncoder, LongNetEncoderConfig, LongNetLM
from dilated_factory.models.positions import RotaryEmbedding, XPosEmbedding


def products(embedding: RotaryEmbedding, n: int, m: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 1, 3, embedding.head_dim, generator=generator, dtype=dtype)
    key = torch.randn(2, 1, 3, embedding.head_dim, generator=generator, dtype=dtype)
    query, key = embedding(query, key, torch.tensor([n]), torch.tensor([m]))
    return (query * key).sum(-1)


@given(st.integers(0, 10**6), st.integers(0, 3000), st.integers(0, 10**6), st.sampled_from([2, 14]))
def test_rotary_is_relative(n: int, distance: int, m: int, head_dim: int) -> None:
    rotary = RotaryEmbedding(head_dim)
    here = products(rotary, n + distance, n, torch.float64)
    there = products(rotary, m + distance, m, torch.float64)
    # Angles of a million radians are known to about 1e-10 in float64.
    torch.testing.assert_close(here, there, rtol=0, atol=1e-8)


@given(st.integers(0, 9000), st.integers(0, 3000), st.integers(0, 9000), st.integers(-500, 9000))
def test_xpos_is_relative_and_its_centre_cancels(
    n: int, distance: int, m: int, centre: int
) -> None:
    here = products(XPosEmbedding(10, centre=centre), n + distance, n, torch.float64)
    there = products(XPosEmbedding(10, centre=0), m + distance, m, torch.float64)
    torch.testing.assert_close(here, there, rtol=1e-8, atol=1e-8)


def test_rotary_turns_pairs_by_the_stated_angle() -> None:
    query = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    rotary = RotaryEmbedding(4, base=100.0)
    for turned, n in zip(
        rotary(query, query, torch.tensor([7]), torch.tensor([3])), (7, 3), strict=True
    ):
        expected = [math.cos(n), math.sin(n), -math.sin(n / 10), math.cos(n / 10)]
        torch.testing.assert_close(turned.flatten(), torch.tensor(expected))


def test_xpos_scales_by_the_stated_power_of_the_distance() -> None:
    distance, head_dim, scale_base = 96, 6, 32
    # All pairs but the one looked at are zero, and turning keeps the length of a pair.
    for pair in range(head_dim // 2):
        query = torch.zeros(1, 1, 1, head_dim, dtype=torch.float64)
        query[..., 2 * pair] = 1.0
        embedding = XPosEmbedding(head_dim, scale_base=scale_base, centre=5)
        turned, kept = embedding(query, query, torch.tensor([distance + 11]), torch.tensor([11]))
        zeta = (2 * pair / head_dim + 0.4) / 1.4
        found = turned.norm() * kept.norm()
        assert found.item() == pytest.approx(zeta ** (distance / scale_base), rel=1e-12)


@pytest.mark.parametrize("embedding", [RotaryEmbedding(8), XPosEmbedding(8, centre=2000)])
def test_turning_is_float32_or_wider_and_keeps_the_dtype(embedding: RotaryEmbedding) -> None:
    exact = products(embedding, 4001, 3000, torch.float64)
    single = products(embedding, 4001, 3000, torch.float32)
    assert single.dtype == torch.float32
    half = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    turned, _ = embedding(half, half, torch.tensor([4001]), torch.tensor([3000]))
    wide, _ = embedding(half.float(), half.float(), torch.tensor([4001]), torch.tensor([3000]))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned, wide.bfloat16(), rtol=0, atol=0)
    assert exact.isfinite().all()


@pytest.mark.parametrize("head_dim", [0, 7])
def test_an_odd_head_dim_is_an_error(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim must be even and positive. Got {head_dim}"):
        RotaryEmbedding(head_dim)


FAR = XPosEmbedding(22, base=500.0, scale_base=2**20, centre=2**23)


@pytest.mark.parametrize("embedding", [RotaryEmbedding(22, base=500.0), FAR])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1.5e-7), (torch.float64, 1e-9)])
def test_tables_are_exact_up_to_far_positions(
    embedding: RotaryEmbedding, dtype: torch.dtype, bound: float
) -> None:
    positions = [0, 1, 7, 4001, 10**6, 2**20 - 1, 2**23 + 12345, 2**24 - 1, 2**24]
    table = embedding.table(torch.tensor(positions), dtype)
    assert table.dtype == dtype
    with mpmath.workdps(40):
        for row, n in enumerate(positions):
            for pair in range(11):
                turn = mpmath.expj(n * mpmath.mpf(500) ** (-mpmath.mpf(pair) / 11))
                factor = mpmath.mpf(1)
                if embedding is FAR:
                    zeta = (mpmath.mpf(pair) / 11 + mpmath.mpf(2) / 5) * 5 / 7
                    factor = zeta ** (mpmath.mpf(n - 2**23) / 2**20)
                for column, size in ((0, factor), (-1, 1 / factor)):
                    found = mpmath.mpc(*table[row, column, pair].tolist())
                    assert abs(found / size - turn) < bound


def test_a_table_serves_as_positions_do() -> None:
    query, key = torch.randn(2, 1, 37, 3, 10)
    positions = torch.randint(2**14, (37,))
    for embedding in (RotaryEmbedding(10), XPosEmbedding(10, scale_base=2**14)):
        table = embedding.table(positions, torch.float32)
        expected = embedding(query, key, positions, positions)
        torch.testing.assert_close(embedding(query, key, table, table), expected, rtol=0, atol=0)
        compiled = torch.compile(embedding, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(query, key, table, table), expected)


@pytest.mark.parametrize("positions", ["rotary", "xpos"])
def test_no_float64_is_made_for_a_device_that_has_none(positions: str) -> None:
    shape = {"embed_dim": 32, "num_heads": 4, "num_layers": 2, "positions": positions}
    language_model = LongNetLM(LongNetConfig.model_validate(shape))
    encoder = LongNetEncoder(LongNetEncoderConfig.model_validate(shape))
    with NoFloat64():
        language_model.loss(torch.randint(256, (1, 30))).backward()
        encoder(torch.randn(1, 30, 32)).sum().backward()


class NoFloat64(TorchDispatchMode):
    """Fails as MPS does, wherever a tensor of float64 is made."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            assert not isinstance(made, torch.Tensor) or made.dtype != torch.float64, function
        return result


def test_copies_and_pickles_hold_no_tensor_of_a_device() -> None:
    embedding = XPosEmbedding(10)
    embedding(*torch.randn(2, 1, 5, 3, 10), torch.arange(5), torch.arange(5))
    for other in (copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))):
        assert not any(isinstance(value, torch.Tensor) for value in vars(other).values())
        assert other.table(torch.arange(5), torch.float32).isfinite().all()


@pytest.mark.parametrize(
    ("positions", "error", "says"),
    [
        (
            torch.zeros(2, 3, 1, dtype=torch.int64),
            ValueError,
            r"shape \(N,\) or \(B, N\). Got \(2, 3, 1\)",
        ),
        (torch.zeros(3, dtype=torch.int32), TypeError, "int64. Got torch.int32"),
    ],
)
def test_other_positions_are_named(
    positions: torch.Tensor, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=f"positions must (be|have) {says}"):
        RotaryEmbedding(8).table(positions, torch.float32)


@pytest.mark.parametrize("make", [RotaryEmbedding, XPosEmbedding])
def test_each_row_may_have_positions_of_its_own(make: type[RotaryEmbedding]) -> None:
    embedding = make(10)
    query, key = torch.randn(3, 7, 5, 10), torch.randn(3, 7, 2, 10)
    positions = torch.randint(1000, (3, 7))
    found = embedding(query, key, positions, positions)
    for b in range(3):
        alone = embedding(query[b : b + 1], key[b : b + 1], positions[b], positions[b])
        for one, row in zip(alone, found, strict=True):
            torch.testing.assert_close(row[b : b + 1], one)
