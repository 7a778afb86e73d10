"""Run tests, each in a process of its own: `python -m tools.alone NODE...`; say which fail alone.

The processes are forked, where the system can, from one that has imported torch and pytest, and
nothing of ours.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

AT_ONCE = 2


def run(node: str, said: str) -> None:
    """Run one test in this process, which it ends; what is printed goes to a file."""
    with open(said, "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", node]))


def failure(node: str) -> str | None:
    """What a test said, if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        said = os.path.join(folder, "said")
        process = multiprocessing.Process(target=run, args=(node, said))
        process.start()
        process.join()
        if process.exitcode == 0:
            return None
        with open(said, encoding="utf-8") as file:
            return f"{node} fails alone:\n{file.read()}"


def main(nodes: list[str]) -> int:
    """Run all, print those that fail, and return the exit code."""
    if not nodes:
        print("no test was found", file=sys.stderr)
        return 2
    multiprocessing.set_start_method("forkserver" if hasattr(os, "fork") else "spawn")
    multiprocessing.set_forkserver_preload(["torch", "pytest"])
    with ThreadPoolExecutor(AT_ONCE) as pool:
        failures = [said for said in pool.map(failure, nodes) if said is not None]
    print(*failures, f"{len(nodes) - len(failures)} of {len(nodes)} tests pass alone", sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
