"""Generation: deterministic, within its arguments."""

import pytest
import torch

from dilated_factory import LongNetConfig, LongNetLM
from dilated_factory.generation import generate


@pytest.fixture
def model(tiny_model: LongNetConfig) -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(tiny_model)


def test_the_seed_decides_the_bytes_and_nothing_else_does(model: LongNetLM) -> None:
    first = generate(model, b"ab", max_bytes=60, seed=3)
    torch.manual_seed(99)
    assert generate(model, b"ab", max_bytes=60, seed=3) == first
    assert generate(model, b"ab", max_bytes=60, seed=4) != first
    assert len(first) == 60
    assert generate(model, b"ab", max_bytes=20, seed=3) == first[:20]
    assert model.training


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-9}])
def test_the_careful_limits_take_the_likeliest_byte(
    model: LongNetLM, options: dict[str, float]
) -> None:
    prompt = b"xyz"
    added = generate(model, prompt, max_bytes=5, **options)  # type: ignore[arg-type]
    expected = bytearray(prompt)
    model.eval()
    for _ in range(5):
        expected.append(int(model(torch.tensor([list(expected)]))[0, -1].argmax()))
    model.train()
    assert prompt + added == bytes(expected)


def test_top_k_keeps_to_the_likeliest(model: LongNetLM) -> None:
    logits = model.eval()(torch.tensor([[7, 8]]))[0, -1]
    likeliest = set(logits.topk(3).indices.tolist())
    drawn = {generate(model, b"\x07\x08", max_bytes=1, top_k=3, seed=s)[0] for s in range(60)}
    assert drawn == likeliest


def test_a_prompt_longer_than_the_context_is_seen_by_its_end(model: LongNetLM) -> None:
    context = model.config.context
    long = bytes(range(200))
    assert generate(model, long, max_bytes=3) == generate(model, long[-context:], max_bytes=3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt": b""}, "prompt must hold at least one byte"),
        ({"max_bytes": -1}, "max_bytes must not be negative. Got -1"),
        ({"temperature": -0.1}, "temperature must be finite and not negative. Got -0.1"),
        ({"temperature": float("nan")}, "temperature must be finite and not negative. Got nan"),
        ({"top_k": 0}, "top_k must be at least 1. Got 0"),
    ],
)
def test_arguments_out_of_range_are_named(
    model: LongNetLM, options: dict[str, object], says: str
) -> None:
    arguments = {"prompt": b"a", "max_bytes": 1, **options}
    with pytest.raises(ValueError, match=says):
        generate(model, **arguments)  # type: ignore[arg-type]
