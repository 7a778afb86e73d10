"""DilatedPattern: its checks, its definition, its closed forms."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dilated_core import DilatedPattern, validate_segment_dilation_match
from dilated_testing import patterns


@pytest.mark.parametrize(
    ("lengths", "rates", "error", "message"),
    [
        ([], [], ValueError, "segment_lengths must not be empty"),
        ([4], [], ValueError, "dilation_rates must not be empty"),
        (
            [4, 8],
            [1],
            ValueError,
            "2 in segment_lengths=\\[4, 8\\] and 1 in dilation_rates=\\[1\\]",
        ),
        ([4, 0], [1, 2], ValueError, "segment_lengths\\[1\\] must be positive. Got 0"),
        ([4, 8], [1, -2], ValueError, "dilation_rates\\[1\\] must be positive. Got -2"),
        ([4, 8.0], [1, 2], TypeError, "segment_lengths\\[1\\] must be an int. Got 8.0"),
        ([True], [1], TypeError, "segment_lengths\\[0\\] must be an int. Got True"),
        ("48", [1], TypeError, "segment_lengths must be a sequence"),
        (4, 1, TypeError, "segment_lengths must be a sequence"),
    ],
)
def test_bad_lists_are_named(lengths, rates, error, message):
    with pytest.raises(error, match=message):
        validate_segment_dilation_match(lengths, rates)
    with pytest.raises(error, match=message):
        DilatedPattern(lengths, rates)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="head_offsets must be one of"):
        DilatedPattern([4], [1], head_offsets="random")
    with pytest.raises(ValueError, match="head_groups must be one of"):
        DilatedPattern([4], [1], head_groups="none")
    with pytest.raises(TypeError, match="count_padding must be a bool"):
        DilatedPattern([4], [1], count_padding=1)
    with pytest.raises(ValueError, match=r"number of branches \(3\).*Got 2"):
        DilatedPattern([4, 8, 16], [1, 2, 4], head_groups="split").branch_heads(2)


def by_the_definition(pattern, length, key_length, heads, is_causal):
    """Section 1 of the definition, one query, key and branch at a time."""
    start = key_length - length if is_causal else 0
    result = torch.zeros(heads, length, key_length, dtype=torch.int64)
    count = len(pattern.segment_lengths)
    for k, (w, r) in enumerate(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)):
        for h in range(heads):
            if pattern.head_groups == "split":
                sizes = [heads // count + (i < heads % count) for i in range(count)]
                if not sum(sizes[:k]) <= h < sum(sizes[: k + 1]):
                    continue
            s = h % r if pattern.head_offsets == "interleaved" else h // -(-heads // r)
            for n in range(length):
                for m in range(key_length):
                    p = n + start
                    kept = p % w % r == s and m % w % r == s and p // w == m // w
                    result[h, n, m] += kept and (m <= p or not is_causal)
    return result


@given(patterns(max_segment=9, max_rate=5), st.integers(0, 11), st.integers(0, 11), st.booleans())
def test_multiplicity_is_the_definition(pattern, length, key_length, is_causal):
    heads = 5
    if is_causal:
        length, key_length = sorted((length, key_length))
    actual = pattern.multiplicity(length, heads, is_causal=is_causal, key_length=key_length)
    assert torch.equal(actual, by_the_definition(pattern, length, key_length, heads, is_causal))


@given(patterns(), st.integers(0, 53), st.booleans())
def test_flops_count_every_visible_pair(pattern, length, is_causal):
    pairs = pattern.multiplicity(length, 7, is_causal=is_causal).sum().item()
    assert pattern.flops(length, 7, 16, is_causal=is_causal) == 4 * 16 * pairs


@given(st.integers(1, 41), st.integers(1, 9), st.integers(1, 7))
def test_zero_keys_fill_each_segment_to_its_slots(length, w, r):
    pattern = DilatedPattern([w], [r], count_padding=True)
    for head in range(3):
        for n in range(length):
            kept = n % w % r == head % r
            real = pattern.multiplicity(length, 3)[head, n].sum()
            expected = -(-min(w, length) // r) - real if kept else 0
            assert pattern.zero_keys(length, 3)[head, n] == expected


def test_longnet_grows_geometrically_until_it_covers():
    pattern = DilatedPattern.longnet(32768)
    assert pattern.segment_lengths == (2048, 4096, 8192, 16384, 32768)
    assert pattern.dilation_rates == (1, 2, 4, 8, 16)
    assert DilatedPattern.longnet(100).segment_lengths == (2048,)
    assert DilatedPattern.longnet(100, segment_length=7, growth=3).segment_lengths == (
        7,
        21,
        63,
        189,
    )
    with pytest.raises(ValueError, match="growth must be at least 2"):
        DilatedPattern.longnet(100, growth=1)


@given(patterns())
def test_patterns_are_values(pattern):
    twins = [
        DilatedPattern.from_dict(pattern.to_dict()),
        pickle.loads(pickle.dumps(pattern)),
        copy.deepcopy(pattern),
        eval(repr(pattern)),
    ]
    for twin in twins:
        assert twin == pattern
        assert hash(twin) == hash(pattern)


def test_patterns_are_immutable_and_unequal_when_different():
    pattern = DilatedPattern([4, 8], [1, 2])
    with pytest.raises(AttributeError):
        pattern.segment_lengths = (1,)
    assert pattern != DilatedPattern([4, 8], [1, 3])
    assert pattern != DilatedPattern([4, 8], [1, 2], count_padding=True)


def test_from_dict_names_wrong_keys():
    with pytest.raises(ValueError, match="Got \\['rates'\\]"):
        DilatedPattern.from_dict({"segment_lengths": [4], "dilation_rates": [1], "rates": [1]})
    with pytest.raises(ValueError, match="Missing \\['dilation_rates'\\]"):
        DilatedPattern.from_dict({"segment_lengths": [4]})
