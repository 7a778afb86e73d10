"""Backends of block-sparse attention as custom operators.

Shapes: query (B, N, H, D), key and value (B, M, H_kv, D), lse (B, H, N).
"""

from typing import Any

from torch import Tensor

from dilated_core.extending import OperatorForm, Scores, define_operators
from dilated_sparse import _torch_backend, _triton_backend
from dilated_sparse._blocks import Layout
from dilated_sparse._call import BlockCall


def _tensors(call: BlockCall) -> tuple[Tensor | None, ...]:
    layout, scores, _ = call
    return (
        scores.key_padding_mask, scores.seed, layout.run_offsets, layout.run_columns,
        layout.run_counts, layout.run_masks, layout.table,
    )  # fmt: skip


def _values(call: BlockCall) -> tuple[Any, ...]:
    layout, scores, _ = call
    return layout.block_size, layout.heads, scores.is_causal, scores.scale, scores.dropout_p


def _unpack(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    run_offsets: Tensor,
    run_columns: Tensor,
    run_counts: Tensor,
    run_masks: Tensor,
    table: Tensor,
    block_size: int,
    layout_heads: int,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> BlockCall:
    layout = Layout(
        query.shape[1], key.shape[1], block_size, layout_heads,
        run_offsets, run_columns, run_counts, run_masks, table,
    )  # fmt: skip
    return BlockCall(layout, Scores(is_causal, scale, key_padding_mask, dropout_p, seed))


_FORM = OperatorForm(
    "Tensor? key_padding_mask, Tensor? seed, Tensor run_offsets, Tensor run_columns, "
    "Tensor run_counts, Tensor run_masks, Tensor table, int block_size, int layout_heads, "
    "bool is_causal, float scale, float dropout_p",
    _tensors,
    _values,
    _unpack,
)
TORCH = define_operators(
    "dilated_sparse::torch", _FORM, _torch_backend.forward, _torch_backend.backward,
    _torch_backend.empty_lse,
)  # fmt: skip
TRITON = define_operators(
    "dilated_sparse::triton", _FORM, _triton_backend.forward, _triton_backend.backward,
    _torch_backend.empty_lse,
)  # fmt: skip
