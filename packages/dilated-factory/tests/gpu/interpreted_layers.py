"""Run by test_norms.py in a process of its own: layers whose norms are interpreted kernels.

Prints one JSON object: for each case the error of output and gradients against float64 over that
of torch's norms, bytes of a row that a forward with those keeps beside it, and kernels launched.
"""

import copy
import json
import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any, cast

import torch
from torch import Tensor, nn

from dilated_core import DilatedAttention, DilatedPattern
from dilated_factory import TransformerDecoderLayer, TransformerEncoderLayer
from dilated_factory.models import _norm_kernels as kernels
from dilated_factory.models import norms
from dilated_factory.models.layers import Recompute, TransformerLayer

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
# name: (weights, autocast or None, what backward recomputes, whether there is cross attention)
CASES: dict[str, tuple[torch.dtype, torch.dtype | None, Recompute | None, bool]] = {
    "autocast": (FLOAT, BFLOAT, None, False),
    "pointwise": (FLOAT, BFLOAT, "pointwise", False),
    "selective": (FLOAT, BFLOAT, "selective", False),
    "a 16-bit model": (BFLOAT, None, None, False),
    "float32": (FLOAT, None, None, False),
    "a memory": (FLOAT, HALF, None, True),
    "a hook": (FLOAT, BFLOAT, None, False),
}

launched: list[str] = []
forward = kernels.forward


def record(x: Tensor, added: Tensor | None, *others: Any) -> None:
    """Launch a forward and note its kind."""
    launched.append("gelu" if others[-1] else "norm" if added is None else "sum")
    forward(x, added, *others)


kernels.forward = record


def outputs(layer: TransformerLayer, hidden: Tensor, upstream: Tensor) -> tuple[list[Tensor], int]:
    """Output and gradients, and bytes that are kept between."""
    own = {x.data_ptr() for x in layer.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    hidden = hidden.clone().requires_grad_()
    others = (upstream,) if getattr(layer, "cross_attention", None) is not None else ()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(hidden, *others)
    count = sum(size for size, _ in kept.values())
    seen = [hidden, *layer.parameters()]
    grads = torch.autograd.grad(out, seen, upstream.to(out.dtype))
    # A key bias moves all scores of a query alike: its gradient is rounding.
    names = ["", *(name for name, _ in layer.named_parameters())]
    return [out, *(x for x, n in zip(grads, names, strict=True) if "k_proj.bias" not in n)], count


def compared(name: str) -> tuple[float, float, list[str]]:
    """What is printed of a case."""
    dtype, narrow, recompute, crossing = CASES[name]
    torch.manual_seed(0)
    attention = DilatedAttention(DilatedPattern([4, 8], [1, 2]))
    layer: TransformerLayer = TransformerEncoderLayer(48, 2, attention)
    if crossing:
        layer = TransformerDecoderLayer(48, 2, attention, cross_attention=copy.deepcopy(attention))
    layer.to(dtype)
    layer.recompute = recompute
    for part in layer.modules():
        if isinstance(part, nn.LayerNorm):
            nn.init.normal_(part.weight, 1, 0.3)
            nn.init.normal_(part.bias)
    if name == "a hook":
        layer.feed_forward_norm.register_forward_hook(lambda *given: given[-1].clone())
    hidden, upstream = torch.randn(2, 1, 5, 48).to(dtype)
    exact, _ = outputs(copy.deepcopy(layer).double(), hidden.double(), upstream.double())
    found, counts = [], []
    launched.clear()
    for served in (False, True):
        norms.has_kernels = lambda x, served=served: cast(bool, served)
        with torch.autocast("cpu", narrow, enabled=narrow is not None):
            part, count = outputs(layer, hidden, upstream)
            launches = launched[:]
        found.append(part)
        counts.append(count)
    with torch.no_grad():
        torchs, ours = (
            sum(float((a.double() - b).norm() / b.norm()) for a, b in zip(one, exact, strict=True))
            for one in found
        )
    return ours / torchs if torchs else 1.0, (counts[0] - counts[1]) / 5, launches


print(json.dumps({name: compared(name) for name in CASES}))
