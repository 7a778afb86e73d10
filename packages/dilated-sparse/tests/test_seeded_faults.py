"""Faults planted one by one: the comparison with the oracle must catch each."""

import math

import pytest
import torch

from dilated_sparse import BlockLayout, _masks, _schedule, _torch_backend, layouts
from dilated_testing import relative_error
from sparse_problems import NAMES, Problem

MIXED = layouts.longformer(53, 9, 3, block_size=8) | layouts.random_blocks(
    53, 1, heads=3, block_size=8
)
CASES = {
    "plain": Problem(layouts.longformer(53, 9, 3, block_size=8)),
    "causal": Problem(MIXED, is_causal=True),
    "padding": Problem(MIXED, padding=0.4),
    "dropout": Problem(MIXED, dropout_p=0.3),
}
CLEAN = {name: case.run("reference", case.tensors()) for name, case in CASES.items()}


def worst_error(name):
    """The largest relative error of the torch backend."""
    _schedule.schedule.cache_clear()
    case = CASES[name]
    try:
        actual = case.run("torch", case.tensors())
        return max(relative_error(actual[x], CLEAN[name][x]) for x in NAMES)
    except (AssertionError, RuntimeError):
        # NaN or another set of infinities: caught all the same.
        return math.inf
    finally:
        _schedule.schedule.cache_clear()


@pytest.mark.parametrize("name", CASES)
def test_without_a_fault_nothing_is_caught(name):
    assert worst_error(name) < 1e-10


def test_masks_taken_for_full_are_caught(monkeypatch):
    monkeypatch.setattr(_masks, "unpack", lambda packed: torch.ones(len(packed), 8, 8).bool())
    assert worst_error("plain") > 1e-3


def test_a_forgotten_causal_mask_is_caught(monkeypatch):
    monkeypatch.setattr(BlockLayout, "causal", lambda layout: layout)
    assert worst_error("causal") > 1e-3


def test_an_overwritten_partial_is_caught(monkeypatch):
    monkeypatch.setattr(_schedule, "MAX_SCORES", 256)
    assert worst_error("plain") < 1e-10
    monkeypatch.setattr(_torch_backend, "merge_", lambda total, part: total.out.copy_(part.out))
    assert worst_error("plain") > 1e-3


def test_forgotten_padding_is_caught(monkeypatch):
    hide = _torch_backend.Place.hide

    def careless(place, scores):
        bare = place.call.scores._replace(key_padding_mask=None)
        hide(place._replace(call=place.call._replace(scores=bare)), scores)

    monkeypatch.setattr(_torch_backend.Place, "hide", careless)
    assert worst_error("padding") > 1e-3


def test_dropout_by_place_instead_of_position_is_caught(monkeypatch):
    keep = _torch_backend.keep_mask
    monkeypatch.setattr(
        _torch_backend,
        "keep_mask",
        lambda seed, p, batch, head, query, key: keep(
            seed, p, batch, head, query, torch.arange(len(key))
        ),
    )
    assert worst_error("dropout") > 1e-3


def test_gradients_against_the_own_lse_of_a_tile_are_caught(monkeypatch):
    """What a merge without the gradient of its weights amounts to."""
    backward = _torch_backend._accumulate

    def alone(place, query, grad_out, delta, shift, *rest):
        backward(place, query, grad_out, delta * 0, shift, *rest)

    monkeypatch.setattr(_torch_backend, "_accumulate", alone)
    assert worst_error("plain") > 1e-3
