"""Linear layers, in float32 by oneDNN where torch would take a slower library."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_core._torch_internals import has_hooks, is_eager

# Below so many multiplications what an operator costs beside them is more than it saves.
_LEAST_PRODUCTS = 1 << 23


def linear(layer: nn.Module, input: Tensor) -> Tensor:
    """layer(input): (..., in_features) to (..., out_features), as torch's but for rounding.

    In float32 on AMD's CPUs with AVX-512 the products of torch's linear layer are oneDNN's. torch
    multiplies float32 matrices there by MKL, which has half the speed; a convolution of width 1
    goes to oneDNN where there are several threads, backward too. A class of our own would hide
    the layer from what looks for torch's, such as dynamic quantization.
    """
    if (
        type(layer) is not nn.Linear
        or not input.is_cpu
        or input.dtype != torch.float32
        or layer.weight.dtype != torch.float32
        or not is_eager(input, layer.weight)  # what is traced may have any length
        or input.numel() * layer.out_features < _LEAST_PRODUCTS
        or input.shape[-1] != layer.in_features
        or torch.get_num_threads() == 1
        or torch.is_autocast_enabled("cpu")
        or has_hooks(layer)
        or not _prefers_convolutions()
    ):
        output: Tensor = layer(input)
        return output
    rows = input.numel() // layer.in_features
    # As an image of one pixel a row, whose channels lie together: nothing is copied.
    image = input.reshape(1, rows, 1, layer.in_features).permute(0, 3, 1, 2)
    output = F.conv2d(image, layer.weight[:, :, None, None], layer.bias)
    return output.permute(0, 2, 3, 1).reshape(*input.shape[:-1], layer.out_features)


@cache
def _prefers_convolutions() -> bool:
    found = torch.cpu.get_capabilities()
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and str(found.get("cpu_name", "")).startswith("AMD")
        and bool(found.get("avx512_f"))
    )
