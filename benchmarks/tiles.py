"""Block sizes of the GPU kernels: the time of one pass with each, for a pattern or a layout.

For the table in `dilated_core._triton._blocks`. Block sizes are rows of a tile, columns of a
step, warps, stages, columns of a masked step, and registers of a thread, of which the last two may
be left out. Results must agree with those of the table to 1%; all are timed in turn.

    python benchmarks/tiles.py PASS SIZES... [--on WHAT] [--head-dim D] [--causal] [--rounds N]

For example: python benchmarks/tiles.py query 64,64,4,2,64 128,64,8,4,64 --on window:0.12
    --head-dim 128
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import NamedTuple, cast, get_args

import torch
from _machine import describe
from gpu import DOUBLING, GIGAPATH, LONGNET, PAPER, milliseconds, random_inputs
from sparse_gpu import layout_of
from torch import Tensor

from dilated_core._call import Scores
from dilated_core._triton import _launch
from dilated_core._triton._driving import Config, Pair, Pass, Sizes, Tiling
from dilated_core._triton._pattern_plans import PatternTiling
from dilated_core._triton._plan import BlockSizes, TilePlan
from dilated_sparse._triton_backend import LayoutTiling

PATTERNS = {"doubling": DOUBLING, "paper": PAPER, "gigapath": GIGAPATH, "longnet": LONGNET}
PATTERN_LENGTH, LAYOUT_LENGTH = 262144, 65536
TABLE = "as in the table"


def main() -> None:
    """Check, measure, and print a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", metavar="PASS", choices=get_args(Pass))
    parser.add_argument("sizes", metavar="SIZES", nargs="+", help="such as 128,64,8,3")
    layouts = "window:0.06, random:0.06"
    parser.add_argument("--on", default="doubling", help=f"{', '.join(PATTERNS)}, {layouts}")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(json.dumps(describe("cuda")), flush=True)
    configs = {TABLE: None} | {text: sizes(text) for text in arguments.sizes}
    run = runner(
        cast(Pass, arguments.which),
        caller_of(arguments.on, arguments.heads, arguments.head_dim, arguments.causal),
    )
    expected = [x.clone() for x in run(None)]
    times: dict[str, list[float]] = {}
    for round_ in range(arguments.rounds):
        for name, config in list(configs.items()):
            try:
                if not round_:
                    for result in run(config):
                        result.fill_(torch.nan)
                    check(run(config), expected)
                times.setdefault(name, []).append(milliseconds(lambda c=config: run(c)))
            except Exception as error:  # these block sizes need more of something than there is
                print(f"{name}: {type(error).__name__}: {str(error)[:100]}", flush=True)
                del configs[name]
    for name, found in times.items():
        middle, least, most = statistics.median(found), min(found), max(found)
        label = f"{arguments.which}  {arguments.on}  {name}"
        print(f"{label}  {middle:.3f} ms  ({least:.3f} to {most:.3f})")


def sizes(text: str) -> Config:
    """Block sizes as they are written on the command line."""
    return Config(*(int(part) for part in text.split(",")))


class Forced(NamedTuple):
    """A tiling with the block sizes that are given, or else with its own."""

    tiling: Tiling
    config: Config | None

    def cache(self) -> None:
        """Launches are not kept: those with other block sizes would be taken for them."""

    def choose(self, which: Pass, sizes: Sizes, pair: Pair) -> Config:
        """The block sizes of a pass."""
        return self.config or self.tiling.choose(which, sizes, pair)

    def plan(self, sizes: Sizes, by_key: bool, blocks: BlockSizes) -> TilePlan:
        """The tiling's plan for them."""
        return self.tiling.plan(sizes, by_key, blocks)


def caller_of(
    what: str, heads: int, head_dim: int, is_causal: bool
) -> Callable[[Config | None], _launch.KernelCall]:
    """What makes a call with block sizes, always on the same inputs."""
    kind, _, density = what.partition(":")
    inputs = [
        x.detach()
        for x in random_inputs(LAYOUT_LENGTH if density else PATTERN_LENGTH, heads, head_dim)
    ]
    scores = Scores(is_causal, head_dim**-0.5)
    tiling: Tiling = PatternTiling(PATTERNS[kind], None)
    if density:
        tiling = LayoutTiling(layout_of(kind, float(density)))
    return lambda config: _launch.KernelCall(scores, Forced(tiling, config), *inputs)


def runner(
    which: Pass, caller: Callable[[Config | None], _launch.KernelCall]
) -> Callable[[Config | None], list[Tensor]]:
    """What runs one pass with block sizes, or with those of the table, and returns its results."""
    call = caller(None)
    total = _launch.forward(call)
    grad_out = torch.randn_like(total.out)
    terms = torch.empty_like(total.lse, dtype=torch.int64)
    grads = [torch.empty_like(x) for x in (call.query, call.key, call.value)]
    _launch.query_gradient(call, grad_out, None, total, terms, grads[0])

    def run(config: Config | None) -> list[Tensor]:
        call = caller(config)
        if which == "forward":
            return [_launch.forward(call).out]
        if which == "query":
            _launch.query_gradient(call, grad_out, None, total, terms, grads[0])
            return grads[:1]
        _launch.key_gradients(call, grad_out, terms, grads[1], grads[2])
        return grads[1:]

    return run


def check(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Raise if results differ by more than rounding."""
    for one, two in zip(actual, expected, strict=True):
        error = float((one.double() - two.double()).norm() / two.double().norm())
        if not error < 0.01:
            raise ValueError(f"the results differ by {error:.2%}")


if __name__ == "__main__":
    main()
