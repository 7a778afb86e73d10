"""The kernels as the custom operators of a backend."""

import torch
from torch import Tensor

from dilated_core._inputs import Options
from dilated_core._operators import define
from dilated_core._partial import Partial
from dilated_core.triton_kernels import _launch


def _forward(
    options: Options, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None
) -> Partial:
    # Kernels are launched on the current device, so make it the tensors' one.
    with torch.cuda.device_of(query):
        return _launch.forward(options, query, key, value, cu_seqlens)


def _backward(
    options: Options,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    total: Partial,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(query):
        return _launch.backward(options, grad_out, grad_lse, query, key, value, total, cu_seqlens)


OPERATORS = define("triton", _forward, _backward, _launch.empty_lse)
