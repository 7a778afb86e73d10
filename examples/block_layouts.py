"""Block-sparse layouts: combined, chosen by content, and decoded with a cache.

    python examples/block_layouts.py

A layout says which keys each query sees, exact to the token; B is the batch, N the length, H the
heads, D their width.
"""

import time

import torch
import torch.nn.functional as F

from dilated_core import DilatedPattern, MultiheadDilatedAttention
from dilated_sparse import (
    BlockSparseAttention,
    BlockSparseDilatedAttention,
    BlockSparseKVCache,
    block_sparse_attention,
    layouts,
    select,
)

torch.manual_seed(0)
B, N, H, D, BLOCK = 1, 2048, 4, 32, 64

# Combined: a union of what two see, without what lies between documents, causal.
window = layouts.sliding_window(N, 100, block_size=BLOCK)
first = layouts.global_tokens(N, 4, block_size=BLOCK)
documents = layouts.document([900, N - 900], block_size=BLOCK)
layout = ((window | first) & documents).causal()
print(layout.text(size=16))
print(f"density {layout.density():.3f}")

# It is exact: the same as dense attention under its mask.
query, key, value = torch.randn(3, B, N, H, D)
sparse = block_sparse_attention(query, key, value, layout)
rows = [x.transpose(1, 2) for x in (query, key, value)]
dense = F.scaled_dot_product_attention(*rows, attn_mask=layout.to_dense()).transpose(1, 2)
print(f"differs from dense attention under its mask by {(sparse - dense).abs().max():.1e}")
assert torch.allclose(sparse, dense, atol=1e-5)

# Chosen by content: what each block of queries needs most. Here each block of queries looks like
# one far block of keys, which a window would never see.
partner = torch.randperm(N // BLOCK)
themes = F.normalize(torch.randn(N // BLOCK, H, D), dim=-1) * 8
keys = themes.repeat_interleave(BLOCK, 0)[None] + torch.randn(B, N, H, D)
queries = themes[partner].repeat_interleave(BLOCK, 0)[None] + torch.randn(B, N, H, D)
chosen = select.top_k_blocks(queries, keys, 2, block_size=BLOCK)
full = F.scaled_dot_product_attention(
    *(x.transpose(1, 2) for x in (queries, keys, value))
).transpose(1, 2)
for name, choice in ("a window", window), ("two blocks by content", chosen):
    got = block_sparse_attention(queries, keys, value, choice)
    error = ((got - full).norm() / full.norm()).item()
    print(f"{name}: density {choice.density():.3f}, error against all keys {error:.3f}")
assert error < 0.05

# Decoded: a prompt at once, then token by token. The cache holds the rows that are still seen.
causal = (window | first).causal()
whole = block_sparse_attention(query, key, value, causal)
with torch.no_grad():
    cache = BlockSparseKVCache(causal, length=N)
    prompt, steps = N - 64, []
    cache.attend(query[:, :prompt], key[:, :prompt], value[:, :prompt])
    start = time.perf_counter()
    for place in range(prompt, N):
        one = slice(place, place + 1)
        steps.append(cache.attend(query[:, one], key[:, one], value[:, one]))
    seconds = time.perf_counter() - start
off = (torch.cat(steps, 1) - whole[:, prompt:]).abs().max().item()
kept = cache.nbytes / (2 * B * N * H * D * query.element_size())
print(
    f"decoded {len(steps)} tokens in {seconds:.2f} s: differs by {off:.1e}, {kept:.0%} of all rows"
)
assert off < 1e-5

# In a module, alone or in one softmax with a dilated pattern.
pattern = DilatedPattern([128, N], [1, 16])
x = torch.randn(B, N, H * D)
for attention in (BlockSparseAttention(causal), BlockSparseDilatedAttention(pattern, causal)):
    layer = MultiheadDilatedAttention(H * D, H, None, attention=attention)
    output, _ = layer(x, is_causal=True)
    output.square().mean().backward()
    print(f"{type(attention).__name__}: {tuple(output.shape)}, trained as others are")
