"""What small calls cost, the host included, of this tree and of an older commit in turn.

The older commit is checked out in a temporary folder; processes of both run in turn, several
rounds, and a figure is the median of 15 calls after warm-up, then of its rounds. On the CPU it is
a call of 64 tokens, 4 heads of 16 and two branches, where the host is nearly all there is; on CUDA
1024 and 4096 tokens, 12 heads of 64, bfloat16, with torch's dense attention beside it.

    python benchmarks/host.py [--commit HASH|FOLDER] [--device cpu|cuda] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _machine import describe
from torch import Tensor

ROOT = Path(__file__).parent.parent
CALLS, WARM_UP = 15, 10
# On the CPU a call takes less than the clock is good for: time so many at once.
AT_ONCE = {"cpu": 40, "cuda": 1}
Times = dict[str, float]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", default="1c38fec", help="a commit, or a folder of one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each tree")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        json.dump(dict(measured(arguments.device)), sys.stdout)
        return
    machine = describe(arguments.device)
    print(json.dumps(machine), flush=True)
    with checked_out(arguments.commit) as older:
        rounds = [
            (child(older, arguments.device), child(ROOT, arguments.device))
            for _ in range(arguments.rounds)
        ]
    rows = [row(name, rounds) for name in rounds[0][0]]
    if arguments.json:
        text = json.dumps({"machine": machine, "commit": arguments.commit, "rows": rows}, indent=1)
        Path(arguments.json).write_text(text + "\n", encoding="utf-8")


def row(name: str, rounds: list[tuple[Times, Times]]) -> dict[str, Any]:
    """One case: microseconds of the older tree and of this, and their ratio; printed too."""
    before, now = (
        statistics.median(times[name] for times in side) for side in zip(*rounds, strict=True)
    )
    ratio = statistics.median(pair[1][name] / pair[0][name] for pair in rounds)
    print(f"{name:44} {before:9.1f} us {now:9.1f} us   x {ratio:.2f}", flush=True)
    return {"name": name, "before_us": before, "now_us": now, "ratio": ratio}


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A working tree of that commit; a folder is one already."""
    if Path(commit).is_dir():
        yield Path(commit)
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "older"
        subprocess.run([*git, "add", "--quiet", "--detach", str(place), commit], check=True)
        try:
            yield place
        finally:
            subprocess.run([*git, "remove", "--force", str(place)], check=True)


def child(tree: Path, device: str) -> Times:
    """The times of a tree, measured in a process of its own."""
    sources = os.pathsep.join(map(str, tree.glob("packages/*/src")))
    done = subprocess.run(
        [sys.executable, __file__, "--child", "--device", device],
        env={**os.environ, "PYTHONPATH": sources}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    times: Times = json.loads(done.stdout)
    return times


def measured(device: str) -> Iterator[tuple[str, float]]:
    """Names and microseconds of all cases."""
    from dilated_core import DilatedPattern, dilated_attention

    if device == "cpu":
        torch.set_num_threads(1)
        pattern = DilatedPattern([32, 64], [1, 2])
        cases = [(64, 4, 16, torch.float32)]
    else:
        pattern = DilatedPattern([2048 * 2**k for k in range(5)], [2**k for k in range(5)])
        cases = [(length, 12, 64, torch.bfloat16) for length in (1024, 4096)]

    def dense(*inputs: Tensor, is_causal: bool) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in inputs)
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    def dilated(*inputs: Tensor, is_causal: bool) -> Tensor:
        out = dilated_attention(*inputs, pattern, is_causal=is_causal)
        assert isinstance(out, Tensor)
        return out

    for length, heads, head_dim, dtype in cases:
        shape = (1, length, heads, head_dim)
        inputs = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in "qkv"]
        for name, attend in (("ours", dilated), ("dense", dense)):
            for is_causal in (False, True):
                title = f"{name}, {length} tokens{', causal' * is_causal}"
                call = partial(attend, *inputs, is_causal=is_causal)
                upstream = torch.randn_like(call())
                yield f"{title}, forward", microseconds(torch.no_grad()(call), device)
                both = partial(step, call, inputs, upstream)
                yield f"{title}, forward + backward", microseconds(both, device)


def step(call: Callable[[], Tensor], inputs: list[Tensor], upstream: Tensor) -> None:
    """A forward and a backward."""
    torch.autograd.grad(call(), inputs, upstream)


def microseconds(function: Callable[[], Any], device: str) -> float:
    """The median time of a call, until the device has done it."""
    at_once, times = AT_ONCE[device], []
    for _ in range(WARM_UP + CALLS):
        start = time.perf_counter()
        for _ in range(at_once):
            function()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / at_once * 1e6)
    return statistics.median(times[WARM_UP:])


if __name__ == "__main__":
    main()
