"""Layouts that know how they are made, and so their like for another length."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

if TYPE_CHECKING:
    from dilated_sparse._layout import BlockLayout

P = ParamSpec("P")


class Rule(NamedTuple):
    """How a layout is made for any length.

    Attributes:
        make: gives it.
        is_cut: whether a shorter one is the beginning of a longer one; else each is made anew.
    """

    make: Callable[[int], BlockLayout]
    is_cut: bool = True


def ruled(*, is_cut: bool = True) -> Callable[[Callable[P, BlockLayout]], Callable[P, BlockLayout]]:
    """Have a function whose first argument is the length give its layouts a rule."""

    def decorate(make: Callable[P, BlockLayout]) -> Callable[P, BlockLayout]:
        @wraps(make)
        def made(*args: P.args, **options: P.kwargs) -> BlockLayout:
            again = partial(_again, made, args, options)
            return make(*args, **options).ruled(Rule(again, is_cut))

        return made

    return decorate


def _again(
    make: Callable[..., BlockLayout], args: tuple[Any, ...], options: dict[str, Any], length: int
) -> BlockLayout:
    if args:
        return make(length, *args[1:], **options)
    return make(**{**options, "length": length})
