"""Work beside the training: the next batch, and the last checkpoint.

A thread in which torch computes has helpers of its own. Where these and the training's are more
than the CPU's cores, GNU's OpenMP no longer waits awake for any, and each operator on the CPU takes
longer, for as long as the thread lives.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, Self, TypeVar

Result = TypeVar("Result")


class Ahead(Generic[Result]):
    """Calls of a function with rising numbers, each made by a thread before it is asked for.

    Or, if not ``beside``, when it is asked for: on the CPU, which has nothing else to wait for.
    """

    def __init__(self, *, beside: bool = True) -> None:
        self._beside = beside
        self._thread: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[Result]] | None = None

    def get(self, make: Callable[[int], Result], number: int) -> Result:
        """What a function makes of a number; the thread goes on with the next one."""
        if not self._beside:
            return make(number)
        if self._next is not None and self._next[0] == number:
            result = self._next[1].result()
        else:
            result = make(number)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next = number + 1, self._thread.submit(make, number + 1)
        return result

    def close(self) -> None:
        """End the thread; the next call begins another."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread = self._next = None


class Beside:
    """One task at a time on a thread; its error is raised where the next is begun, or at the end.

    A context that is left by an error does not raise that of the task as well.
    """

    def __init__(self) -> None:
        self._task: Future[object] | None = None

    def begin(self, task: Callable[[], object]) -> None:
        """Begin a task, once the one before it is done."""
        self.wait()
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._task = thread.submit(task)
        thread.shutdown(wait=False)  # it ends with its task

    def check(self) -> None:
        """Raise the error of the task if it has failed by now."""
        if self._task is not None and self._task.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the task is done; raise its error."""
        task, self._task = self._task, None
        if task is not None:
            task.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._task is not None:
            wait([self._task])
        if error is None:
            self.wait()
