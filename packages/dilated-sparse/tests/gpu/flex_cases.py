"""Run by test_flex.py in a process of its own: errors of the flex backend, as one JSON object."""

import json
import warnings

import torch

from dilated_sparse import BlockLayout, block_sparse_attention, layouts
from dilated_testing import relative_error

# torch's compiler looks for it while it traces a tensor that has a history.
warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")


def blind_rows():
    seen = torch.rand(1, 300, 300, generator=torch.Generator().manual_seed(3)) < 0.5
    seen[:, 100:170] = False
    return BlockLayout.from_dense(seen)


CASES = {
    "window": (lambda: layouts.sliding_window(517, 70), {}),
    "causal": (lambda: layouts.longformer(517, 70, 3), {"is_causal": True}),
    "heads": (lambda: layouts.bigbird(517, heads=4, block_size=128), {}),
    "padding": (lambda: layouts.longformer(517, 70, 300), {"padded": True}),
    "blind": (blind_rows, {}),
}


def worst(name, kv_heads):
    """The greatest relative error of output, lse and gradients."""
    make, options = CASES[name]
    layout = make()
    torch.manual_seed(0)
    torch.compiler.reset()
    n, padded = layout.length, options.get("padded", False)
    mask = torch.rand(2, n, device="cuda") < 0.3 if padded else None
    shapes = [(2, n, h, 64) for h in (4, kv_heads, kv_heads)]
    tensors = [torch.randn(s, device="cuda", dtype=torch.float64) for s in shapes]
    upstream = torch.randn(shapes[0], device="cuda", dtype=torch.float64)
    found = {}
    for backend, dtype in (("flex", torch.float32), ("reference", torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in tensors]
        out, lse = block_sparse_attention(
            *inputs, layout, is_causal=options.get("is_causal", False), key_padding_mask=mask,
            enable_gqa=True, return_lse=True, backend=backend,
        )  # fmt: skip
        found[backend] = out, lse, *torch.autograd.grad(out, inputs, upstream.to(dtype))
    return max(relative_error(a, b) for a, b in zip(*found.values(), strict=True))


if __name__ == "__main__":
    print(json.dumps({f"{name} {heads}": worst(name, heads) for name in CASES for heads in (4, 2)}))
