"""Round trips with torch's BlockMask, and the same outputs in FlexAttention."""

import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dilated_sparse import BlockLayout, block_sparse_attention, layouts
from dilated_testing import relative_error
from sparse_problems import any_layouts


@given(any_layouts(heads=2, max_length=31).filter(lambda x: x.length and x.key_length))
def test_there_and_back(layout):
    assert BlockLayout.from_block_mask(layout.to_block_mask()) == layout


@pytest.mark.parametrize("length", [256, 200])
def test_from_torchs_own_block_mask(length):
    def mask_mod(batch, head, query, key):
        return (query - key).abs() <= 70 + 20 * head

    block_mask = create_block_mask(mask_mod, 1, 2, length, length, device="cpu", BLOCK_SIZE=32)
    layout = BlockLayout.from_block_mask(block_mask)
    expected = BlockLayout.from_mask_mod(mask_mod, length, block_size=32, heads=2)
    assert layout == expected


@settings(max_examples=15)
@given(any_layouts(heads=2, max_length=31).filter(lambda x: x.length and x.key_length))
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_gives_the_same_outputs(layout):
    q, k, v = (
        torch.randn(1, n, 2, 16) for n in (layout.length, layout.key_length, layout.key_length)
    )
    block_mask = layout.to_block_mask()
    theirs = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=block_mask)
    ours = block_sparse_attention(q, k, v, layout)
    seen = layout.to_dense().any(-1).expand(2, -1).T[None, :, :, None]
    # What FlexAttention gives to a row that sees nothing is not defined.
    theirs = theirs.transpose(1, 2).where(seen, torch.zeros(()))
    assert relative_error(ours, theirs) < 1e-5


def test_bad_block_masks_are_named():
    with pytest.raises(TypeError, match=r"block_mask must be a BlockMask. Got int"):
        BlockLayout.from_block_mask(3)
    plain = layouts.prefix(8, 2, block_size=4).to_block_mask()
    uneven = BlockMask.from_kv_blocks(
        plain.kv_num_blocks, plain.kv_indices, BLOCK_SIZE=(4, 2), seq_lengths=(8, 4)
    )
    with pytest.raises(ValueError, match=r"block_mask must have square blocks. Got \(4, 2\)"):
        BlockLayout.from_block_mask(uneven)
