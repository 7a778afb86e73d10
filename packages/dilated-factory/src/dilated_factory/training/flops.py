"""Operations of a training step, and what a device could do."""

import torch

from dilated_factory.configs.models import LongNetConfig
from dilated_factory.models.longnet import LongNetLM

# Dense bfloat16, from the vendors' data sheets, the first name that fits; operations a second.
_PEAKS = {
    "B200": 2.25e15,
    "H200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100": 9.89e14,
    "A100": 3.12e14,
    "L40S": 3.62e14,
    "RTX 4090": 1.65e14,
}


def flops_per_token(model: LongNetLM, context: int | None = None) -> float:
    """Operations of forward and backward for one token, by the definition of the pattern.

    In sequences of a context; by default that of the model.
    """
    weights = model.head.weight.numel() + sum(
        parameter.numel() for parameter in model.blocks.parameters() if parameter.ndim == 2
    )
    return model_flops(model.config, weights, attention_flops(model.config, context))


def model_flops(shape: LongNetConfig, weights: int, attention: float) -> float:
    """The same from how many weights matrices have, the head's among them, and `attention_flops`.

    Six for each weight; the backward of attention counts twice its forward, and nothing is counted
    that is computed again.
    """
    return 6 * weights + 3 * shape.num_layers * attention


def attention_flops(shape: LongNetConfig, context: int | None = None) -> float:
    """Operations of the forward of one layer's attention, for each token."""
    pattern, length = shape.pattern, context or shape.context
    return pattern.flops(length, shape.num_heads, shape.head_dim, is_causal=True) / length


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Operations a second that a device could do; None where that is not known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)
