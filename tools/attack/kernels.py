"""The GPU kernels under Triton's interpreter, which runs them on CPU tensors."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import random
import traceback
import warnings
from functools import cache
from typing import Any

import torch

from tools.attack import oracle
from tools.attack.numeric import TOLERANCE, draw_pattern, pattern_of, same, tensors

Case = dict[str, Any]
ANSWER_WITHIN = 600


class Kernels:
    """Forward and backward in 16 and 32 bits, masks and packed sequences among them."""

    def draw(self, rng: random.Random) -> Case:
        case = draw_pattern(rng)
        lengths = [rng.randint(1, 20) for _ in range(rng.choice((1, 1, 2, 3)))]
        return case | {
            "lengths": lengths, "batch": rng.randint(1, 2) if len(lengths) == 1 else 1,
            "dim": rng.choice((8, 16, 19, 24, 43)), "dtype": rng.choice(("float32", "float16")),
            "hidden": rng.choice((0.0, 0.0, 0.3)), "scale": rng.choice((None, 0.0, -0.7, 0.3)),
        }  # fmt: skip

    def check(self, case: Case) -> None:
        pipe = _start()
        pipe.send(case)
        if not pipe.poll(ANSWER_WITHIN):
            raise AssertionError(f"no answer in {ANSWER_WITHIN} s")
        kind, found = pipe.recv()
        assert kind == "done", found
        lengths = case["lengths"]
        total = sum(lengths)
        q, k, v, upstream = (x.double() for x in tensors(case, total, total))
        exact = [x.requires_grad_() for x in (q, k, v)]
        seen = torch.zeros(case["heads"], total, total, dtype=torch.float64)
        zeros = torch.zeros(case["heads"], total, dtype=torch.float64)
        start = 0
        for length in lengths:
            rows = slice(start, start + length)
            seen[:, rows, rows], zeros[:, rows] = oracle.counts(case, length, length)
            start += length
        out, lse = oracle.attention(
            q, k, v, seen, zeros, scale=case["scale"], hidden=hidden_keys(case, total)
        )
        grads = torch.autograd.grad(out, exact, upstream)
        result, gradient = TOLERANCE[case["dtype"]]
        same("out", found[0], out.detach(), result)
        same("lse", found[1], lse.detach(), result)
        for name, a, b in zip("qkv", found[2:], grads, strict=True):
            same(f"gradient of {name}", a, b, gradient)


def hidden_keys(case: Case, total: int) -> torch.Tensor:
    """Which keys are padding, (B, M)."""
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    hidden: torch.Tensor = torch.rand(case["batch"], total, generator=generator) < case["hidden"]
    return hidden


@cache
def _start() -> Any:
    """A process in which triton interprets: that is chosen when triton is imported."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        process.start()
    finally:
        del os.environ["TRITON_INTERPRET"]
    atexit.register(process.kill)
    return ours


def _serve(pipe: Any) -> None:
    torch.set_num_threads(1)
    from dilated_core._triton._driving import Config
    from dilated_core._triton._pattern_plans import PatternTiling

    warnings.simplefilter("ignore")  # numpy's, of the interpreter
    # The smallest tiles, so that short sequences have several.
    PatternTiling.choose = lambda *_: Config(16, 16, 4, 1)  # type: ignore[method-assign]
    while True:
        case = pipe.recv()
        try:
            pipe.send(("done", _attend(case)))
        except BaseException:
            pipe.send(("broken", traceback.format_exc()))


def _attend(case: Case) -> list[torch.Tensor]:
    from dilated_core._call import DilatedCall, Scores
    from dilated_core._triton import attend

    total = sum(case["lengths"])
    q, k, v, upstream = tensors(case, total, total)
    ours = [x.requires_grad_() for x in (q, k, v)]
    scale = case["dim"] ** -0.5 if case["scale"] is None else case["scale"]
    mask = hidden_keys(case, total) if case["hidden"] else None
    bounds = torch.tensor([0, *case["lengths"]]).cumsum(0) if len(case["lengths"]) > 1 else None
    scores = Scores(case["causal"], scale, mask)
    out, lse = attend(DilatedCall(pattern_of(case), scores, bounds), q, k, v)
    grads = torch.autograd.grad(out, ours, upstream.to(out.dtype))
    return [out.detach(), lse.detach(), *grads]
