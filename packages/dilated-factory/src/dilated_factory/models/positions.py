"""Rotary and xPos position embeddings, by tables of cosines and sines in float32 or wider."""

# Shapes: B batch, N queries, M keys, H heads, D head_dim.

import math
from decimal import Decimal, localcontext
from typing import Any

import torch
from torch import Tensor, nn

from dilated_core.extending import remembered

# The row of the first position in fairseq's tables; those before it are of padding.
FIRST_ROW = 2

_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")


class RotaryEmbedding(nn.Module):
    """Rotary positions (Su et al., arXiv 2104.09864, eq. 34).

    The pair of features (2i, 2i + 1) at position n is turned by the angle n * base ** (-2i / D),
    so a query-key product depends on positions only through their difference. Angles are reduced
    to an eighth of a turn in integers, exact to n * 2 ** -65 turns on any device; the turning
    itself is float32, or float64 for float64 input. There are no parameters and no buffers.
    """

    _constants: Tensor | None = None  # on the device of the last call

    def __init__(self, head_dim: int, *, base: float = 10000.0) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be even and positive. Got {head_dim}.")
        self.head_dim = head_dim
        self.base = base

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.head_dim}, base={self.base}"

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call] # torch's
        state.pop("_constants", None)
        return state

    def table(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """What `forward` needs of int64 positions, to be made once for all layers of a model.

        Args:
            positions: (N,) int64, or (B, N).
            dtype: of the features to be turned.

        Returns:
            Cosine and sine of each pair (..., N, 1 or 2, D / 2, 2) in dtype, or in float32 if that
            is wider; the second of two is for keys.

        Raises:
            ValueError, TypeError: ``positions`` is neither (N,) nor (B, N), or not int64.
        """
        if positions.ndim not in (1, 2):
            raise ValueError(
                f"positions must have shape (N,) or (B, N). Got {tuple(positions.shape)}."
            )
        if positions.dtype != torch.int64:
            raise TypeError(f"positions must be int64. Got {positions.dtype}.")
        dtype = torch.promote_types(dtype, torch.float32)
        columns = torch.stack(self._columns(positions.unsqueeze(-1), dtype), dim=-2)
        pairs: Tensor = columns.unflatten(-2, (-1, 2))
        return pairs.transpose(-1, -2).contiguous()

    def forward(
        self, query: Tensor, key: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Turn queries (B, N, H, D) and keys (B, M, H, D).

        Positions are int64 (N,) and (M,), or (B, N) and (B, M), or what `table` made of them.
        """
        of_queries, of_keys = (
            positions if positions.is_floating_point() else self.table(positions, query.dtype)
            for positions in (query_positions, key_positions)
        )
        return _turn(query, of_queries[..., 0, :, :]), _turn(key, of_keys[..., -1, :, :])

    def turns(self, device: torch.device) -> Tensor:
        """(D / 2,) int64, turns of each pair from a position to the next, by 2 ** -64 of a turn."""
        return self._on(device)[0]

    def _columns(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Columns of a table (..., N, D / 2) for positions (..., N, 1)."""
        return _cosine_and_sine(positions * self.turns(positions.device), dtype)

    def _fixed_point(self) -> tuple[tuple[int, ...], ...]:
        integers: tuple[tuple[int, ...], ...] = _integers(self.head_dim, self.base)
        return integers

    def _on(self, device: torch.device) -> Tensor:
        """Constants of the pairs, int64 (kinds, D / 2); kept, to be sent to a device once."""
        constants = self._constants
        if torch.compiler.is_compiling() or constants is None or constants.device != device:
            constants = torch.tensor(self._fixed_point(), device=device)
            if not torch.compiler.is_compiling():
                self._constants = constants
        return constants


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

    def _columns(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        turns, decays = self._on(positions.device)
        cosine, sine = _cosine_and_sine(positions * turns, dtype)
        # Beyond this even float64 is out of range, and the integers would be soon.
        reach = 1100 * self.scale_base
        powers = (positions - self.centre).clamp(-reach, reach) * decays
        whole, part = powers >> 52, powers & (2**52 - 1)
        factor = torch.exp2(whole.to(dtype)) * torch.exp2(part.to(dtype) * 2.0**-52)
        return factor * cosine, factor * sine, cosine / factor, sine / factor

    def _fixed_point(self) -> tuple[tuple[int, ...], ...]:
        pair: tuple[tuple[int, ...], ...] = _integers(self.head_dim, self.base, self.scale_base)
        return pair


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """fairseq's sines, then cosines, of integer positions (N,), float32 (N, width).

    Its frequencies fall from 1 to 1 / 10000 inclusive, and its first position is 2; as there, all
    is computed in float32.
    """
    half = width // 2
    rates = torch.exp(
        torch.arange(half, device=positions.device) * -(math.log(10000.0) / max(half - 1, 1))
    )
    angles = (positions + FIRST_ROW).float().unsqueeze(-1) * rates
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def xpos_bases(head_dim: int) -> Tensor:
    """zeta_i = (2i / D + 0.4) / 1.4 of each pair of features, float64 (D / 2,)."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64)
    return (pairs / head_dim + 0.4) / 1.4


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # torch's
def _integers(
    head_dim: int, base: float, scale_base: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Turns and, if any, decays of each pair: constants of a compiled graph."""
    turns = _turns(head_dim, base)
    return (turns,) if scale_base is None else (turns, _decays(head_dim, scale_base))


@remembered(64)
def _turns(head_dim: int, base: float) -> tuple[int, ...]:
    """Turns of each pair from a position to the next, in units of 2 ** -64."""
    with localcontext(prec=50):
        return tuple(
            round(Decimal(base) ** (Decimal(-pair) / head_dim) * 2**63 / _PI)
            for pair in range(0, head_dim, 2)
        )


@remembered(64)
def _decays(head_dim: int, scale_base: int) -> tuple[int, ...]:
    """Binary logarithms of zeta_i ** (1 / scale_base), in units of 2 ** -52."""
    with localcontext(prec=50):
        return tuple(
            round(
                ((Decimal(pair) / head_dim + Decimal("0.4")) / Decimal("1.4")).ln()
                / (Decimal(2).ln() * scale_base)
                * 2**52
            )
            for pair in range(0, head_dim, 2)
        )


def _cosine_and_sine(turns: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of angles in units of 2 ** -64 turns; whole turns overflow and are gone."""
    quarters = (turns + 2**61) >> 62
    rest = (turns - (quarters << 62)).to(dtype) * (math.pi * 2.0**-63)  # an eighth, either way
    cosine, sine, odd = rest.cos(), rest.sin(), (quarters & 1).bool()
    return (
        torch.where(odd, sine, cosine) * (1 - ((quarters + 1) & 2)),
        torch.where(odd, cosine, sine) * (1 - (quarters & 2)),
    )


def _turn(features: Tensor, table: Tensor) -> Tensor:
    """Turn the feature pairs of (B, N, H, D) by cosines and sines ([B,] N, D / 2, 2)."""
    wide = features.to(torch.promote_types(features.dtype, table.dtype))
    pairs: Tensor = wide.unflatten(-1, (-1, 2))
    factors = table.unsqueeze(-3)
    if torch.compiler.is_compiling():
        # By flips, since a compiler fuses no halves that are put together.
        signs = torch.arange(-1, 2, 2, device=table.device)
        turned = pairs * factors[..., :1] + pairs.flip(-1) * (factors[..., 1:] * signs)
    elif not features.numel():
        turned = pairs  # complex numbers need a last stride of 1, which no rows may not have
    else:
        # One pass over memory, where nothing fuses the many of the line above.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(factors))
    return turned.flatten(-2).to(features.dtype)
