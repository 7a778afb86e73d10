"""What ranks run in the tests of the harness itself."""

import threading
import time

import torch
import torch.distributed as dist

from process_ranks import device


def sum_of_ranks(offset: int) -> int:
    """Add up rank + offset over the group."""
    total = torch.tensor([dist.get_rank() + offset], device=device())
    dist.all_reduce(total)
    return int(total)


def fail_on(rank: int) -> int:
    """Raise on one rank."""
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} says no")
    return dist.get_rank()


def sleep_on(rank: int) -> None:
    """Do not come back on one rank."""
    if dist.get_rank() == rank:
        time.sleep(60)


def stay_on(rank: int) -> None:
    """Leave a thread behind that keeps the process of one rank from ending."""

    def stay() -> None:
        time.sleep(60)

    if dist.get_rank() == rank:
        threading.Thread(target=stay).start()
