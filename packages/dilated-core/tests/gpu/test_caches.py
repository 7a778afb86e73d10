"""Caches on a GPU: emptied, and what a captured graph reads stays."""

import gc

import pytest
import torch

pytest.importorskip("triton")

from dilated_core import DilatedPattern, clear_caches, dilated_attention
from dilated_core._triton._pattern_plans import _cache

pytestmark = pytest.mark.gpu

PATTERN = DilatedPattern([64, 256], [1, 4])


def inputs(length: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(1, length, 4, 32, device="cuda", dtype=torch.float16, generator=generator)
        for _ in range(3)
    ]


def test_tables_are_given_back_and_results_stay():
    clear_caches()
    rows = inputs(515)
    before = dilated_attention(*rows, PATTERN, is_causal=True)
    assert _cache.recent
    held = torch.cuda.memory_allocated()
    clear_caches()
    gc.collect()
    assert not _cache.recent
    assert not _cache.launches
    assert torch.cuda.memory_allocated() < held
    assert torch.equal(dilated_attention(*rows, PATTERN, is_causal=True), before)


def test_a_captured_graph_outlives_a_clear():
    rows = inputs(517)
    expected = dilated_attention(*rows, PATTERN, is_causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dilated_attention(*rows, PATTERN, is_causal=True)
    clear_caches()
    gc.collect()
    torch.cuda.empty_cache()
    # What was given back is written over.
    junk = [torch.full((2**16,), -1, device="cuda", dtype=torch.int32) for _ in range(64)]
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)
    del junk
