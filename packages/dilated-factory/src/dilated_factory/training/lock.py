"""A lock on a folder that ends with the process that holds it, however that ends."""

import os
import socket
import sys
import weakref
from contextlib import suppress
from pathlib import Path

from dilated_factory.configs.files import read_regular
from dilated_factory.errors import InputError


class FolderLock:
    """The right to write in a folder, of one process until `release`.

    The kernel keeps the lock and drops it when the process dies, so none is ever stale. The file
    stays, and says who holds or held it: were it removed, two processes could lock two files.

    Raises:
        BlockingIOError: another process, or another lock in this one, has it.
        OSError: the file system has no locks.
    """

    def __init__(self, folder: Path) -> None:
        # A link that somebody put there is not followed: what it points at would be emptied.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(_file(folder), flags, 0o666)
        try:
            _lock(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        self._close = weakref.finalize(self, os.close, descriptor)
        with suppress(OSError):  # on a full disk the lock holds without a name
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())

    def release(self) -> None:
        """Let others lock the folder; more than once does no harm."""
        self._close()


def holder(folder: Path) -> str:
    """Which process holds, or was the last to hold, the lock of a folder."""
    with suppress(OSError, InputError):
        return read_regular(_file(folder)).decode("utf-8", "replace") or "another process"
    return "another process"


def _file(folder: Path) -> Path:
    return folder / "lock"


if sys.platform == "win32":
    import msvcrt

    _LOCKED_BYTE = 2**20  # past the text, which others could not read otherwise

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from None
        os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
