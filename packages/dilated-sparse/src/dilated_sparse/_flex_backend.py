"""The `flex` backend: torch's FlexAttention, compiled, over a layout as a BlockMask.

On CUDA with gradients; on the CPU, where FlexAttention has no backward, forward only.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dilated_core.extending import remembered
from dilated_sparse import _masks
from dilated_sparse._block_mask import from_layout
from dilated_sparse._blocks import Layout
from dilated_sparse._call import BlockCall
from dilated_sparse._grid import FULL

# FlexAttention's kernels need it on CUDA, and its tables have an entry for each pair of blocks.
_CUDA_BLOCK, _LEAST_HEAD_DIM, _MOST_ENTRIES = 128, 16, 1 << 24
# Reads of mask bits would be kept in shared memory for each stage of its pipeline, and not fit.
_ONE_STAGE = {"num_stages": 1}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported(
    query: Tensor,
    layout: Layout,
    *,
    dropout_p: float,
    has_padding: bool,
    return_lse: bool,
    needs_gradients: bool,
) -> str | None:
    """Why FlexAttention cannot serve a call; None if it can."""
    if dropout_p > 0:
        return "FlexAttention has no dropout"
    if query.dtype not in _DTYPES:
        return f"it computes in float16, bfloat16 and float32, these are {query.dtype}"
    if torch.compiler.is_compiling():
        return "it is compiled by itself, not inside another torch.compile"
    if 0 in query.shape or 0 in (layout.length, layout.key_length):
        return "it needs tensors with elements"
    entries = layout.heads * layout.grid.rows * layout.grid.columns
    if entries > _MOST_ENTRIES:
        return f"its tables would have {entries} entries each, more than {_MOST_ENTRIES}"
    if query.device.type == "cuda":
        return _unsupported_on_cuda(query.shape[-1], layout.block_size)
    if query.device.type != "cpu":
        return f"it needs CUDA or CPU tensors, these are on {query.device.type}"
    for missing, is_needed in (
        ("gradients", needs_gradients),
        ("return_lse", return_lse),
        ("key_padding_mask", has_padding),
    ):
        if is_needed:
            return f"on the CPU it does not serve {missing}"
    return None


def _unsupported_on_cuda(head_dim: int, block_size: int) -> str | None:
    if block_size % _CUDA_BLOCK:
        return f"its block sizes are multiples of {_CUDA_BLOCK}, this is {block_size}"
    if head_dim < _LEAST_HEAD_DIM:
        return f"its head_dim is at least {_LEAST_HEAD_DIM}, this is {head_dim}"
    return None


def attend(
    call: BlockCall, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Out (B, N, H, D) and, on CUDA, lse (B, H, N).

    Raises:
        RuntimeError: torch's limit of recompilations is reached; dense attention would follow.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    block_mask = _block_mask(call.layout, call.scores.is_causal, query.device)
    on_cuda = query.device.type == "cuda"
    try:
        result = _compiled()(
            q, k, v, score_mod=_score_mod(call.scores.key_padding_mask), block_mask=block_mask,
            scale=call.scores.scale, enable_gqa=q.shape[1] != k.shape[1], return_lse=on_cuda,
            kernel_options=_ONE_STAGE if on_cuda else None,
        )  # fmt: skip
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise RuntimeError(
            "backend='flex' must compile once for each layout, and torch's limit of "
            f"recompilations is reached ({torch._dynamo.config.recompile_limit}). Another backend "
            "needs no compilation; torch._dynamo.config.recompile_limit sets the limit."
        ) from error
    # What FlexAttention gives for a row that sees nothing depends on the device and the version.
    if on_cuda:
        out, lse = result
        return out.masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0).transpose(1, 2), lse
    blind = ~_seeing(call.layout, call.scores.is_causal)
    return result.masked_fill(blind.unsqueeze(-1), 0.0).transpose(1, 2), None


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # With fullgraph, too many recompilations are an error and not dense attention.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


@remembered(16)
@torch.inference_mode(False)  # the next call may train
def _block_mask(layout: Layout, is_causal: bool, device: torch.device) -> Any:
    """The BlockMask of a layout, the same object each time: another one would recompile."""
    return from_layout((layout.causal() if is_causal else layout).to(device))


def _score_mod(padding: Tensor | None) -> Callable[..., Tensor] | None:
    """A function that hides padded keys, also in full blocks, where a mask_mod is not asked."""
    if padding is None:
        return None

    def score_mod(score: Tensor, batch: Tensor, _head: Tensor, _row: Tensor, key: Tensor) -> Tensor:
        return torch.where(padding[batch, key], -torch.inf, score)

    return score_mod


@remembered(16)
def _seeing(layout: Layout, is_causal: bool) -> Tensor:
    """(1 or H, N) bool: the queries that see a key."""
    layout = layout.causal() if is_causal else layout
    runs, b = layout.runs, layout.block_size
    # One entry more at the end, for full blocks.
    some = torch.nn.functional.pad(_masks.unpack(layout.table).any(-1), (0, 0, 0, 1), value=True)
    assert FULL == -1
    count = torch.zeros(layout.heads * layout.grid.rows, b, dtype=torch.int32, device=layout.device)
    count.index_add_(0, runs.row, some[runs.mask].to(torch.int32))
    return (count > 0).reshape(layout.heads, -1)[:, : layout.length]
