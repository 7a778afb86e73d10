"""Block-sparse attention of a layout's facts: check once, pick a backend, compute."""

from collections.abc import Callable
from typing import Literal, Unpack, get_args

import torch
from torch import Tensor

from dilated_core.extending import Partial, Scores, autocast, check_call, pick, triton_unsupported
from dilated_core.interfaces import AttendOptions
from dilated_sparse import _flex_backend, _operators, _reference
from dilated_sparse._blocks import Layout
from dilated_sparse._call import BlockCall

Backend = Literal["reference", "torch", "flex", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
# In the order of preference.
REASONS = {
    "triton": "one pass over the runs of blocks, for any layout and without recompiling",
    "flex": "FlexAttention serves the call on CUDA, without a copy of keys",
    "torch": "tiles of dense products serve every device and dtype, with O(N) memory",
}
UNASKED = {"reference": "it is the slow oracle: it runs only when asked for"}
# Flex has no lse where `obstacles` refuses return_lse.
_Attend = Callable[[BlockCall, Tensor, Tensor, Tensor], Partial | tuple[Tensor, Tensor | None]]
_ATTEND: dict[str, _Attend] = {
    "reference": _reference.attend,
    "torch": _operators.TORCH.attend,
    "flex": _flex_backend.attend,
    "triton": _operators.TRITON.attend,
}


def obstacles(
    query: Tensor,
    key: Tensor,
    backend: Backend | None,
    layout: Layout,
    *,
    dropout_p: float,
    has_padding: bool,
    return_lse: bool,
    needs_gradients: bool,
) -> dict[str, str | None]:
    """Why the backends that cannot serve a call cannot, as `select_backend` takes it."""
    flex = _flex_backend.unsupported(
        query, layout.rows[0], dropout_p=dropout_p, has_padding=has_padding, return_lse=return_lse,
        needs_gradients=needs_gradients,
    )  # fmt: skip
    if flex is None and backend is None and query.device.type == "cpu":
        flex = "on the CPU it must be asked for: it compiles for each layout"
    return {"triton": triton_unsupported(query, key), "flex": flex}


def attend(
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    backend: Backend | None = None,
    **options: Unpack[AttendOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """`block_sparse_attention`."""
    scores = check_call(query, key, value, **options).seeded(query.device)
    return_lse = options.get("return_lse", False)
    if (layout.length, layout.key_length) != (query.shape[1], key.shape[1]):
        raise ValueError(
            f"layout must have the query and key lengths {(query.shape[1], key.shape[1])}. "
            f"Got {(layout.length, layout.key_length)}. `layout.at` gives it at other lengths; "
            "query, key and value are (batch, length, heads, head_dim)."
        )
    # Not `in`: torch.compile does not find a size that it keeps free in a tuple.
    if layout.row_heads != 1 and layout.row_heads != query.shape[2]:
        raise ValueError(
            f"layout must have 1 head or query's {query.shape[2]}. Got {layout.row_heads}."
        )
    if layout.batch != 1 and layout.batch != query.shape[0]:
        raise ValueError(
            f"layout must have 1 batch row or query's {query.shape[0]}. Got {layout.batch}."
        )
    query, key, value = autocast(query, key, value)
    wanted = query.requires_grad or key.requires_grad or value.requires_grad
    why_not = obstacles(
        query, key, backend, layout, dropout_p=scores.dropout_p,
        has_padding=scores.key_padding_mask is not None, return_lse=return_lse,
        needs_gradients=wanted and torch.is_grad_enabled(),
    )  # fmt: skip
    name = pick("backend", backend, BACKENDS, REASONS, why_not)
    if layout.batch == 1:
        out, lse = _ATTEND[name](BlockCall(layout, scores), query, key, value)
    else:
        out, lse = _attend_rows(_ATTEND[name], layout, scores, query, key, value)
    if out.dtype != query.dtype:
        out = out.to(query.dtype)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _attend_rows(
    attend: _Attend, layout: Layout, scores: Scores, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Each batch row by its own layout; with dropout, each by a seed of its own."""
    parts, mask = [], scores.key_padding_mask
    for i, own in enumerate(layout.rows):
        row = slice(i, i + 1)
        how = scores._replace(key_padding_mask=None if mask is None else mask[row])
        if scores.seed is not None:
            how = how._replace(seed=scores.seed + i)
        parts.append(attend(BlockCall(own, how), query[row], key[row], value[row]))
    outs, sums = zip(*parts, strict=True)
    return torch.cat(outs), None if sums[0] is None else torch.cat(sums)
