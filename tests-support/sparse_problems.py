"""Random layouts and calls of block-sparse attention, for the tests of this package."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from dilated_sparse import BlockLayout, block_sparse_attention, layouts
from dilated_testing import SCALES, stretch

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass
class Problem:
    """One call of block-sparse attention with everything that can be chosen about it."""

    layout: BlockLayout
    batch: int = 2
    heads: int = 3
    kv_heads: int = 3
    head_dim: int = 5
    is_causal: bool = False
    padding: float = 0.0
    dropout_p: float = 0.0
    seed: int = 7
    scale: float | None = None

    def tensors(self, dtype=torch.float64, device="cpu"):
        """Random q, k, v that require gradients: the same numbers for every dtype and device."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [(self.layout.length, self.heads)] + 2 * [(self.layout.key_length, self.kv_heads)]
        query, key, value = (
            torch.randn(self.batch, n, h, self.head_dim, dtype=torch.float64, generator=generator)
            for n, h in shapes
        )
        query *= stretch(self.scale, self.head_dim)
        return tuple(x.to(device, dtype).requires_grad_() for x in (query, key, value))

    def mask(self, device="cpu"):
        """A random key padding mask, or None."""
        if not self.padding:
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        drawn = torch.rand(self.batch, self.layout.key_length, generator=generator)
        return (drawn < self.padding).to(device)

    def run(self, backend, tensors, *, lse_gradient=True, attention=block_sparse_attention):
        """Outputs and, for a random upstream gradient, the gradients: to unstretched queries."""
        torch.manual_seed(self.seed)
        out, lse = attention(
            *tensors, self.layout, is_causal=self.is_causal, scale=self.scale,
            key_padding_mask=self.mask(tensors[0].device), dropout_p=self.dropout_p,
            enable_gqa=True, return_lse=True, backend=backend,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(self.seed + 2)
        upstream = [
            torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.device, x.dtype)
            for x in (out, lse)
        ]
        upstream[1] = upstream[1].masked_fill(lse == -torch.inf, 0.0)
        outputs = [out, lse] if lse_gradient else [out]
        dq, *grads = torch.autograd.grad(outputs, tensors, upstream[: len(outputs)])
        dq = dq * stretch(self.scale, self.head_dim)
        return dict(zip(NAMES, (out, lse, dq, *grads), strict=True))


@st.composite
def dense_masks(draw, heads=None, length=None, key_length=None, max_length=41):
    """Any small mask (H, N, M): blocks that are full, empty or random, of a size of their own."""
    heads = draw(st.integers(1, 3)) if heads is None else heads
    length = draw(st.integers(0, max_length)) if length is None else length
    key_length = draw(st.integers(0, max_length)) if key_length is None else key_length
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    cell = draw(st.integers(1, 9))
    shape = (heads, -(-length // cell), -(-key_length // cell))
    full = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    mixed = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    tokens = torch.rand(heads, length, key_length, generator=generator) < 0.5

    def spread(cells):
        wide = cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
        return wide[:, :length, :key_length]

    return spread(full) | (spread(mixed) & tokens)


@st.composite
def any_layouts(draw, *, heads=1, max_length=41, causal=False):
    """Any small layout, per head or shared: random ones, unions, intersections, named ones."""
    key_length = draw(st.integers(0, max_length))
    length = key_length
    if draw(st.booleans()):
        length = draw(st.integers(0, key_length if causal else max_length))
    block_size = draw(st.integers(1, 11))

    def one():
        count = draw(st.sampled_from([1, heads]))
        mask = draw(dense_masks(count, length, key_length))
        return BlockLayout.from_dense(mask, block_size=block_size)

    layout = one()
    if length == key_length and draw(st.booleans()):
        layout = draw(st.sampled_from([lambda a, b: a | b, lambda a, b: a & b]))(
            layout, draw(named_layouts(length, block_size))
        )
    return layout | one() if draw(st.booleans()) else layout


@st.composite
def named_layouts(draw, length, block_size):
    """One of the named layouts of that length."""
    small = st.integers(1, 9)
    b = {"block_size": block_size}
    made = [
        lambda: layouts.sliding_window(length, draw(small), **b),
        lambda: layouts.dilated_window(length, draw(small), draw(small), **b),
        lambda: layouts.strided(length, draw(small), **b),
        lambda: layouts.global_tokens(length, draw(small), **b),
        lambda: layouts.bigbird(length, seed=draw(small), **b),
        lambda: layouts.prefix(length, draw(small), **b),
    ]
    return draw(st.sampled_from(made))()


@st.composite
def problems(draw, *, dropout=True, max_length=41):
    """Any small problem over the full cross product of options."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    is_causal = draw(st.booleans())
    return Problem(
        draw(any_layouts(heads=heads, max_length=max_length, causal=is_causal)),
        batch=draw(st.integers(0, 2)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 3, 8])),
        is_causal=is_causal,
        padding=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.4])) if dropout else 0.0,
        seed=draw(st.integers(0, 2**31)),
        scale=draw(st.sampled_from(SCALES)),
    )
