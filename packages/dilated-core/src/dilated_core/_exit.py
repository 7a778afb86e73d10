"""The end of a process whose threads hold tensors."""

import atexit
import re
import time
from contextlib import suppress
from pathlib import Path

_SECONDS = 5.0


def let_gloo_rest_at_exit() -> None:
    """Before the interpreter ends, give gloo's threads the time to let go of the last tensors.

    They outlive `destroy_process_group` where anything still holds the group, as the default
    arguments of torch.distributed.nn do that was imported after it was made, by FSDP or torch's
    compiler (torch 2.11 and 2.13). A thread that frees a tensor while the interpreter is finalized
    takes the process down by SIGABRT, after all the work was done.
    """
    atexit.unregister(let_gloo_rest)  # so that it is there once
    atexit.register(let_gloo_rest)


def let_gloo_rest() -> None:
    """Wait until gloo's threads have let go of the last tensors, five seconds at most.

    Before a process group is destroyed: DistributedDataParallel holds the interpreter's lock while
    it waits for the threads of a group that goes with it, and they may need it (torch 2.13).
    """
    threads = [Path(path, "stat") for path in _threads_of_gloo()]
    if threads:
        time.sleep(0.02)  # one that waits for the interpreter's lock seems to rest
    deadline = time.monotonic() + _SECONDS
    while any(map(_runs, threads)) and time.monotonic() < deadline:
        time.sleep(0.005)


def _threads_of_gloo() -> list[Path]:
    """Their folders, where the system has such."""
    found = []
    for thread in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # it has ended
            if "gloo" in (thread / "comm").read_text():
                found.append(thread)
    return found


def _runs(stat: Path) -> bool:
    with suppress(OSError):
        return not re.sub(r".*\) ", "", stat.read_text(), flags=re.DOTALL).startswith("S")
    return False
