"""The torch backend as two custom operators, so that torch.compile sees one node each."""

from typing import Any

import torch
from torch import Tensor

from dilated_core.extending import Partial
from dilated_sparse import _torch_backend
from dilated_sparse._layout import BlockLayout
from dilated_sparse._options import Options


@torch.library.custom_op("dilated_sparse::torch_forward", mutates_args=())
def forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    row_offsets: Tensor,
    columns: Tensor,
    masks: Tensor,
    table: Tensor,
    block_size: int,
    layout_heads: int,
    digest: str,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Out (B, N, H, D) in query's dtype and lse (B, H, N)."""
    layout = BlockLayout(
        query.shape[1], key.shape[1], block_size, layout_heads,
        row_offsets, columns, masks, table, digest,
    )  # fmt: skip
    options = Options(layout, is_causal, scale, key_padding_mask, dropout_p, seed)
    # The products run in the dtype to accumulate in, whatever the caller's autocast says.
    with torch.autocast(query.device.type, enabled=False):
        out, lse = _torch_backend.forward(options, query, key, value)
    return out, lse


@torch.library.custom_op("dilated_sparse::torch_backward", mutates_args=())
def backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    row_offsets: Tensor,
    columns: Tensor,
    masks: Tensor,
    table: Tensor,
    block_size: int,
    layout_heads: int,
    digest: str,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to query, key and value."""
    layout = BlockLayout(
        query.shape[1], key.shape[1], block_size, layout_heads,
        row_offsets, columns, masks, table, digest,
    )  # fmt: skip
    options = Options(layout, is_causal, scale, key_padding_mask, dropout_p, seed)
    total = Partial(out, lse)
    with torch.autocast(query.device.type, enabled=False):
        return _torch_backend.backward(options, grad_out, grad_lse, query, key, value, total)


def attend(options: Options, query: Tensor, key: Tensor, value: Tensor) -> Partial:
    """Block-sparse attention with exact gradients."""
    layout = options.layout
    out, lse = forward_op(
        query, key, value, options.key_padding_mask, options.seed,
        layout.row_offsets, layout.columns, layout.masks, layout.table,
        layout.block_size, layout.heads, layout.digest,
        options.is_causal, options.scale, options.dropout_p,
    )  # fmt: skip
    return Partial(out, lse)


@forward_op.register_fake
def _(query: Tensor, *_args: Any) -> tuple[Tensor, Tensor]:
    return _empty(query), _torch_backend.empty_lse(query)


@backward_op.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    *_args: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty(query), _empty(key), _empty(value)


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *rest = inputs
    ctx.save_for_backward(query, key, value, *output, *rest[:6])
    ctx.rest = rest[6:]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, *saved = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(query)
    grads = backward_op(grad_out, grad_lse, query, *saved, *ctx.rest)
    return (*grads, *(None for _ in range(6)), *(None for _ in ctx.rest))


forward_op.register_autograd(_gradients, setup_context=_save)
