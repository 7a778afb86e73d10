"""A vision transformer of small patches: attention of a model of others, a pattern in each layer.

    python examples/vision_transformer.py

The block is written as timm writes it (one projection `qkv`, then `proj`); a model of
`timm.create_model("vit_base_patch16_224")` goes the same way. What only looks like it (attention
with rotary positions, windows or biases) is left, and the table says why.
"""

import torch
from torch import Tensor, nn

from dilated_core import DilatedPattern
from dilated_factory import replace_attention


class Attention(nn.Module):
    """Self-attention of a ViT, with timm's names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, N, width) to rows."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Rows (B, N, width) to rows."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches of 4 x 4 pixels of images 64 x 64, and a mean of them."""

    def __init__(self, classes: int = 2, width: int = 32, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.places = nn.Parameter(torch.randn(1, 256, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 1, 64, 64) to logits (B, classes)."""
        rows = self.patches(images).flatten(2).transpose(1, 2) + self.places
        return self.head(self.blocks(rows).mean(1))


torch.manual_seed(0)
model = ViT()
# Rows of 16 patches and a thin look at all in the first layers, all of it in the last.
near = DilatedPattern([16, 256], [1, 8])
print(replace_attention(model, {"blocks.2.*": DilatedPattern([256], [1]), "blocks.*": near}))

images, labels = torch.randn(8, 1, 64, 64), torch.randint(2, (8,))
loss = nn.functional.cross_entropy(model(images), labels)
loss.backward()
norm = model.blocks[0].attn.qkv.weight.grad.norm()
print(f"loss {loss:.3f}, norm of the gradient of the first qkv {norm:.4f}")

# One segment over all 256 patches is what the model was before.
dense, same = ViT(), ViT()
same.load_state_dict(dense.state_dict())
replace_attention(same, DilatedPattern([256], [1]))
same.load_state_dict(dense.state_dict())  # names are what they were
difference = (dense(images) - same(images)).abs().max().item()
print(f"one segment: differs by {difference:.1e}")
assert difference < 1e-4
