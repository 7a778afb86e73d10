"""The triton backend, as far as it needs no GPU: block sizes, and plans that are kept."""

import gc
import weakref

import pytest
import torch

from dilated_core.extending import BlockSizes, Config, Pair, Scores, Sizes
from dilated_sparse import layouts
from dilated_sparse._call import BlockCall
from dilated_sparse._triton_backend import LayoutTiling, fit, forward

PAIR = Pair(Config(128, 128, 4, 3, 64), Config(64, 64, 4, 3, 64))


@pytest.mark.parametrize(
    ("block_size", "expected"),
    [
        (128, PAIR.tall),
        (256, PAIR.tall),
        (64, PAIR.short),
        (192, PAIR.short),
        # Tiles of 128 rows and steps that divide a block.
        (96, PAIR.tall._replace(columns=32)),
        (48, PAIR.short._replace(columns=32)),
        (32, PAIR.short._replace(rows=32, columns=32, warps=2)),
        (16, PAIR.short._replace(rows=16, columns=16, warps=1)),
        (7, PAIR.short._replace(rows=16, columns=16, warps=1)),
    ],
)
def test_tiles_fit_the_blocks(block_size, expected):
    assert fit(PAIR, block_size) == expected


def plan(layout, by_key=False, is_causal=False, blocks=(64, 64, 32)):
    n = layout.length
    sizes = Sizes(n, n, 2, 2, 0, 0, is_causal, torch.device("cpu"))
    return LayoutTiling(layout).plan(sizes, by_key, BlockSizes(*blocks))


def test_a_plan_is_made_once():
    layout = layouts.sliding_window(300, 50, block_size=64)
    assert plan(layout) is plan(layout)
    variants = [plan(layout), plan(layout, True), plan(layout, False, True),
                plan(layout, blocks=(64, 32, 32))]  # fmt: skip
    assert len(set(map(id, variants))) == len(variants)


def test_plans_are_gone_with_their_layout():
    layout = layouts.sliding_window(300, 50, block_size=64)
    table = weakref.ref(plan(layout).tiles)
    assert table() is not None
    del layout
    gc.collect()
    assert table() is None


def test_launches_are_kept_with_the_plans_of_their_layout(monkeypatch):
    pytest.importorskip("triton")
    from dilated_core._triton import _launch

    plans = []

    class Stub:
        def __init__(self, kernel, grid, plan, *rest):
            self.plan, self.stream = plan, plan.stream

        def __call__(self, *arguments):
            plans.append(self.plan)

    monkeypatch.setattr(_launch, "Launch", Stub)
    one, other, again = (layouts.sliding_window(37, w, block_size=16) for w in (3, 9, 9))
    x, scores = torch.zeros(1, 37, 2, 16), Scores(False, 0.25)
    for layout in (one, one, other, other, one, again):
        forward(BlockCall(layout, scores), x, x, x)
    assert plans[0] is plans[1] is plans[4]
    assert plans[2] is plans[3]
    assert len({id(plan) for plan in plans}) == 3
