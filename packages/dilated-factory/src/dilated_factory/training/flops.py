"""Operations of a training step, and what a device could do."""

import torch

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


def flops_per_token(model: LongNetLM) -> float:
    """Operations of forward and backward for one token, by the definition of the pattern.

    Six for each weight of a matrix, the head's among them; the backward of attention counts twice
    its forward, and nothing is counted that is computed again.
    """
    config = model.config
    weights = model.head.weight.numel() + sum(
        parameter.numel() for parameter in model.blocks.parameters() if parameter.ndim == 2
    )
    pattern, length = config.pattern, config.context
    forward = pattern.flops(length, config.num_heads, config.head_dim, is_causal=True) / length
    return 6 * weights + 3 * config.num_layers * forward


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Operations a second that a device could do; None where that is not known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)
