"""Which backend serves a call, and why: a pure function of the request."""

from dataclasses import dataclass
from typing import Literal, get_args

Backend = Literal["reference", "torch"]
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
    rejected: tuple[tuple[str, str], ...]


def select_backend(forced: str | None = None) -> BackendChoice:
    """Pick the backend of a call.

    Raises:
        ValueError: `forced` names no backend.
    """
    if forced is not None:
        if forced not in BACKENDS:
            raise ValueError(
                f"backend must be None or one of {', '.join(map(repr, BACKENDS))}. Got {forced!r}."
            )
        others = tuple((b, f"backend={forced!r} was given") for b in BACKENDS if b != forced)
        return BackendChoice(forced, "it was given", others)
    return BackendChoice(
        "torch",
        "tiles of dense products serve every device and dtype, with O(N) memory",
        (("reference", "it is the slow oracle: it runs only when asked for"),),
    )
