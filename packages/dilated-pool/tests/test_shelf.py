"""Size classes waste at most an eighth."""

from hypothesis import given
from hypothesis import strategies as st

from dilated_pool._shelf import class_size

GRANULARITIES = st.sampled_from([64, 512, 4096])


@given(st.integers(1, 1 << 45), GRANULARITIES)
def test_a_class_holds_the_request_and_wastes_at_most_an_eighth(nbytes, granularity):
    size = class_size(nbytes, granularity)
    assert size >= nbytes
    assert size % granularity == 0
    # A granule is more than an eighth only of requests below eight granules.
    assert size - nbytes <= max(nbytes / 8, granularity - 1)


def test_nothing_is_served_like_one_byte():
    assert class_size(0, 64) == class_size(1, 64) == 64


@given(st.integers(0, 1 << 45), GRANULARITIES)
def test_a_class_is_its_own_class(nbytes, granularity):
    size = class_size(nbytes, granularity)
    assert class_size(size, granularity) == size


@given(st.integers(0, 1 << 45), st.integers(0, 1 << 45), GRANULARITIES)
def test_classes_grow_with_the_request(first, second, granularity):
    low, high = sorted([first, second])
    assert class_size(low, granularity) <= class_size(high, granularity)


def test_there_are_at_most_eight_classes_for_each_power_of_two():
    for power in range(6, 20):
        sizes = {class_size(n, 64) for n in range((1 << power) + 1, (2 << power) + 1)}
        assert len(sizes) <= 8
