"""Linear layers, in float32 by oneDNN where torch would take a slower library."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dilated_core._torch_internals import is_eager

# Below so many multiplications what an operator costs beside them is more than it saves.
_LEAST_PRODUCTS = 1 << 23


class Linear(nn.Linear):
    """torch's linear layer; in float32 on AMD's CPUs with AVX-512 its products are oneDNN's.

    torch multiplies float32 matrices there by MKL, which has half the speed. A convolution of
    width 1 goes to oneDNN where there are several threads, backward too.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features), as torch's but for rounding."""
        if (
            not input.is_cpu
            or input.dtype != torch.float32
            or self.weight.dtype != torch.float32
            or not is_eager(input, self.weight)  # what is traced may have any length
            or input.numel() * self.out_features < _LEAST_PRODUCTS
            or torch.get_num_threads() == 1
            or torch.is_autocast_enabled("cpu")
            or not _prefers_convolutions()
        ):
            return super().forward(input)
        rows = input.numel() // self.in_features
        # As an image of one pixel a row, whose channels lie together: nothing is copied.
        image = input.reshape(1, rows, 1, self.in_features).permute(0, 3, 1, 2)
        output = F.conv2d(image, self.weight[:, :, None, None], self.bias)
        return output.permute(0, 2, 3, 1).reshape(*input.shape[:-1], self.out_features)


@cache
def _prefers_convolutions() -> bool:
    found = torch.cpu.get_capabilities()
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and str(found.get("cpu_name", "")).startswith("AMD")
        and bool(found.get("avx512_f"))
    )
