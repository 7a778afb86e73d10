"""Mixed precision: where bfloat16 is fast, and what stays in float32 beside it."""

from typing import Any

import torch
from torch import Tensor, nn

from dilated_core.interfaces import AttentionModule
from dilated_factory.configs.models import Dtype


def automatic_dtype(device: torch.device) -> Dtype:
    """bfloat16 where the device multiplies matrices in it, else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return "bfloat16" if fast else "float32"


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Mixed precision on a device; nothing changes for "float32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


class Float32Attention(nn.Module):
    """An attention that computes in float32 whatever it gets, under autocast too.

    On CPUs torch's fused attention is slower in bfloat16, though matrix products are faster.
    """

    def __init__(self, attention: AttentionModule) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """The attention's output in the dtype of the query."""
        with torch.autocast(query.device.type, enabled=False):
            output: Tensor = self.attention(query.float(), key.float(), value.float(), **options)
        return output.to(query.dtype)
