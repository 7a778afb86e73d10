"""Batches: seed and step alone decide them."""

import pytest
import torch

from dilated_factory import CorpusError, LongNetConfig, TrainConfig
from dilated_factory.training.batches import (
    batch_offsets,
    gather_windows,
    offsets_of,
    step_seed,
    windows_seen,
)


def test_offsets_depend_on_seed_and_step_alone() -> None:
    def draw(seed: int, step: int) -> list[int]:
        return batch_offsets(997, context=31, batch_size=5, seed=seed, step=step).tolist()

    assert draw(3, 7) == draw(3, 7)
    assert draw(3, 7) != draw(3, 8)
    assert draw(3, 7) != draw(4, 7)
    state = torch.random.get_rng_state()
    draw(3, 7)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_purposes_have_seeds_of_their_own() -> None:
    assert step_seed(1, 2, "batch") != step_seed(1, 2, "dropout")


def test_every_window_fits_and_every_start_occurs() -> None:
    starts = {
        start
        for step in range(200)
        for start in batch_offsets(11, context=7, batch_size=2, seed=0, step=step).tolist()
    }
    assert starts == {0, 1, 2, 3}


def test_a_corpus_shorter_than_a_window_is_an_error() -> None:
    with pytest.raises(CorpusError, match=r"context \+ 1 = 32 tokens. Got 31"):
        batch_offsets(31, context=31, batch_size=1, seed=0, step=0)


def test_windows_are_the_bytes_at_the_offsets() -> None:
    data = torch.arange(100, dtype=torch.uint8)
    windows = gather_windows(data, torch.tensor([4, 90]), 5)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [[4, 5, 6, 7, 8], [90, 91, 92, 93, 94]]


def test_windows_seen_are_the_windows_of_all_steps_or_else_the_corpus() -> None:
    data = torch.randint(256, (1009,), dtype=torch.uint8)
    shape = LongNetConfig(context=13)
    config = TrainConfig(model=shape, steps=30, batch_size=3, seed=5)
    seen = windows_seen(data, config, 4)
    expected = [
        gather_windows(data, batch_offsets(1009, context=13, batch_size=3, seed=5, step=step), 14)
        for step in range(4)
    ]
    assert torch.equal(torch.stack(seen).to(torch.int64), torch.cat(expected))
    (everything,) = windows_seen(data, config, 26)
    assert torch.equal(everything, data)


def test_windows_seen_of_a_run_that_begins_with_a_short_context_are_of_both_lengths() -> None:
    data = torch.arange(1009)
    shape = LongNetConfig(context=12)
    config = TrainConfig(
        model=shape, steps=4, batch_size=2, seed=5, short_context=4, short_share=0.5
    )
    seen = windows_seen(data, config, 3)
    assert [len(window) for window in seen] == [5] * 12 + [13] * 2
    for step, (many, context) in enumerate([(6, 4), (6, 4), (2, 12), (2, 12)]):
        offsets, size = offsets_of(config, 1009, step)
        assert size == context
        expected = batch_offsets(1009, context=context, batch_size=many, seed=5, step=step)
        assert torch.equal(offsets, expected)
