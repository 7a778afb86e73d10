"""Strided views of the rows and heads that a task touches; nothing large is copied."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from dilated_core._runs import Runs

# Bounds the temporaries of one call, so that they stay in cache until they are merged.
_CALL_ELEMENTS = 1 << 20


def row_view(
    x: Tensor, runs: Runs, head_start: int, head_step: int, heads: int, head_group_step: int = 0
) -> Tensor:
    """(B, N, H, D) to the view (B, groups, heads, rows, D) of a task's runs and heads."""
    batch, row, head, unit = x.stride()
    return x.as_strided(
        (x.shape[0], runs.groups, heads, runs.count, x.shape[3]),
        (
            batch,
            runs.group_step * row + head_group_step * head,
            head_step * head,
            runs.step * row,
            unit,
        ),
        x.storage_offset() + runs.start * row + head_start * head,
    )


def mask_view(mask: Tensor, runs: Runs) -> Tensor:
    """(B, N) to the view (B, groups, rows)."""
    return row_view(mask[:, :, None, None], runs, 0, 0, 1)[:, :, 0, :, 0]


def calls(
    views: Sequence[Tensor], small: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Views (B, groups, heads, rows, ...) as few pieces (batch, heads, rows, ...) of bounded size.

    Batch and groups become one dimension where strides allow it; otherwise the shorter is looped.
    `small` tensors (B, groups, ...) are cut alike and may be copied.
    """
    for piece in _merge_leading([*views, *small], len(views)):
        _, heads, rows, head_dim = piece[0].shape
        size = max(1, _CALL_ELEMENTS // max(1, heads * rows * head_dim))
        for start in range(0, piece[0].shape[0], size):
            cut = [view[start : start + size] for view in piece]
            yield cut[: len(views)], cut[len(views) :]


def _merge_leading(views: list[Tensor], strict: int) -> Iterator[list[Tensor]]:
    batch, groups = views[0].shape[:2]
    if batch == 1:
        yield [view[0] for view in views]
    elif groups == 1:
        yield [view[:, 0] for view in views]
    elif all(view.stride(0) == groups * view.stride(1) for view in views[:strict]):
        yield [view.flatten(0, 1) for view in views]
    elif groups <= batch:
        for g in range(groups):
            yield [view[:, g] for view in views]
    else:
        for b in range(batch):
            yield [view[b] for view in views]
