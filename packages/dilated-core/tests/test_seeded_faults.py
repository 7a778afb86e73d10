"""Faults that peers have, planted one by one: the comparison with the oracle must catch each."""

import math
from dataclasses import replace

import pytest
import torch

from dilated_core import DilatedPattern, _partial, _reference
from dilated_core._partial import Partial
from dilated_core._schedules import schedule as _schedule
from dilated_core._torch import dense as _dense
from dilated_core._torch import engine as _torch_backend
from dilated_testing import Problem, relative_error

PATTERN = DilatedPattern([6, 13], [1, 3], count_padding=False)


def problem(**options):
    defaults = {
        "batch": 2, "length": 29, "key_length": 29, "heads": 4, "kv_heads": 4, "head_dim": 3,
        "is_causal": False, "padding": 0.0, "dropout_p": 0.0, "seed": 7,
    }  # fmt: skip
    pattern = options.pop("pattern", PATTERN)
    return Problem(pattern, **(defaults | options))


def worst_error(case):
    """The largest relative error of the torch backend against an oracle that has no faults."""
    _schedule.schedule.cache_clear()
    expected = CLEAN[case.seed]
    try:
        actual = case.run("torch", case.tensors())
        return max(relative_error(actual[name], expected[name]) for name in expected)
    except (AssertionError, RuntimeError):
        # NaN, another set of infinities, or rows outside the tensor: caught all the same.
        return math.inf
    finally:
        _schedule.schedule.cache_clear()


CASES = {
    "plain": problem(seed=1),
    "causal": problem(seed=2, is_causal=True),
    "decoding": problem(seed=3, is_causal=True, length=11),
    "padding": problem(seed=4, padding=0.4),
    "count_padding": problem(seed=5, pattern=DilatedPattern([6, 13], [1, 3], count_padding=True)),
    "nested": problem(seed=6, pattern=DilatedPattern([4, 8], [1, 2])),
}
CLEAN = {case.seed: case.run("reference", case.tensors()) for case in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_without_a_fault_nothing_is_caught(name):
    assert worst_error(CASES[name]) < 1e-10


def test_detached_mixing_weights_are_caught(monkeypatch):
    """Each branch's own out and lse in its backward: no gradient through the mixing weights."""
    exact = _dense.attend_backward

    def detached(rows, grad_out, grad_lse, q, k, v, total):
        own = _dense.attend(rows, q, k, v)
        share = (own.lse - total.lse).exp().unsqueeze(-1)
        return exact(rows, grad_out * share, grad_lse, q, k, v, own)

    monkeypatch.setattr(_dense, "attend_backward", detached)
    assert worst_error(CASES["plain"]) > 1e-3


def test_offset_by_position_instead_of_position_in_segment_is_caught(monkeypatch):
    """Rate 3 does not divide segments of 13: the two offsets differ from segment to segment."""
    exact = _schedule._segments

    def by_position(w, r, offset, queries, keys, is_causal):
        for q, k, causal in exact(w, r, offset, queries, keys, is_causal):
            shift = -(q.start // w * w) % r if q.start // w else 0
            moved = [replace(x, start=x.start + shift, count=max(0, x.count - 1)) for x in (q, k)]
            yield (*moved, causal) if shift else (q, k, causal)

    monkeypatch.setattr(_schedule, "_segments", by_position)
    assert worst_error(CASES["plain"]) > 1e-3


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_wrong_diagonal_is_caught(monkeypatch, shift):
    exact = _schedule._align

    def shifted(queries, keys, earlier, is_causal):
        return exact(queries, keys, max(0, earlier + shift) if is_causal else earlier, is_causal)

    monkeypatch.setattr(_schedule, "_align", shifted)
    assert worst_error(CASES["decoding"]) > 1e-3


def test_a_causal_mask_left_out_is_caught(monkeypatch):
    exact = _schedule.Task

    monkeypatch.setattr(
        _schedule, "Task", lambda q, k, h, causal, *rest: exact(q, k, h, False, *rest)
    )
    assert worst_error(CASES["causal"]) > 1e-3


def test_padding_left_in_the_denominator_is_caught(monkeypatch):
    exact = _dense.attend

    def padded(rows, q, k, v):
        out, lse = exact(rows, q, k, v)
        masked = rows.key_mask.sum(-1)[:, None, None].expand_as(lse).to(lse.dtype)
        wrong = torch.logaddexp(lse, masked.log())
        return Partial(out * (lse - wrong).exp().nan_to_num().unsqueeze(-1), wrong)

    monkeypatch.setattr(_dense, "attend", padded)
    assert worst_error(CASES["padding"]) > 1e-3


def test_uncounted_zero_keys_are_caught(monkeypatch):
    monkeypatch.setattr(_torch_backend, "add_zero_keys_", lambda total, count: None)
    assert worst_error(CASES["count_padding"]) > 1e-3


def test_duplicates_counted_once_are_caught(monkeypatch):
    exact = _schedule.visit_once

    def once(*args):
        return (replace(task, multiplicity=1) for task in exact(*args))

    monkeypatch.setattr(_schedule, "visit_once", once)
    assert worst_error(CASES["nested"]) > 1e-3


def test_an_lse_in_base_2_is_caught(monkeypatch):
    exact = _dense.attend

    def base_2(*args):
        out, lse = exact(*args)
        return Partial(out, lse / math.log(2))

    monkeypatch.setattr(_dense, "attend", base_2)
    assert worst_error(CASES["plain"]) > 1e-3


def test_a_merge_without_its_guard_is_caught(monkeypatch):
    """Both lse -inf gives NaN unless the merge guards it."""

    def unguarded(total, part):
        lse = torch.logaddexp(total.lse, part.lse)
        total.out.lerp_(part.out, (part.lse - lse).exp().unsqueeze(-1))
        total.lse.copy_(lse)

    monkeypatch.setattr(_torch_backend, "merge_", unguarded)
    case = problem(seed=8, padding=1.0)
    CLEAN[8] = case.run("reference", case.tensors())
    assert worst_error(case) == math.inf


def test_the_oracle_is_not_the_code_it_judges():
    """The planted faults sit in modules that the oracle does not import."""
    for module in (_dense, _schedule, _torch_backend):
        assert module.__name__ not in {
            getattr(value, "__module__", None) for value in vars(_reference).values()
        }
    assert _reference.Partial is _partial.Partial
