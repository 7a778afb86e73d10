"""The base of modules of attention between heads."""

from typing import Any

from torch import Tensor, nn

from dilated_core import _checks
from dilated_core._choice import check_name
from dilated_core.interfaces import DecodingState


class HeadAttention(nn.Module):
    """What modules of attention between heads have in common: options, checked when made.

    Args:
        scale: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability of dropping an attention weight while training.
        backend: one of `backends` to force it; None picks.
        backends: the names of all.

    Raises:
        TypeError: dropout or scale is no number.
        ValueError: dropout is not in [0, 1), scale is not finite, or backend names none.
    """

    # The arguments that a repr shows, and the values at which it does not.
    _shown: tuple[tuple[str, Any], ...] = (("scale", None), ("dropout", 0.0), ("backend", None))

    def __init__(
        self, *, scale: float | None, dropout: float, backend: str | None = None,
        backends: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        check_name("backend", backend, backends)
        self.scale = _checks.scale(scale)
        self.dropout = _checks.fraction("dropout", dropout)
        self.backend = backend

    def options(self, query: Tensor, key: Tensor) -> dict[str, Any]:
        """The options of a call: scale, dropout_p, and enable_gqa where there are fewer key heads.

        Args:
            query: (B, N, H, D).
            key: (B, M, H_kv, D).
        """
        # Sizes are tensors where torch.jit traces.
        grouped = query.ndim == 4 and key.ndim == 4 and bool(query.shape[2] != key.shape[2])
        dropout_p = self.dropout if self.training else 0.0
        return {"scale": self.scale, "dropout_p": dropout_p, "enable_gqa": grouped}

    @property
    def keeps_state(self) -> bool:
        """Whether `new_cache` can make decoding state."""
        return False

    def new_cache(self, length: int | None = None) -> DecodingState:
        """Empty decoding state, for at most `length` positions where it must be told.

        Raises:
            ValueError: there is none for this attention.
        """
        raise ValueError(f"attention must keep decoding state. Got {type(self).__name__}.")

    def check_cache(self, cache: object) -> None:
        """Raise unless decoding state is one for this attention.

        Raises:
            TypeError: it is of another type.
            ValueError: it attends by something else, or there is none for this attention.
        """
        raise ValueError(
            "cache must be None with an injected attention that keeps no state. "
            f"Got a cache with {type(self).__name__}."
        )

    def shown(self) -> str:
        """What it attends by, first in its repr."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What it attends by, and the arguments that differ from their defaults."""
        parts = [self.shown()]
        for name, default in self._shown:
            if (value := getattr(self, name)) != default:
                parts.append(f"{name}={value!r}")
        return ", ".join(parts)
