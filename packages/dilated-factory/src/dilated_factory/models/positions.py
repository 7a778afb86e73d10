"""Rotary and xPos position embeddings, as complex multiplications in float32 or wider."""

# Shapes: B batch, N queries, M keys, H heads, D head_dim.

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Rotary positions (Su et al., arXiv 2104.09864, eq. 34).

    The pair of features (2i, 2i + 1) at position n is turned by the angle n * base ** (-2i / D),
    so a query-key product depends on positions only through their difference. Angles are computed
    in float64, because float32 is 0.06 radians off at a million; the turning itself is float32,
    or float64 for float64 input. There are no parameters and no buffers.
    """

    def __init__(self, head_dim: int, *, base: float = 10000.0) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be even and positive. Got {head_dim}.")
        self.head_dim = head_dim
        self.base = base

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.head_dim}, base={self.base}"

    def forward(
        self, query: Tensor, key: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Turn queries (B, N, H, D) and keys (B, M, H, D) at int64 positions (N,) and (M,)."""
        return (
            _turn(query, self._magnitudes(query_positions, 1), self._angles(query_positions)),
            _turn(key, self._magnitudes(key_positions, -1), self._angles(key_positions)),
        )

    def _angles(self, positions: Tensor) -> Tensor:
        pairs = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float64)
        return torch.outer(positions.to(torch.float64), self.base ** (-pairs / self.head_dim))

    def _magnitudes(self, positions: Tensor, sign: int) -> Tensor:
        return torch.ones((), dtype=torch.float64, device=positions.device)


class XPosEmbedding(RotaryEmbedding):
    """Rotary positions with a decay over distance (xPos, Sun et al., arXiv 2212.10554, eq. 9).

    On top of the turning, the pair i of a query at position n is scaled by
    zeta_i ** ((n - centre) / scale_base) and that of a key at position m by the inverse power,
    zeta_i = (2i / D + 0.4) / 1.4. The product holds zeta_i ** ((n - m) / scale_base): a decay of
    its own for each frequency. ``centre`` cancels in the product; it only keeps the two factors
    near one. Take the middle of the longest sequence: the factors of float32 stay in range while
    abs(n - centre) is under 50 * scale_base.
    """

    def __init__(
        self, head_dim: int, *, base: float = 10000.0, scale_base: int = 512, centre: int = 0
    ) -> None:
        super().__init__(head_dim, base=base)
        self.scale_base = scale_base
        self.centre = centre

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{super().extra_repr()}, scale_base={self.scale_base}, centre={self.centre}"

    def _magnitudes(self, positions: Tensor, sign: int) -> Tensor:
        zeta = xpos_bases(self.head_dim).to(positions.device)
        powers = (positions.to(torch.float64) - self.centre) * (sign / self.scale_base)
        return zeta ** powers.unsqueeze(-1)


def xpos_bases(head_dim: int) -> Tensor:
    """zeta_i = (2i / D + 0.4) / 1.4 of each pair of features, float64 (D / 2,)."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64)
    return (pairs / head_dim + 0.4) / 1.4


def _turn(features: Tensor, magnitudes: Tensor, angles: Tensor) -> Tensor:
    """Multiply the feature pairs of (B, N, H, D), read as complex numbers, by polar factors."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    factors = torch.polar(magnitudes.expand_as(angles).contiguous(), angles).unsqueeze(1)
    factors = factors.to(torch.complex128 if wide.dtype == torch.float64 else torch.complex64)
    pairs = torch.view_as_complex(wide.reshape(*wide.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * factors).flatten(-2).to(features.dtype)
