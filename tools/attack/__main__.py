"""Attack: draw cases of every target, check each, keep what fails as a test. See `--help`."""

from __future__ import annotations

import argparse
import json
import pprint
import random
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

Case = dict[str, Any]
# Of the time; 1 where none is named. Most that can go wrong with numbers needs many cases.
SHARES = dict.fromkeys(("attention", "packed", "cache", "blocks"), 3)


class Target(Protocol):
    """What is attacked: a case is plain data, and all that a check depends on."""

    def draw(self, rng: random.Random) -> Case:
        """A random case."""

    def check(self, case: Case) -> None:
        """Raise unless what the packages promise holds in this case."""


def targets() -> dict[str, Target]:
    """All targets by name."""
    from tools.attack import files, kernels, memory, numeric, ranks

    interpreted: dict[str, Target] = {}
    if find_spec("triton") is not None:
        interpreted["kernels"] = kernels.Kernels()
    return interpreted | {
        "attention": numeric.Attention(), "packed": numeric.Packed(), "cache": numeric.Cache(),
        "blocks": numeric.Blocks(), "ring": ranks.Ring(), "faults": ranks.Faults(),
        "pool": memory.Pool(), "threads": memory.Threads(), "killed": files.Killed(),
        "full": files.Full(), "damaged": files.Damaged(),
        "configurations": files.Configurations(), "lines": files.Lines(),
    }  # fmt: skip


def failure(target: Target, case: Case) -> BaseException | None:
    """What a check of a case raises."""
    # A copy, since a case must be all that its check depends on.
    case = json.loads(json.dumps(case))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # That others call what is deprecated breaks no promise; the tests listen to it.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            target.check(case)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return error
    return None


def smaller(value: Any) -> Iterator[Any]:
    """Values that are simpler: shorter lists, numbers nearer to 0, one change at a time."""
    if isinstance(value, dict):
        for name in value:
            for each in smaller(value[name]):
                yield {**value, name: each}
    elif isinstance(value, list):
        if len(value) > 1:
            yield value[: len(value) // 2]
            yield value[len(value) // 2 :]
            yield from (value[:i] + value[i + 1 :] for i in range(len(value)))
        for i, item in enumerate(value):
            yield from ([*value[:i], each, *value[i + 1 :]] for each in smaller(item))
    elif type(value) is int and value > 1:
        yield from {1, value // 2, value - 1}
    elif type(value) is float and value:
        yield 0.0


def minimal(target: Target, case: Case, error: BaseException, *, seconds: float = 30) -> Case:
    """A case as simple as could be found that fails with the same kind of error."""
    case = json.loads(json.dumps(case))
    until = time.monotonic() + seconds
    going = True
    while going:
        going = False
        for each in smaller(case):
            if time.monotonic() > until:
                return case
            found = failure(target, each)
            if type(found) is type(error) and str(found)[:20] == str(error)[:20]:
                case, going = each, True
                break
    return case


def write_test(folder: Path, name: str, number: int, case: Case, error: BaseException) -> Path:
    """A failure as a file of pytest's, to be run from the root of the repository."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"test_{name}_{number}.py"
    said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    path.write_text(
        f'"""{name}, case {number}: {said!r}"""\n\n'
        "from tools.attack.__main__ import targets\n\n"
        f"CASE = {pprint.pformat(json.loads(json.dumps(case)), width=96, sort_dicts=False)}\n\n\n"
        f"def test_{name}_{number}() -> None:\n"
        f'    targets()["{name}"].check(CASE)\n',
        encoding="utf-8",
    )
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.attack", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all targets together")
    parser.add_argument("--seed", type=int, help="of all cases; default: another one each time")
    parser.add_argument("--targets", help="comma-separated; default: all")
    parser.add_argument("--cases", type=int, help="of each target, instead of --minutes")
    parser.add_argument("--state", type=Path, help="file to go on from, and to write")
    parser.add_argument("--failures", type=Path, default=Path("attack-failures"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; 1 if a promise was broken."""
    options = parse(arguments)
    torch.set_num_threads(1)
    chosen = targets()
    if options.targets:
        chosen = {name: chosen[name] for name in options.targets.split(",")}
    state: dict[str, Any] = {"seed": options.seed, "done": {}, "failed": {}, "seconds": {}}
    if options.state is not None:
        with suppress(FileNotFoundError):
            state = json.loads(options.state.read_text())
    if state["seed"] is None:
        state["seed"] = random.SystemRandom().randrange(2**31)
    print(f"seed {state['seed']}", flush=True)
    until = time.monotonic() + 60 * options.minutes
    spent = state["seconds"]
    while True:
        most = float("inf") if options.cases is None else options.cases
        left = [each for each in chosen if state["done"].get(each, 0) < most]
        if not left or (options.cases is None and time.monotonic() > until):
            break
        name = min(left, key=lambda each: spent.get(each, 0.0) / SHARES.get(each, 1))
        began = time.monotonic()
        # A slice of time each, since a switch between targets cools all caches.
        while True:
            number = state["done"].get(name, 0)
            _one(chosen[name], name, number, state, options.failures)
            state["done"][name] = number + 1
            if options.cases is not None and number + 1 >= options.cases:
                break
            if time.monotonic() - began > 2 or time.monotonic() > until:
                break
        spent[name] = spent.get(name, 0.0) + time.monotonic() - began
        if options.state is not None:
            whole = options.state.with_name(options.state.name + ".new")
            whole.write_text(json.dumps(state))
            whole.replace(options.state)
    for name in chosen:
        done, failed = state["done"].get(name, 0), len(state["failed"].get(name, []))
        print(f"{name:16}{done:>10,} cases{failed:>6} failures{spent.get(name, 0.0):>8,.0f} s")
    return int(any(state["failed"].get(name) for name in chosen))


def _one(target: Target, name: str, number: int, state: dict[str, Any], folder: Path) -> None:
    case = target.draw(random.Random(f"{state['seed']}/{name}/{number}"))
    error = failure(target, case)
    if error is None:
        return
    failed = state["failed"].setdefault(name, [])
    failed.append(number)
    if len(failed) <= 20:  # the same fault again and again is one fault
        case = minimal(target, case, error)
        path = write_test(folder, name, number, case, error)
        print(
            f"{name}, case {number}: {type(error).__name__}: {str(error)[:300]}\n  {path}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
