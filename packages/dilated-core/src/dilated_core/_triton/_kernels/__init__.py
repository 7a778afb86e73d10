"""The kernels: one pass over the runs of a tile, forward, to queries and to keys and values.

They know tiles and runs (see `_plan`) and no pattern. Scores are in units of log2: with scale' =
|scale| * log2(e) and a run's log2 weight b, a key counts exp2(scale' * (q . k) + b). A
NEGATIVE scale moves its sign into the rows, which are loaded once.

With ALIKE both tensors that a kernel walks have the same row stride, so offsets are shared. Each
kernel walks its full runs, then, unless MASK is 0, its masked runs: 1 says that only column
counts and causal order can hide a key, 2 that segments and row residues can as well, 3 that bits
can.

A head_dim that is no power of two may be held as a block of BLOCK_D and a narrower one of TAIL
dims (48 = 32 + 16), so that fewer are padded: the names *_tail, which exist only if TAIL is not 0.

Shapes of tiles are comments: ROWS are those of a tile, COLUMNS of a step of a run.

B batch, N queries, M keys, H query heads, D head_dim.
"""

from dilated_core._triton._kernels.decode import decode_kernel, merge_kernel
from dilated_core._triton._kernels.forward import forward_kernel
from dilated_core._triton._kernels.key_gradients import key_gradient_kernel
from dilated_core._triton._kernels.query_gradient import query_gradient_kernel

__all__ = [
    "decode_kernel",
    "forward_kernel",
    "key_gradient_kernel",
    "merge_kernel",
    "query_gradient_kernel",
]
