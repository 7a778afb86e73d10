"""What turns a fault on any rank into a RingError on every rank, in bounded time.

A rank that fails leaves a note in the store of the group and raises; it starts no collective, for
the others may be in another one. A rank that waits looks for such a note once a second, so it need
not wait for the timeout of the group. Where nobody left a note (a process was killed, or hangs),
the ranks that wait say so in the store, and the ones that do not are at fault.

The store is asked from a thread of its own: its server may be in the process that hangs.
"""

import json
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NoReturn, Protocol, Self, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import _get_process_group_store

from dilated_core.extending import let_gloo_rest_at_exit
from dilated_ring._errors import RankMismatchError, RemoteError, RingError

T = TypeVar("T")
_LOST = "lost a connection"

LOOK_EVERY = 1.0  # seconds of waiting between two looks at the store
# Seconds for the others to tell that they, too, lost a connection; and for NCCL to abort.
GRACE = 5.0
PATIENCE = 0.9  # share of the group's timeout: torch's own watchdog ends the process after it


class Work(Protocol):
    """A collective in flight, as torch.distributed returns it."""

    def wait(self, timeout: timedelta = ...) -> bool:
        """Wait for it."""
        ...

    def is_completed(self) -> bool:
        """Whether it is done or failed."""
        ...


@dataclass(frozen=True)
class Note:
    """What a rank tells the others about a fault: whose, at which step, and what it was."""

    ranks: tuple[int, ...]
    step: str
    what: str
    details: str = ""

    def error(self) -> RingError:
        """The exception that says so."""
        return RingError(f"{self.what} (step {self.step})", ranks=self.ranks, step=self.step)


class Board:
    """Short texts of the ranks of a group, in its store; an unreachable store holds nothing."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._store = _get_process_group_store(group)

    def write(self, name: str, text: str) -> None:
        """Leave a text under a name."""
        _within(GRACE / 2, lambda: self._store.set(f"dilated_ring/{name}", text))

    def read(self, names: Sequence[str]) -> list[str]:
        """The texts under the names, "" where there is none."""
        found = _within(GRACE / 2, lambda: [self._get(f"dilated_ring/{name}") for name in names])
        return found or [""] * len(names)

    def _get(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""


class Line:
    """What this process knows about a group: its ranks, timeout and board, and whether it broke."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.ranks = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank()
        self.board = Board(group)
        self.calls = 0
        self.agreed = 0  # how often the ranks have found their arguments alike
        self.refused = False  # whether the note on the board is about arguments of this rank
        self.broken: RingError | None = None
        self.launched: set[Hashable] = set()  # kinds of calls whose kernels are loaded

    def fault(self) -> Note | None:
        """The note that another rank left."""
        (text,) = self.board.read(["fault"])
        if not text:
            return None
        fields = json.loads(text)
        return Note(**fields | {"ranks": tuple(fields["ranks"])})

    def report(self, note: Note) -> None:
        """Leave a note for the others; the first one stays."""
        if self.fault() is None:
            self.board.write("fault", json.dumps(asdict(note)))

    def say(self, where: str) -> None:
        """Tell where this rank stands."""
        self.board.write(f"rank/{self.rank}", where)

    def standings(self) -> dict[int, str]:
        """Where each rank said that it stands; "" if it said nothing."""
        texts = self.board.read([f"rank/{rank}" for rank in self.ranks])
        return dict(zip(self.ranks, texts, strict=True))


_LINES: WeakKeyDictionary[dist.ProcessGroup, Line] = WeakKeyDictionary()


def line_of(group: dist.ProcessGroup) -> Line:
    """What this process knows about a group."""
    if group not in _LINES:
        let_gloo_rest_at_exit()
        _LINES[group] = Line(group)
    return _LINES[group]


class Call:
    """One forward or backward on a group: `with Call(group, device, "forward") as call: ...`.

    `parts` are groups of some of its ranks whose collectives the call starts as well.

    Set `step` to what is being done, and wait for collectives with `wait` alone. Any exception
    inside leaves as a RingError that names rank and step, on this rank and on those that wait for
    it. What all ranks raise together passes and leaves the group usable: a RankMismatchError, and
    the exception in `refused`.

    Raises:
        RingError: on entering, if an earlier call broke the group.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        name: str,
        parts: Sequence[dist.ProcessGroup] = (),
    ) -> None:
        self.group = group
        self.parts = parts
        self.device = device
        self.name = name
        self.step = "start"
        self.line = line_of(group)
        self.refused: Exception | None = None

    @property
    def where(self) -> str:
        """The step, with the name of the call."""
        return f"{self.name}: {self.step}"

    def __enter__(self) -> Self:
        line = self.line
        if line.broken is not None:
            raise RingError(
                f"the process group cannot be used after an earlier fault: {line.broken}",
                ranks=line.broken.ranks,
                step=line.broken.step,
            ) from line.broken
        if line.refused:
            line.board.write("fault", "")
            line.refused = False
        line.calls += 1
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or error is self.refused or isinstance(error, RankMismatchError):
            return
        line = self.line
        # What the line keeps is never raised: a traceback would hold the group.
        if isinstance(error, RingError):
            line.broken = RingError(str(error), ranks=error.ranks, step=error.step)
            return
        note = self._note_of(error)
        line.report(note)
        line.broken = note.error()
        self._abort()
        if isinstance(error, Exception):
            raise note.error() from error

    def refuse(self, error: Exception) -> NoReturn:
        """Raise an error about the arguments of this rank as it is; the group remains usable.

        If the others were called alike, they refuse too; if not, they find the note.
        """
        self.refused = error
        self.line.refused = True
        self.line.report(self._note_of(error))
        raise error

    def wait(self, work: Work) -> None:
        """Wait for a collective; on CUDA also make the current stream wait for it.

        Raises:
            RingError: another rank failed, died or hangs.
        """
        started = time.monotonic()
        timeout = self._timeout - self._aborting
        patience = PATIENCE * timeout
        said = False
        look, doubt = LOOK_EVERY, 2 * LOOK_EVERY
        while not self._done(work, min(look, patience) - (time.monotonic() - started)):
            waited = time.monotonic() - started
            self._raise_noted()
            if not said:
                self.line.say(self._where_now)
                said = True
            if waited >= patience:
                grace = min(GRACE, (timeout - waited) / 2)
                self._blame_silent(grace, TimeoutError(f"waited {waited:.1f} s"))
            if waited >= doubt:
                self._require_same_step(work)
                doubt *= 2
            look = waited + LOOK_EVERY
        if said:
            self.line.say("")

    def _note_of(self, error: BaseException) -> Note:
        what = f"rank {self.line.rank} failed: {type(error).__name__}: {error}"
        details = "".join(traceback.format_exception(error))
        return Note((self.line.rank,), self.where, what, details)

    @property
    def _where_now(self) -> str:
        return f"{self.where} (call {self.line.calls})"

    def _done(self, work: Work, seconds: float) -> bool:
        seconds = max(seconds, 1e-3)
        if self.device.type == "cuda":
            return _done_on_cuda(work, seconds)
        try:
            work.wait(timedelta(seconds=seconds))
        except RuntimeError:
            if not work.is_completed():
                return False  # only the time was up
            self._finish(work)
        return True

    def _finish(self, work: Work) -> None:
        """End a wait for a collective that is over: done just after the time was up, or failed."""
        try:
            work.wait()
        except RuntimeError as error:
            self.line.say(_LOST)
            self._blame_silent(GRACE, error, said=_LOST)

    def _raise_noted(self) -> None:
        note = self.line.fault()
        if note is not None:
            self._abort()
            raise note.error() from RemoteError(note.details or note.what)

    def _blame_silent(self, grace: float, cause: Exception, *, said: str = "") -> NoReturn:
        """Give up; at fault are the ranks that, after a grace, have not said that, or anything."""
        end = time.monotonic() + grace
        while True:
            self._raise_noted()
            standings = self.line.standings()
            absent = [rank for rank, text in standings.items() if not text or said not in text]
            if self.line.rank in absent:
                self._give_up((), "a rank is gone, with the store of the process group", cause)
            if len(absent) <= 1:
                break
            if time.monotonic() > end:
                absent = [rank for rank in absent if not standings[rank]] or absent
                break
            time.sleep(0.1)
        blamed = f"rank {', '.join(map(str, absent))} died or hangs"
        self._give_up(absent, blamed if absent else "the connections broke", cause)

    def _require_same_step(self, work: Work) -> None:
        """Raise if all ranks wait, for different things: that would never end."""
        standings = self.line.standings()
        if all(standings.values()) and len(set(standings.values())) > 1:
            time.sleep(LOOK_EVERY)  # one of them may be about to go on
            if self.line.standings() == standings and not work.is_completed():
                where = "; ".join(f"rank {rank} at {text}" for rank, text in standings.items())
                self._give_up((), f"the ranks wait for each other: {where}", TimeoutError(where))

    def _give_up(self, ranks: Sequence[int], what: str, cause: Exception) -> NoReturn:
        note = Note(tuple(ranks), self.where, f"{what}: {cause}")
        self.line.report(note)
        self._abort()
        raise note.error() from cause

    def _abort(self) -> None:
        """End the kernels of NCCL that wait forever; gloo's calls end by themselves.

        NCCL may wait until all ranks of a host abort, and one of them may be gone.
        """
        if self.device.type != "cuda":
            return
        aborts = [_start(group._get_backend(self.device).abort) for group in self._groups]
        end = time.monotonic() + self._aborting
        for abort in aborts:
            abort.join(max(0.0, end - time.monotonic()))

    @property
    def _timeout(self) -> float:
        """Seconds after which a collective of the call gives up."""
        return min(timeout_of(group, self.device) for group in self._groups)

    @property
    def _aborting(self) -> float:
        """Seconds of the timeout that are kept for `_abort`."""
        return min(GRACE, self._timeout / 4) if self.device.type == "cuda" else 0.0

    @property
    def _groups(self) -> list[dist.ProcessGroup]:
        return [self.group, *self.parts]


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> float:
    """Seconds after which a collective of the group gives up."""
    options = group._get_backend(device).options
    # torch's fake process group, for runs without hardware, has no options.
    timeout: timedelta = default_pg_timeout if options is None else options._timeout
    return timeout.total_seconds()


def _done_on_cuda(work: Work, seconds: float) -> bool:
    """Let the host wait: to order streams would not tell whether the others are alive."""
    if not torch.cuda.is_current_stream_capturing():
        end = time.monotonic() + seconds
        pause = 20e-6
        while not work.is_completed():
            if time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 1e-4)  # work on what arrives is launched only after it
    work.wait()
    return True


def _within(seconds: float, function: Callable[[], T]) -> T | None:
    """The result of a function, or None if it fails or is not done in time."""
    results: list[T] = []
    _start(lambda: results.append(function())).join(seconds)
    return results[0] if results else None


def _start(function: Callable[[], object]) -> threading.Thread:
    """Call a function in a thread that does not keep the process alive; what it raises is lost."""

    def call() -> None:
        with suppress(Exception):
            function()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread
