"""Schedules show every query the keys of the definition, as often as it says."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dilated_core import DilatedPattern
from dilated_core._schedules.nested import nests, visit_once
from dilated_core._schedules.schedule import schedule
from dilated_testing import nested_patterns, patterns


def shown(tasks, length, key_length, heads):
    """How often the tasks show each key to each query, and the zero keys they add."""
    count = torch.zeros(heads, length, key_length, dtype=torch.int64)
    zero_keys = torch.zeros(heads, length, dtype=torch.int64)
    for task in tasks:
        for group in range(task.queries.groups):
            rows, columns = (
                [runs.start + group * runs.group_step + i * runs.step for i in range(runs.count)]
                for runs in (task.queries, task.keys)
            )
            for j in range(task.heads.count):
                head = task.heads.start + j * task.heads.step
                for i, row in enumerate(rows):
                    zero_keys[head, row] += task.zero_keys
                    seen = columns[: i + 1] if task.is_causal else columns
                    for column in seen:
                        count[head, row, column] += task.multiplicity
    return count, zero_keys


@given(patterns(max_segment=13), st.integers(0, 29), st.integers(0, 29), st.booleans())
def test_tasks_are_the_definition(pattern, length, key_length, is_causal):
    heads = max(5, len(pattern.segment_lengths))
    if is_causal:
        length, key_length = sorted((length, key_length))
    start = key_length - length if is_causal else 0
    tasks = schedule(
        pattern,
        range(start, start + length),
        range(key_length),
        heads,
        heads,
        is_causal,
        key_length,
    )
    count, zero_keys = shown(tasks, length, key_length, heads)
    options = {"is_causal": is_causal, "key_length": key_length}
    assert torch.equal(count, pattern.multiplicity(length, heads, **options))
    if not is_causal:
        assert torch.equal(zero_keys, pattern.zero_keys(length, heads, key_length=key_length))


@given(nested_patterns(least_branches=2), st.integers(1, 41))
def test_a_pair_that_nests_visits_each_key_once(pattern, length):
    pair = pattern.branches[:2]
    assume(nests(pattern, 5, *pair))
    once = [replace(task, multiplicity=1) for task in visit_once(pattern, *pair, length, 5, 5)]
    count, _ = shown(once, length, length, 5)
    both = DilatedPattern(*zip(*pair, strict=True), head_offsets=pattern.head_offsets)
    assert torch.equal(count, both.multiplicity(length, 5).clamp(max=1))


@pytest.mark.parametrize(
    ("pattern", "heads", "expected"),
    [
        (DilatedPattern([8, 16], [1, 2]), 5, True),
        (DilatedPattern([8, 24], [2, 4]), 5, True),
        (DilatedPattern([8, 48], [1, 2]), 5, False),
        (DilatedPattern([8, 20], [1, 2]), 5, False),
        (DilatedPattern([8, 16], [1, 4]), 5, False),
        (DilatedPattern([9, 18], [1, 2]), 5, False),
        (DilatedPattern([8, 16], [1, 2], count_padding=True), 5, False),
        (DilatedPattern([8, 16], [1, 2], head_groups="split"), 5, False),
        (DilatedPattern([8, 16], [2, 4], head_offsets="blocked"), 4, False),
    ],
)
def test_which_pairs_nest(pattern, heads, expected):
    assert nests(pattern, heads, *pattern.branches) == expected


def test_key_heads_follow_their_query_heads():
    """Every task pairs query head h with key head h // group."""
    pattern = DilatedPattern([7, 11], [2, 3])
    for task in schedule(pattern, range(23), range(23), 12, 4, False, 23):
        for i in range(task.heads.count):
            head = task.heads.start + i * task.heads.step
            assert task.heads.kv_start + i * task.heads.kv_step == head // 3


def test_a_long_sequence_needs_few_tasks():
    tasks = schedule(DilatedPattern.longnet(2**20), range(2**20), range(2**20), 12, 12, True, 2**20)
    assert len(tasks) < 1000


@given(patterns(max_segment=13), st.integers(0, 29), st.integers(1, 2), st.booleans())
def test_a_first_task_finds_its_rows_untouched(pattern, length, group, is_causal):
    heads = 2 * max(3, len(pattern.segment_lengths))
    tasks = schedule(
        pattern, range(length), range(length), heads, heads // group, is_causal, length
    )
    queries, keys = set(), set()
    for task in tasks:
        for is_first, runs, start, step, touched in (
            (task.first_queries, task.queries, task.heads.start, task.heads.step, queries),
            (task.first_keys, task.keys, task.heads.kv_start, task.heads.kv_step, keys),
        ):
            rows = {
                (runs.start + g * runs.group_step + i * runs.step, start + h * step)
                for g in range(runs.groups)
                for i in range(runs.count)
                for h in range(task.heads.count)
            }
            assert not is_first or not rows & touched
            touched |= rows


def test_a_first_branch_of_rate_1_comes_first_everywhere():
    for pattern in (DilatedPattern([8, 16], [1, 2]), DilatedPattern([9, 16], [1, 3])):
        for is_causal in (False, True):
            tasks = schedule(pattern, range(29), range(29), 4, 4, is_causal, 29)
            first = [t for t in tasks if t.first_queries]
            assert sum(t.queries.groups * t.queries.count * t.heads.count for t in first) == 29 * 4
