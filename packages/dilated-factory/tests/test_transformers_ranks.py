"""Hugging Face's models on parts of a sequence: the whole sequence's logits, loss and gradients."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import pytest
import torch

from dilated_core import DilatedPattern
from dilated_factory import register_with_transformers
from process_ranks import Ranks

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("dilated_ring", reason="dilated-ring is not installed")

import transformers_programs as programs  # it needs both

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("factory_distributed")]


@pytest.fixture(scope="module")
def get_ranks() -> Iterator[Callable[[int], Ranks]]:
    """One pool of processes for each world size."""
    with ExitStack() as stack:
        yield cache(lambda world_size: stack.enter_context(Ranks(world_size)))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [24, 29])
@pytest.mark.parametrize("padded", [False, True])
def test_a_model_on_parts_is_the_model_on_the_whole(
    get_ranks: Callable[[int], Ranks], world_size: int, length: int, padded: bool
) -> None:
    """Also where the length does not divide, rows are padded, and a part has no labels."""
    tokens = torch.randint(23, (2, length), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[:, :11] = -100
    mask = None
    if padded:
        mask = torch.ones_like(tokens)
        mask[1, 17:] = 0
        labels[1, 17:] = -100
    whole = {"input_ids": tokens, "labels": labels, "attention_mask": mask, "use_cache": False}
    loss, logits, grads = programs.results(programs.model(shared=False), whole)
    found = get_ranks(world_size).run(programs.train, tokens, labels, mask)
    assert sum(part for part, _, _ in found) / world_size == pytest.approx(loss, rel=1e-5)
    joined = torch.cat([part for _, part, _ in found], 1)[:, :length]
    real = torch.ones_like(tokens) if mask is None else mask
    torch.testing.assert_close(joined[real == 1], logits[real == 1], rtol=1e-9, atol=1e-9)
    for _, _, averaged in found:
        for one, other in zip(averaged, grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # their loss is float32


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("no positions", "position_ids must be those of this rank, 8 to 15"),
        ("padding on the left", "attention_mask must not ignore the first token"),
        ("a cache", "the cache must be empty over ranks"),
        ("another name", "register the pattern with group="),
    ],
)
def test_a_part_that_is_taken_for_something_else_is_an_error(
    get_ranks: Callable[[int], Ranks], world_size: int, what: str, says: str
) -> None:
    """On every rank, but where nothing shows on the first."""
    outcomes = get_ranks(world_size).outcomes(programs.misuse, what)
    for rank, outcome in enumerate(outcomes):
        if what == "another name" and rank == 0:
            assert outcome.error is None, outcome.traceback
        else:
            assert isinstance(outcome.error, ValueError), outcome.traceback
            assert says in str(outcome.error)
        assert outcome.seconds < 25  # of 30 that the group waits


def test_a_group_needs_the_package_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dilated_factory.interop.find_spec", lambda name: None if name == "dilated_ring" else name
    )
    group: object = object()
    with pytest.raises(ImportError, match="dilated-ring"):
        register_with_transformers(DilatedPattern([4], [1]), "other", group=group)  # type: ignore[arg-type]  # not reached
