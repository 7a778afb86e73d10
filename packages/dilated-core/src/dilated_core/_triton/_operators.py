"""The kernels as the custom operators of a backend."""

from torch import Tensor

from dilated_core import _operators
from dilated_core._call import DilatedCall, Upstream
from dilated_core._partial import Partial
from dilated_core._triton import _launch


def _forward(call: DilatedCall, query: Tensor, key: Tensor, value: Tensor) -> Partial:
    return _launch.forward(_launch.pattern_call(call, query, key, value))


def _backward(call: DilatedCall, upstream: Upstream) -> _operators.Gradients:
    _, _, query, key, value, _ = upstream
    return _launch.backward(_launch.pattern_call(call, query, key, value), upstream)


OPERATORS = _operators.define(
    "dilated_core::triton", _operators.DILATED, _forward, _backward, _launch.empty_lse
)
