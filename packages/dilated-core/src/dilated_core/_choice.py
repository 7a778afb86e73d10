"""Which backend serves a call, and why: a pure function of the request."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from dilated_core import triton_kernels

Backend = Literal["reference", "torch", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


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


def select_backend(query: Tensor, key: Tensor, backend: str | None = None) -> BackendChoice:
    """Pick the backend of a call by device, dtype and sizes of its tensors; values do not matter.

    Args:
        query: (B, N, H, D).
        key: (B, M, H_kv, D).
        backend: the name of one to force it.

    Raises:
        ValueError: `backend` names none, or one that cannot serve the call.
    """
    obstacle = triton_kernels.unsupported(query, key)
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(
                f"backend must be None or one of {', '.join(map(repr, BACKENDS))}. Got {backend!r}."
            )
        if backend == "triton" and obstacle is not None:
            raise ValueError(
                f"backend must be able to serve the call. Got 'triton', but {obstacle}."
            )
        others = tuple((b, f"backend={backend!r} was given") for b in BACKENDS if b != backend)
        return BackendChoice(backend, "it was given", others)
    oracle: tuple[Backend, str] = (
        "reference",
        "it is the slow oracle: it runs only when asked for",
    )
    if obstacle is None:
        reason = "one pass over the runs of all branches is the fastest on CUDA"
        return BackendChoice(
            "triton", reason, (oracle, ("torch", "triton serves the call, faster"))
        )
    reason = "torch's fused attention on strided views serves every device and dtype"
    return BackendChoice("torch", reason, (oracle, ("triton", obstacle)))
