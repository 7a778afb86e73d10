"""Memory and time: nothing of size N x N, layouts of a million positions in O(nnz)."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dilated_core import DilatedPattern
from dilated_sparse import block_sparse_attention, layouts, select

LENGTH, HEADS, HEAD_DIM = 8192, 2, 16
ROWS = LENGTH * HEADS * HEAD_DIM * 4


class Largest(TorchDispatchMode):
    """The largest storage that any operator makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_allocates_nothing_of_the_square_of_the_length(is_causal):
    tensors = [torch.randn(1, LENGTH, HEADS, HEAD_DIM, requires_grad=True) for _ in "qkv"]
    layout = layouts.longformer(LENGTH, 128, 64, block_size=64)
    with Largest() as largest:
        out = block_sparse_attention(*tensors, layout, is_causal=is_causal)
        torch.autograd.grad(out.sum(), tensors)
    # One head's scores of all pairs would be 256 MiB, a tile's are at most 4 MiB.
    assert largest.bytes <= max(ROWS, 4 << 20)


def test_selection_allocates_nothing_of_the_square_of_the_length():
    query, key = (torch.randn(1, LENGTH, HEADS, HEAD_DIM) for _ in "qk")
    with Largest() as largest:
        select.top_k_blocks(query, key, 4, is_causal=True)
        select.threshold_blocks(query, key, 0.5, is_causal=True)
    assert largest.bytes <= LENGTH * LENGTH // 4


MILLION = 1 << 20
LAYOUTS = {
    "sliding_window": lambda: layouts.sliding_window(MILLION, 512),
    "bigbird": lambda: layouts.bigbird(MILLION, block_size=128),
    "longformer": lambda: layouts.longformer(MILLION, 512, 64),
    "document": lambda: layouts.document([1000] * 1048 + [576]),
    "longnet": lambda: layouts.longnet(
        MILLION, DilatedPattern([2048 * 4**k for k in range(4)], [4**k for k in range(4)])
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_million_positions_take_memory_by_visible_blocks(name):
    with Largest() as largest:
        layout = LAYOUTS[name]()
    assert layout.length == MILLION
    table = layout.table.nbytes
    assert layout.nbytes - table <= 16 * (layout.nnz + layout.grid.rows + 1)
    assert largest.bytes <= 256 << 20
