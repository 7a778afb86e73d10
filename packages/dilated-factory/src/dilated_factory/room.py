"""This machine's room: what fits into memory, asked before; freed memory; shared cores."""

import ctypes
import os
import sys

from dilated_factory.errors import InputError

# Numbers of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


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


def keep_freed_memory() -> bool:
    """Have this process keep what it frees for what it allocates next; whether it can, with glibc.

    Else the pages of large tensors go back to the system at each step, and come anew, cleared.
    Only a process of our own should be told: it holds to its end the most that it ever needed.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Up to 32 MiB, the most that glibc lets be taken from its heap, which is not trimmed.
    return mallopt is not None and bool(
        mallopt(_M_MMAP_THRESHOLD, 2**25) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    )


def wait_asleep_soon() -> None:
    """Have the threads of GNU's OpenMP wait awake for a moment only, unless it is told otherwise.

    Else, where others use the cores too, each operator on the CPU may wait for a thread that has no
    core, and keep it from one. Only before torch is imported has it an effect.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "300"
