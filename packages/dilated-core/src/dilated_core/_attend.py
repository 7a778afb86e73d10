"""Dilated attention of a pattern's facts: check once, pick a backend, compute."""

from collections.abc import Callable
from typing import Literal, Unpack, get_args

from torch import Tensor

from dilated_core import _choice, _reference, _triton
from dilated_core._branches import Branches
from dilated_core._call import DilatedCall, autocast, check_call
from dilated_core._choice import BackendChoice
from dilated_core._partial import Partial
from dilated_core._torch import engine
from dilated_core.interfaces import AttendOptions

Backend = Literal["reference", "torch", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
# In the order of preference.
_REASONS = {
    "triton": "one pass over the runs of all branches is the fastest on CUDA",
    "torch": "torch's fused attention on strided views serves every device and dtype",
}
_UNASKED = {"reference": "it is the slow oracle: it runs only when asked for"}
_ATTEND: dict[str, Callable[[DilatedCall, Tensor, Tensor, Tensor], Partial]] = {
    "reference": _reference.attend,
    "torch": engine.OPERATORS.attend,
    "triton": _triton.attend,
}


def select_backend(query: Tensor, key: Tensor, backend: Backend | None = None) -> BackendChoice:
    """Pick the backend of a call by device, dtype and sizes of its tensors; values do not matter.

    Shapes: batch B, query positions N, key positions M, heads H, key and value heads H_kv, width of
    a head D.

    Args:
        query: (B, N, H, D).
        key: (B, M, H_kv, D).
        backend: the name of one to force it.

    Raises:
        ValueError: `backend` names none, or one that cannot serve the call.

    Examples:
        >>> x = torch.zeros(1, 8, 2, 16)
        >>> print(select_backend(x, x).backend)
        torch
    """
    obstacles = {"triton": _triton.unsupported(query, key)}
    return _choice.choose(
        BackendChoice, "backend", backend, BACKENDS, _REASONS, obstacles, _UNASKED
    )


def attend(
    pattern: Branches,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    backend: Backend | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Unpack[AttendOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """`dilated_attention` or, with `cu_seqlens`, `dilated_attention_varlen`."""
    scores = check_call(query, key, value, cu_seqlens=cu_seqlens, **options).seeded(query.device)
    pattern.branch_heads(query.shape[-2])
    query, key, value = autocast(query, key, value)
    if cu_seqlens is not None:
        query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
    obstacles = {"triton": _triton.unsupported(query, key)}
    name = _choice.pick("backend", backend, BACKENDS, _REASONS, obstacles)
    out, lse = _ATTEND[name](DilatedCall(pattern, scores, cu_seqlens), query, key, value)
    if out.dtype != query.dtype:
        out = out.to(query.dtype)
    if cu_seqlens is not None:
        out, lse = out[0], lse[0]
    return (out, lse) if options.get("return_lse") else out
