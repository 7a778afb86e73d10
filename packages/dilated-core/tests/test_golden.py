"""The outputs of the real torchscale code, float64, reproduced by every backend."""

import json
from pathlib import Path

import pytest
import torch

from dilated_core import DilatedPattern, dilated_attention
from dilated_testing import relative_error

GOLDEN = Path(__file__).parent / "golden" / "torchscale_attention"
CASES = json.loads(GOLDEN.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return pytest.importorskip("safetensors.torch").load_file(GOLDEN.with_suffix(".safetensors"))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_torchscale_is_reproduced(tensors, case, backend):
    q, k, v, expected = (tensors[f"{case['name']}.{x}"] for x in ("q", "k", "v", "out"))
    pattern = DilatedPattern(
        case["segment_lengths"],
        case["dilation_rates"],
        head_offsets="blocked",
        count_padding=True,
    )
    actual = dilated_attention(q, k, v, pattern, is_causal=case["is_causal"], backend=backend)
    assert relative_error(actual, expected) < 1e-10


def test_the_golden_data_tells_offsets_and_padding_apart(tensors):
    q, k, v, expected = (tensors[f"case2_full.{x}"] for x in ("q", "k", "v", "out"))
    for options in ({"head_offsets": "blocked"}, {"count_padding": True}):
        wrong = DilatedPattern([16, 32, 64], [1, 2, 4], **options)
        assert relative_error(dilated_attention(q, k, v, wrong), expected) > 1e-3
