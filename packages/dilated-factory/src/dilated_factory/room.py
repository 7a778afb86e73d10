"""Whether something fits into this machine's memory, asked before it is allocated."""

import os

from dilated_factory.errors import InputError


def machine_memory() -> int | None:
    """Bytes of memory that this machine has; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def require_room(what: str, needed: int) -> None:
    """Raise an `InputError` if ``what`` needs more bytes than this machine has.

    Where memory is promised and not given, the system kills a process that takes too much; and
    what is built piece by piece would not end.
    """
    there = machine_memory()
    if there is not None and needed > there:
        raise InputError(
            f"{what} must fit into the memory of this machine, {there / 2**30:,.1f} GiB. "
            f"Got {needed / 2**30:,.0f} GiB."
        )
