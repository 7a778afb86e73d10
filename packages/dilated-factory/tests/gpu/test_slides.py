"""Slide encoders on a GPU: what they give on the CPU, in any batch, with no wait for the device."""

import copy

import pytest
import torch
from torch import Tensor

from dilated_factory import SlideEncoder, SlideEncoderConfig
from dilated_testing import relative_error

pytestmark = pytest.mark.gpu

CONFIG = SlideEncoderConfig(
    tile_dim=24, embed_dim=96, num_heads=2, num_layers=2, segment_lengths=(32, 96, 256),
    dilation_rates=(1, 2, 4), global_pool=True,
)  # fmt: skip
LENGTHS = (300, 1, 61)


@pytest.fixture
def model() -> SlideEncoder:
    torch.manual_seed(0)
    return SlideEncoder(CONFIG).eval()


def slides() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(n, 24), torch.randint(250_000, (n, 2))) for n in LENGTHS]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-3), (torch.float16, 2e-2)])
def test_slides_give_on_a_gpu_what_they_give_alone_on_the_cpu(
    model: SlideEncoder, dtype: torch.dtype, bound: float
) -> None:
    moved = copy.deepcopy(model).cuda()
    sizes = [256.0, 512.0, 506.5]
    expected = torch.cat([model(*s, tile_size=z)[0] for s, z in zip(slides(), sizes, strict=True)])
    most = max(LENGTHS)
    mask = torch.stack([torch.arange(most) >= n for n in LENGTHS]).cuda()
    tiles, coords = (
        torch.stack(
            [torch.nn.functional.pad(s[i], (0, 0, 0, most - len(s[i]))) for s in slides()]
        ).cuda()
        for i in (0, 1)
    )
    with torch.autocast("cuda", torch.float16, enabled=dtype == torch.float16):
        packed = moved.encode(slides(), tile_size=sizes)[0]
        padded = moved(tiles, coords, key_padding_mask=mask, tile_size=sizes)[0]
    for found in (packed, padded):
        assert relative_error(found.cpu(), expected) < bound
    weights = torch.randn(3, 96)
    grads = torch.autograd.grad((packed * weights.cuda()).sum(), list(moved.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


def test_forward_does_not_wait_for_the_device(model: SlideEncoder) -> None:
    moved = model.cuda()
    tiles = torch.randn(2, 300, 24, device="cuda")
    coords = torch.randint(250_000, (2, 300, 2), device="cuda")
    mask = torch.zeros(2, 300, dtype=torch.bool, device="cuda")
    mask[1, 200:] = True
    calls = (
        lambda: moved(tiles, coords),
        lambda: moved(tiles, coords, key_padding_mask=mask, tile_size=[256.0, 506.5]),
    )
    for call in calls:
        call()  # compiles and tunes
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_tile_out_of_the_grid_spoils_its_slide_alone(model: SlideEncoder) -> None:
    moved = model.cuda()
    tiles = torch.randn(2, 300, 24, device="cuda")
    coords = torch.randint(250_000, (2, 300, 2), device="cuda")
    coords[1, 7] = 256_000
    (found,) = moved(tiles, coords)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()
