"""Numbers that come from the device while it works on, and tensors likewise."""

import torch
from torch import Tensor


class Readback:
    """A small tensor on its way to the host; `numbers` waits for it, and for nothing after it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensors, self._ready = to_host({"": tensor})

    def numbers(self) -> list[float]:
        """The numbers of the tensor."""
        self._ready()
        numbers: list[float] = self._tensors[""].tolist()
        return numbers


class _Now:
    """What is here already."""

    def __call__(self) -> None:
        """Return at once."""


class _Arrival:
    """The end of the copies that a CUDA stream has begun so far."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(device))

    def __call__(self) -> None:
        """Wait for it."""
        self._event.synchronize()


def to_host(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], _Now | _Arrival]:
    """Copy tensors to the host; return the copies, and what waits until they can be read.

    The device goes on meanwhile; what it changes in the tensors afterwards is not in the copies.
    """
    device = next((x.device for x in tensors.values() if x.device.type == "cuda"), None)
    if device is None:
        return {name: x.detach().to("cpu", copy=True) for name, x in tensors.items()}, _Now()
    copies = {
        name: torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(
            x.detach(), non_blocking=True
        )
        for name, x in tensors.items()
    }
    return copies, _Arrival(device)
