"""Replay or draw a recorded log: `python -m dilated_pool --help`."""

import argparse
from collections.abc import Sequence

from dilated_pool._events import EventLog
from dilated_pool._pool import UnifiedMemoryPool
from dilated_pool._replay import replay
from dilated_pool._report import plot_timeline, rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what cannot be used is one line on stderr, and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m dilated_pool", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("replay", help="run a log against a new pool, print its counters")
    command.add_argument("log", help="file of JSON lines that EventLog.write made")
    command.add_argument("--limit-bytes", type=int, help="limit of the pool (default: none)")
    command.add_argument("--device", help="lease here instead of where it was recorded")
    command = commands.add_parser("plot", help="draw a log into a PNG file")
    command.add_argument("log", help="file of JSON lines that EventLog.write made")
    command.add_argument("png", help="file to write")
    options = parser.parse_args(arguments)

    try:
        _run(options)
    except (ImportError, MemoryError, OSError, OverflowError, RuntimeError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


def _run(options: argparse.Namespace) -> None:
    log = EventLog.read(options.log)
    if options.command == "plot":
        plot_timeline(log, options.png)
        return
    result = replay(log, UnifiedMemoryPool(options.limit_bytes), device=options.device)
    for name, value in [*rows(result.stats), ("seconds", f"{result.seconds:.3f}")]:
        print(f"{name:30} {value:>16}")


if __name__ == "__main__":
    main()
