"""nn.TransformerEncoder with dilated attention: weights, calls and state dicts stay.

    python examples/torch_encoder.py

Only self-attention is replaced. In eval mode torch's own layer leaves for a kernel of dense
attention, which would go past a module put in its place by hand, without a word; it does not here.
"""

import copy
import time

import torch
from torch import nn

from dilated_core import DilatedPattern
from dilated_factory import replace_attention

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0, norm_first=True)
dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

# One segment over the whole length is dense attention: the same model by another road.
same = copy.deepcopy(dense)
print(replace_attention(same, DilatedPattern([300], [1])))
x = torch.randn(2, 300, 64)
padding = torch.arange(300) >= torch.tensor([[300], [200]])  # True = ignore
with torch.no_grad():
    a = dense(x, src_key_padding_mask=padding)
    b = same(x, src_key_padding_mask=padding)
difference = (a - b)[~padding].abs().max().item()
print(f"one segment: differs by {difference:.1e}")
assert difference < 1e-4

# A pattern that sees all near keys, and far ones thinly. Weights that were trained for dense
# attention want fine-tuning.
sparse = copy.deepcopy(dense)
replace_attention(sparse, DilatedPattern([256, 8192], [1, 32]))
sparse.load_state_dict(dense.state_dict())
x = torch.randn(1, 4096, 64)
with torch.no_grad():
    for name, model in ("dense", dense), ("dilated", sparse):
        start = time.perf_counter()
        model(x)
        print(f"4096 rows, {name}: {time.perf_counter() - start:.2f} s")

# Causal without a mask of N x N, which 100,000 rows could not have.
sparse.train()
sparse(x, is_causal=True).square().mean().backward()
print(f"causal, trained: gradient norm {sparse.layers[0].self_attn.in_proj_weight.grad.norm():.4f}")
