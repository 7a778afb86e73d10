"""Evaluation: the same bytes at every context, each with the promised history."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dilated_factory import CorpusError, InputError, LongNetConfig, LongNetLM
from dilated_factory.training.evaluation import (
    ContextScore,
    context_gain,
    evaluate_contexts,
    fitting_contexts,
    scored_sections,
)


@given(st.integers(1, 64), st.integers(0, 5000), st.integers(1, 5000))
def test_sections_are_apart_and_have_history(half: int, extra: int, max_bytes: int) -> None:
    longest = 2 * half
    length = longest + 1 + extra
    sections = scored_sections(length, longest, max_bytes)
    assert all(len(section) == half for section in sections)
    assert sections[0].start == half + 1
    assert sections[-1].stop <= length
    assert all(a.stop <= b.start for a, b in pairwise(sections))
    assert len(sections) == max(1, min(max_bytes, length - half - 1) // half)


def test_the_score_is_the_mean_of_each_byte_after_its_own_window(
    tiny_model: LongNetConfig,
) -> None:
    torch.manual_seed(0)
    model = LongNetLM(tiny_model)
    data = torch.randint(256, (211,), dtype=torch.uint8)
    told: list[tuple[str, float]] = []
    scores = evaluate_contexts(
        model, data, [8, 16, 32], max_tokens=70, on_progress=lambda *now: told.append(now)
    )
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert {what for what, _ in told} == {f"scoring at context {c}" for c in (8, 16, 32)}
    sections = scored_sections(len(data), 32, 70)
    assert len(sections) == 4
    model.eval()
    for score in scores:
        half = score.context // 2
        bits = []
        for section in sections:
            for position in section:
                chunk = section.start + (position - section.start) // half * half
                history = data[chunk - half - 1 : position]
                assert half < len(history) <= score.context
                logits = model(history.to(torch.int64).unsqueeze(0))[0, -1]
                bits.append(-logits.log_softmax(-1)[int(data[position])].item() / math.log(2))
        assert score.scored_bytes == len(bits) == 64
        assert score.bits_per_byte == pytest.approx(sum(bits) / len(bits), rel=1e-5)
        each = [sum(bits[i : i + 16]) / 16 for i in range(0, 64, 16)]
        assert score.sections == pytest.approx(each, rel=1e-5)


@given(
    st.lists(st.tuples(st.floats(-9, 9), st.floats(-1, 1)), min_size=2, max_size=31),
    st.floats(-5, 5),
)
def test_a_gain_is_that_of_the_sections_and_what_all_have_in_common_leaves_its_error(
    sections: list[tuple[float, float]], common: float
) -> None:
    short = ContextScore(8, 0.0, 1, tuple(hard + saved + common for hard, saved in sections))
    long = ContextScore(64, 0.0, 1, tuple(hard for hard, _ in sections))
    saved = torch.tensor([saved for _, saved in sections], dtype=torch.float64)
    error = saved.std() / math.sqrt(len(saved))
    found = context_gain(short, long)
    assert found == pytest.approx((saved.mean().item() + common, error.item()), abs=1e-9)


@pytest.mark.parametrize("sections", [((), ()), ((1.0,), (2.0,)), ((1.0, 2.0), (1.0, 2.0, 3.0))])
def test_a_gain_needs_the_same_sections(
    sections: tuple[tuple[float, ...], tuple[float, ...]],
) -> None:
    short, long = (ContextScore(8, 1.0, 1, each) for each in sections)
    with pytest.raises(ValueError, match=f"Got {len(short.sections)} and {len(long.sections)}"):
        context_gain(short, long)


def test_a_model_in_training_mode_stays_so_but_is_scored_without_dropout(
    tiny_model: LongNetConfig,
) -> None:
    model = LongNetLM(tiny_model.model_copy(update={"dropout": 0.5})).train()
    data = torch.randint(256, (100,), dtype=torch.uint8)
    first, second = (evaluate_contexts(model, data, [16]) for _ in range(2))
    assert first == second
    assert model.training


def test_default_contexts_double_up_to_what_fits() -> None:
    assert fitting_contexts(10**6) == (512, 1024, 2048, 4096, 8192, 16384)
    assert fitting_contexts(2048) == (512, 1024)
    assert fitting_contexts(2049) == (512, 1024, 2048)
    with pytest.raises(CorpusError, match=r"at least 513 tokens\. Got 512"):
        fitting_contexts(512)


@pytest.mark.parametrize("contexts", [[7], [0], [16, 24]])
def test_contexts_that_cannot_share_their_bytes_are_named(
    tiny_model: LongNetConfig, contexts: list[int]
) -> None:
    data: Tensor = torch.zeros(100, dtype=torch.uint8)
    with pytest.raises(InputError, match="contexts must be even and divide the longest"):
        evaluate_contexts(LongNetLM(tiny_model), data, contexts)
