"""What packages keep between calls: all of it bounded, and emptied at one place."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper

Result = TypeVar("Result")
Clear = TypeVar("Clear", bound=Callable[[], object])

_clearing: list[Callable[[], object]] = []


def remembered(
    size: int,
) -> Callable[[Callable[..., Result]], _lru_cache_wrapper[Result]]:
    """Like `functools.lru_cache(maxsize=size)`, but `clear_caches` empties the cache too."""

    def decorate(function: Callable[..., Result]) -> _lru_cache_wrapper[Result]:
        cached = lru_cache(maxsize=size)(function)
        _clearing.append(cached.cache_clear)
        return cached

    return decorate


def on_clear(clear: Clear) -> Clear:
    """Let `clear_caches` call a function that empties another cache; a decorator, too."""
    _clearing.append(clear)
    return clear


def clear_caches() -> None:
    """Forget what this process keeps between calls: schedules, plans and tables, on all devices.

    For all packages that are imported. Results do not change; the next call of each kind makes
    anew what it needs. What a captured CUDA graph reads stays. The memory of tables on a GPU goes
    back to torch's allocator. Not for use while another thread attends.

    Examples:
        >>> clear_caches()
    """
    for clear in _clearing:
        clear()
