"""What packages with patterns of their own build on: partials, dense attention of rows, dropout.

- `Partial`, `merge`, `merge_`, `add_zero_keys_`: attention over a part of the keys, and the only
  place where softmaxes are combined. `accumulate_dtype` is the dtype to combine them in.
- `Rows`, `attend_rows`, `attend_rows_backward`: dense attention of rows (b, h, n, D) to rows
  (b, h, m, D), by a kernel or fused by torch where that can be. The backward takes the *merged*
  partial, which makes it exact for one part of a larger softmax, so no partial is kept for it.
- `keep_mask`: the stateless dropout mask, keyed by seed, batch, head and the two positions.
- `check_tensors`, `check_padding_mask`, `autocast`: what every attention function does first with
  query, key, value (..., length, heads, head_dim) and a padding mask (B, M).
- `define_operators` with a `Form`: a forward and a backward as custom operators, for torch.compile.
- `drive`, `drive_backward`: the GPU kernels, for any `Schedule`, which makes `Plan`s: tables of
  tiles of rows and of the runs of columns that each walks. A `PlanCache` keeps them, and
  `triton_unsupported` says which calls the kernels cannot serve. None of them imports triton but
  the first two, when they are called.
"""

from dilated_core._custom_op import Form
from dilated_core._custom_op import define as define_operators
from dilated_core._dense import Rows
from dilated_core._dropout import keep_mask
from dilated_core._functional import _autocast as autocast
from dilated_core._fused import attend as attend_rows
from dilated_core._fused import attend_backward as attend_rows_backward
from dilated_core._inputs import check_padding_mask, check_tensors
from dilated_core._partial import Partial, accumulate_dtype, add_zero_keys_, merge, merge_
from dilated_core.triton_kernels import drive, drive_backward
from dilated_core.triton_kernels import unsupported as triton_unsupported
from dilated_core.triton_kernels._driving import Config, Pair, Pass, Schedule, Sizes
from dilated_core.triton_kernels._plan import SPARE_RUNS, Blocks, Plan, PlanCache

__all__ = [
    "SPARE_RUNS",
    "Blocks",
    "Config",
    "Form",
    "Pair",
    "Partial",
    "Pass",
    "Plan",
    "PlanCache",
    "Rows",
    "Schedule",
    "Sizes",
    "accumulate_dtype",
    "add_zero_keys_",
    "attend_rows",
    "attend_rows_backward",
    "autocast",
    "check_padding_mask",
    "check_tensors",
    "define_operators",
    "drive",
    "drive_backward",
    "keep_mask",
    "merge",
    "merge_",
    "triton_unsupported",
]
