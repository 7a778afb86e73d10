"""Mixed precision where it is fast, with attention in float32 on CPUs."""

from pathlib import Path

import pytest
import torch

from dilated_core import DilatedAttention, DilatedPattern
from dilated_factory import TrainConfig
from dilated_factory.training.loop import select_device
from dilated_factory.training.precision import Float32Attention, automatic_dtype

from .conftest import start

CPU = torch.device("cpu")


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16"])
def test_a_cpu_that_multiplies_in_bfloat16_trains_in_it(
    monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True, "avx2": True})
    assert automatic_dtype(CPU) == "bfloat16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: False, "avx2": True})
    assert automatic_dtype(CPU) == "float32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert automatic_dtype(CPU) == "float32"


def test_attention_in_float32_rounds_once() -> None:
    torch.manual_seed(0)
    attention = DilatedAttention(DilatedPattern([5, 23], [1, 3]))
    exact = [torch.randn(2, 23, 3, 8) for _ in range(3)]
    rounded = [x.bfloat16() for x in exact]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Float32Attention(attention)(*rounded, is_causal=True)
    expected = attention(*(x.float() for x in rounded), is_causal=True)
    assert torch.equal(found, expected.bfloat16())


def test_training_in_bfloat16_on_a_cpu_attends_in_float32(
    tiny_train: TrainConfig, tmp_path: Path
) -> None:
    for dtype, kind in (("bfloat16", Float32Attention), ("float32", DilatedAttention)):
        config = tiny_train.model_copy(update={"dtype": dtype})
        trainer = start(config, tmp_path / dtype)
        assert type(trainer.model.blocks[0].attention.attention) is kind


def test_the_automatic_device_is_cuda_where_it_is() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert select_device("auto").type == expected
