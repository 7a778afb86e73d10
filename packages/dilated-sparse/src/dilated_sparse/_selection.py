"""Which backend serves a call, and why: a pure function of the request."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from dilated_core.extending import triton_unsupported
from dilated_sparse import _flex_backend
from dilated_sparse._layout import BlockLayout

Backend = Literal["reference", "torch", "flex", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
# In the order of preference.
_REASONS: dict[Backend, str] = {
    "triton": "one pass over the runs of blocks, for any layout and without recompiling",
    "flex": "FlexAttention serves the call on CUDA, without a copy of keys",
    "torch": "tiles of dense products serve every device and dtype, with O(N) memory",
}


@dataclass(frozen=True)
class BackendChoice:
    """The backend that serves a call.

    Attributes:
        backend: its name.
        reason: why it was picked.
        rejected: for every other backend, why it was not.
    """

    backend: Backend
    reason: str
    rejected: tuple[tuple[Backend, str], ...]


def select_backend(
    query: Tensor,
    key: Tensor,
    backend: str | None = None,
    *,
    layout: BlockLayout | None = None,
    dropout_p: float = 0.0,
    has_padding: bool = False,
    return_lse: bool = False,
    needs_gradients: bool = False,
) -> BackendChoice:
    """Pick the backend of a call by its request and the device, dtype and sizes of its tensors.

    Args:
        query: (B, N, H, D); values do not matter.
        key: (B, M, H_kv, D).
        backend: the name of one to force it.
        layout: the layout of the call; without one, flex is left out.
        dropout_p: as in the call.
        has_padding: whether the call has a key_padding_mask.
        return_lse: as in the call.
        needs_gradients: whether a backward may follow.

    Raises:
        ValueError: `backend` names none, or one that cannot serve the call.
    """
    obstacles: dict[Backend, str | None] = {
        "triton": triton_unsupported(query, key),
        "flex": _flex_backend.unsupported(
            query, layout, dropout_p=dropout_p, has_padding=has_padding, return_lse=return_lse,
            needs_gradients=needs_gradients,
        ),
    }  # fmt: skip
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(
                f"backend must be None or one of {', '.join(map(repr, BACKENDS))}. Got {backend!r}."
            )
        if (obstacle := obstacles.get(backend)) is not None:
            raise ValueError(
                f"backend must be able to serve the call. Got {backend!r}, but {obstacle}."
            )
        others = tuple((b, f"backend={backend!r} was given") for b in BACKENDS if b != backend)
        return BackendChoice(backend, "it was given", others)
    if query.device.type == "cpu" and obstacles["flex"] is None:
        obstacles["flex"] = "on the CPU it must be asked for: it compiles for each layout"
    served = [b for b in _REASONS if obstacles.get(b) is None]
    rejected: list[tuple[Backend, str]] = [
        ("reference", "it is the slow oracle: it runs only when asked for")
    ]
    rejected += [(b, why) for b, why in obstacles.items() if why is not None]
    rejected += [(b, f"{served[0]} serves the call and comes first") for b in served[1:]]
    return BackendChoice(served[0], _REASONS[served[0]], tuple(rejected))
