"""Real processes that form a process group and run functions together, with a deadline.

A function is sent by name, so it must be importable: put it at the top level of a module in this
folder. Its arguments and results are pickled.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import pytest
import torch
import torch.distributed as dist

Pipe: TypeAlias = "Connection[Any, Any]"

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
# Seconds in which all ranks must be ready for a first task; a busy machine sets CUDA up slowly.
START_WITHIN = {"cpu": 60.0, "cuda": 120.0}
# Seconds in which a rank must end after its last task; CUDA is torn down slowly, too.
LEAVE_WITHIN = {"cpu": 5.0, "cuda": 20.0}
# Imported once, in the server from which all ranks fork: importing torch takes seconds.
PRELOADED = [
    *("torch", "torch._dynamo", "torch.distributed", "hypothesis", "pytest"),
    *("dilated_core", "dilated_ring", "dilated_factory.training.loop"),
]


class World(NamedTuple):
    """How many ranks there are, and where they compute: "cpu" (gloo) or "cuda" (NCCL)."""

    size: int
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.size}-{self.device}"


def worlds(*sizes: int) -> list[Any]:
    """Parameters for `pytest.mark.parametrize("world", ...)`; a world of 2 comes also with NCCL.

    The group keeps all tests of a world in one xdist worker, so that only this one starts it.
    """
    found = [World(size) for size in sizes] + [World(2, "cuda")] * (2 in sizes)
    return [pytest.param(world, id=str(world), marks=_marks(world)) for world in found]


def _marks(world: World) -> list[pytest.MarkDecorator]:
    place = pytest.mark.multi_gpu if world.device == "cuda" else pytest.mark.distributed
    return [place, pytest.mark.xdist_group(f"world-{world}")]


@dataclass(frozen=True)
class Outcome:
    """What became of a function on one rank: a value, an error, or neither if it died or hung."""

    value: Any = None
    error: BaseException | None = None
    traceback: str = ""
    seconds: float = float("inf")
    finished: bool = False


class Ranks:
    """`world.size` processes with a default process group, started on first use.

    Args:
        world: how many ranks, and where.
        group_timeout: seconds after which a collective gives up.
    """

    def __init__(self, world: World | int, *, group_timeout: float = 30.0) -> None:
        self.world = world if isinstance(world, World) else World(world)
        self.group_timeout = group_timeout
        self.hung: dict[int, str] = {}  # where the ranks stood that `close` had to kill
        self.processes: list[Any] = []
        self._pipes: list[Pipe] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0
    ) -> list[Any]:
        """Call the function on every rank at once; return the values by rank.

        Fails with the traceback of each rank if any raised, died, or was not done in time; the
        ranks then start anew at the next call.
        """
        outcomes = self.outcomes(function, *arguments, timeout=timeout)
        if not all(outcome.finished and outcome.error is None for outcome in outcomes):
            self.close()
            reports = (f"rank {rank}: {o.traceback or 'fine'}" for rank, o in enumerate(outcomes))
            pytest.fail("\n".join(reports), pytrace=False)
        return [outcome.value for outcome in outcomes]

    def outcomes(
        self, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0
    ) -> list[Outcome]:
        """Call the function on every rank at once; tell what became of it, by rank.

        The time runs from when all ranks are ready.

        After anything but a value on every rank the group may be unusable: call `close`.
        """
        if not self.processes:
            self._start()
        task = pickle.dumps((function, arguments))
        for pipe in self._pipes:
            # A rank that died earlier cannot be told; it is reported below.
            try:
                pipe.send_bytes(task)
            except BrokenPipeError:
                continue
        outcomes: dict[int, Outcome] = {}
        deadline = time.monotonic() + timeout
        while len(outcomes) < self.world.size:
            waiting = [p for rank, p in enumerate(self._pipes) if rank not in outcomes]
            ready = cast(list[Pipe], wait(waiting, max(0.0, deadline - time.monotonic())))
            if not ready:
                break
            for pipe in ready:
                outcomes[self._pipes.index(pipe)] = self._receive(pipe)
        missing = set(range(self.world.size)) - set(outcomes)
        outcomes.update(self._stuck(missing, timeout))
        return [outcomes[rank] for rank in range(self.world.size)]

    def close(self) -> list[int]:
        """End all processes: politely, then not. Return their exit codes, by rank.

        `hung` then tells where those stood that would not leave.
        """
        for pipe in self._pipes:
            pipe.close()  # the rank sees the end of its tasks and leaves
        deadline = time.monotonic() + LEAVE_WITHIN[self.world.device]
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        alive = (rank for rank, process in enumerate(self.processes) if process.is_alive())
        self.hung |= self._end(alive)
        for process in self.processes:
            process.join()
        codes = [process.exitcode for process in self.processes]
        self.processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        return codes

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.hung = {}
        for rank in range(self.world.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, self.world, rank, self._folder.name, self.group_timeout),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)
        self.run(os.getpid, timeout=START_WITHIN[self.world.device])

    def _receive(self, pipe: Pipe) -> Outcome:
        try:
            outcome = pickle.loads(pipe.recv_bytes())  # noqa: S301 - from our own child
        except (EOFError, ConnectionResetError):
            process = self.processes[self._pipes.index(pipe)]
            process.join(5)
            return Outcome(traceback=f"died with exit code {process.exitcode}")
        assert isinstance(outcome, Outcome)
        return outcome

    def _stuck(self, ranks: Iterable[int], timeout: float) -> dict[int, Outcome]:
        """End the ranks that are not done; tell where they stood."""
        return {
            rank: Outcome(traceback=f"not done after {timeout} s, it stands at\n{stack}")
            for rank, stack in self._end(ranks).items()
        }

    def _end(self, ranks: Iterable[int]) -> dict[int, str]:
        """Ask ranks where they stand, then kill them."""
        if not (asked := list(ranks)):
            return {}
        assert self._folder is not None
        for rank in asked:
            with suppress(ProcessLookupError):  # it may end just now
                os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(1.0)  # a handler in C writes its stack within microseconds of being scheduled
        for rank in asked:
            self.processes[rank].kill()
        stacks = {rank: Path(self._folder.name, f"stack-{rank}").read_text() for rank in asked}
        return {rank: stack or "no Python code: it is exiting" for rank, stack in stacks.items()}


GetRanks = Callable[[World | int], Ranks]


def _serve(pipe: Pipe, world: World, rank: int, folder: str, timeout: float) -> None:
    """The life of one rank: form the group, then run what comes until the pipe closes."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # Never closed: it is written when the process does not end.
    stack = Path(folder, f"stack-{rank}").open("w")  # noqa: SIM115  # see above
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    device = None
    if world.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        BACKENDS[world.device],
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout),
        device_id=device,
    )
    if device is not None:
        _use_collectives(device)
    while True:
        try:
            task = pipe.recv_bytes()
        except EOFError:
            break
        pipe.send_bytes(_outcome(task))
    # Not destroyed: after a fault the others may be gone, and the process ends anyway.


def _use_collectives(device: torch.device) -> None:
    """Use each collective once: NCCL loads kernels and connects ranks only then, in seconds."""
    numbers = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    dist.broadcast(numbers, 0)
    dist.all_gather([torch.empty_like(numbers) for _ in range(len(numbers))], numbers)
    dist.all_to_all_single(torch.empty_like(numbers), numbers)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    numbers.tolist()  # wait: all ranks are then ready together


def _outcome(task: bytes) -> bytes:
    started = time.monotonic()
    try:
        function, arguments = pickle.loads(task)  # noqa: S301 - from our own parent
        value, error, trace = function(*arguments), None, ""
    except Exception as caught:
        value, error, trace = None, caught, traceback.format_exc()
    seconds = time.monotonic() - started
    try:
        return pickle.dumps(Outcome(value, error, trace, seconds, finished=True))
    except Exception as unpicklable:
        trace += f"\nits result cannot be pickled: {unpicklable!r}"
        return pickle.dumps(Outcome(None, RuntimeError(trace), trace, seconds, finished=True))


def device() -> torch.device:
    """Where this rank computes, to be asked inside a function that ranks run."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
