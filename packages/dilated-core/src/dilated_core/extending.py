"""What packages with patterns of their own build on: partials, dense attention of rows, dropout.

- `Scores`, `check_call`, `autocast`: what a call does with its scores, checked, as every attention
  function does first with query, key, value (B, length, heads, head_dim) and a padding mask (B, M).
  `check_tensors` and `check_padding_mask` are parts of it; `check_lengths` is for decoding state.
- `Upstream`: what a backward starts from.
- `Choice`, `BackendChoice`, `choose`, `pick`: which way serves a call, and why.
- `HeadAttention`: the base of modules of attention between heads.
- `linear`: calls of linear layers, in float32 by the fastest library that torch has on a CPU.
- `Partial`, `merge`, `merge_`, `add_zero_keys_`: attention over a part of the keys, and the only
  place where softmaxes are combined. `accumulate_dtype` is the dtype to combine them in.
- `RowAttention`, `attend_rows`, `attend_rows_backward`: dense attention of rows (b, h, n, D) to
  rows (b, h, m, D), by a kernel or fused by torch where that can be. The backward takes the
  *merged* partial, which makes it exact for one part of a larger softmax, so no partial is kept
  for it.
- `keep_mask`: the stateless dropout mask, keyed by seed, batch, head and the two positions.
- `remembered`, `on_clear`: caches of functions, and others, that `clear_caches` empties.
- `let_gloo_rest`, `let_gloo_rest_at_exit`: for what uses gloo, whose threads can abort or hang a
  process that ends.
- `is_eager`: whether a call is to leave torch's dispatcher out; `has_tangents`: whether it may be
  one of forward-mode differentiation; `is_transformed`: whether it is one of torch.func's
  transforms. `uncompiled`: for functions that torch.compile is to call as they are.
- `define_operators` with an `OperatorForm`: a forward and a backward as custom operators, for
  torch.compile; an eager call goes to them as it is.
- `relaunched`, `on_device`: for kernels of your own, which triton's door would keep waiting.
- `drive`, `drive_backward`: the GPU kernels, for any `Tiling`, which makes `TilePlan`s: tables of
  tiles of rows and of the runs of columns that each walks. A `PlanCache` keeps them, and
  `triton_unsupported` says which calls the kernels cannot serve. None of them imports triton but
  the first two, when they are called.
"""

from dilated_core._caches import on_clear, remembered
from dilated_core._call import (
    Scores,
    Upstream,
    autocast,
    check_call,
    check_lengths,
    check_padding_mask,
    check_tensors,
)
from dilated_core._choice import BackendChoice, Choice, check_name, choose, pick
from dilated_core._dropout import keep_mask
from dilated_core._exit import let_gloo_rest, let_gloo_rest_at_exit
from dilated_core._head_attention import HeadAttention
from dilated_core._linear import linear
from dilated_core._operators import Gradients, OperatorForm
from dilated_core._operators import define as define_operators
from dilated_core._partial import Partial, accumulate_dtype, add_zero_keys_, merge, merge_
from dilated_core._row_attention import attend as attend_rows
from dilated_core._row_attention import attend_backward as attend_rows_backward
from dilated_core._torch.dense import RowAttention
from dilated_core._torch_internals import (
    has_hooks,
    has_tangents,
    is_eager,
    is_transformed,
    uncompiled,
)
from dilated_core._triton import drive, drive_backward, on_device, relaunched
from dilated_core._triton import unsupported as triton_unsupported
from dilated_core._triton._driving import Config, Pair, Pass, Sizes, Tiling
from dilated_core._triton._plan import SPARE_RUNS, BlockSizes, PlanCache, TilePlan

__all__ = [
    "SPARE_RUNS",
    "BackendChoice",
    "BlockSizes",
    "Choice",
    "Config",
    "Gradients",
    "HeadAttention",
    "OperatorForm",
    "Pair",
    "Partial",
    "Pass",
    "PlanCache",
    "RowAttention",
    "Scores",
    "Sizes",
    "TilePlan",
    "Tiling",
    "Upstream",
    "accumulate_dtype",
    "add_zero_keys_",
    "attend_rows",
    "attend_rows_backward",
    "autocast",
    "check_call",
    "check_lengths",
    "check_name",
    "check_padding_mask",
    "check_tensors",
    "choose",
    "define_operators",
    "drive",
    "drive_backward",
    "has_hooks",
    "has_tangents",
    "is_eager",
    "is_transformed",
    "keep_mask",
    "let_gloo_rest",
    "let_gloo_rest_at_exit",
    "linear",
    "merge",
    "merge_",
    "on_clear",
    "on_device",
    "pick",
    "relaunched",
    "remembered",
    "triton_unsupported",
    "uncompiled",
]
