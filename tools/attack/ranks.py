"""`ring_attention` on 2 to 4 gloo ranks against the oracle on one, wrong calls between."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dilated_ring import RingError, ring_attention
from tools.attack import oracle
from tools.attack.numeric import TOLERANCE, draw_pattern, pattern_of, same, tensors

Case = dict[str, Any]
STRATEGIES = ("auto", "auto", "gather", "heads", "lend", "ring")
WRONG = ("shape", "causal", "dtype", "scale", "pattern")
ANSWER_WITHIN = 300  # a busy machine takes long to start processes


class Ring:
    """Results and gradients of all ranks; a call that differs on one rank is an error on all."""

    def draw(self, rng: random.Random) -> Case:
        case = draw_pattern(rng)
        return case | {
            "ranks": rng.randint(2, 4), "shard": rng.randint(1, 12),
            "strategy": rng.choice(STRATEGIES),
            "zeros": False, "hidden": rng.choice((0.0, 0.0, 0.3)),
            "wrong": rng.choice((None,) * 6 + WRONG),
        }  # fmt: skip

    def check(self, case: Case) -> None:
        group = _start(case["ranks"])
        for pipe in group.pipes:
            pipe.send(case)
        answers = []
        for rank, pipe in enumerate(group.pipes):
            if not pipe.poll(ANSWER_WITHIN):
                _end(case["ranks"])
                raise AssertionError(f"rank {rank} gave no answer in {ANSWER_WITHIN} s")
            answers.append(pipe.recv())
        kinds = {kind for kind, _ in answers}
        if kinds == {"refused"}:
            types = {said.partition(":")[0] for _, said in answers}
            assert len(types) == 1, answers
            reason = answers[0][1]
            refusable = case["wrong"] is not None or case["strategy"] == "heads"
            assert refusable or case["groups"] == "split", reason
            return
        if kinds != {"done"}:
            _end(case["ranks"])
            raise AssertionError(str([said for kind, said in answers if kind != "done"]))
        assert case["wrong"] is None, "a call that differed on one rank was served"
        length = case["ranks"] * case["shard"]
        *qkv, upstream = tensors(case, length, length)
        exact = [x.double().requires_grad_() for x in qkv]
        seen, zeros = oracle.counts(case, length, length)
        q, k, v = exact
        want, lse = oracle.attention(
            q, k, v, seen, zeros, scale=case["scale"], hidden=_hidden(case)
        )
        expected = [want, lse.transpose(1, 2), *torch.autograd.grad(want, exact, upstream.double())]
        result, gradient = TOLERANCE[case["dtype"]]
        spread = max(1.0, abs(case["scale"] or 1.0))
        for name, index, tolerance in (
            ("out", 0, result), ("lse", 1, result), ("dq", 2, gradient * spread),
            ("dk", 3, gradient * spread), ("dv", 4, gradient * spread),
        ):  # fmt: skip
            found = torch.cat([answer[index] for _, answer in answers], 1)
            same(name, found, expected[index].detach(), tolerance)


def _hidden(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    shape = case["batch"], case["ranks"] * case["shard"]
    hidden: torch.Tensor = torch.rand(shape, generator=generator) < case["hidden"]
    return hidden


def _attend(case: Case, rank: int) -> list[torch.Tensor]:
    length = case["ranks"] * case["shard"]
    rows = slice(rank * case["shard"], (rank + 1) * case["shard"])
    *qkv, upstream = [x[:, rows].contiguous() for x in tensors(case, length, length)]
    wrong = case["wrong"] if rank == case["seed"] % case["ranks"] else None
    if wrong == "shape":
        qkv = [torch.cat((x, x[..., :1]), -1) for x in qkv]
    elif wrong == "dtype":
        qkv = [x.to(torch.float32 if x.dtype != torch.float32 else torch.float64) for x in qkv]
    elif wrong == "scale":
        case = case | {"scale": 2.5}
    elif wrong == "pattern":
        case = case | {"branches": [*case["branches"][:-1], (41, 3)]}
    q, k, v = ours = [x.requires_grad_() for x in qkv]
    out, lse = ring_attention(
        q, k, v, pattern_of(case), is_causal=case["causal"] != (wrong == "causal"),
        scale=case["scale"], strategy=case["strategy"], enable_gqa=True, return_lse=True,
        key_padding_mask=_hidden(case)[:, rows].contiguous() if case["hidden"] else None,
        validate="always",
    )  # fmt: skip
    grads = torch.autograd.grad(out, ours, upstream)
    return [out.detach(), lse.detach().transpose(1, 2), *grads]


class _Group:
    """Processes that wait for cases."""

    def __init__(self, size: int, serve: Callable[..., None], *more: Any) -> None:
        context = multiprocessing.get_context("spawn")
        store = str(Path(tempfile.mkdtemp(prefix="attack-ranks-")) / "store")
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, size, store, *more)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)


@cache
def _start(size: int) -> _Group:
    group = _Group(size, _serve)
    atexit.register(_kill, group)
    return group


def _end(size: int) -> None:
    """Give up the processes: the next case starts new ones."""
    _kill(_start(size))
    _start.cache_clear()


def _kill(group: _Group) -> None:
    for process in group.processes:
        process.kill()


def _join(rank: int, size: int, store: str, seconds: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size,
        timeout=timedelta(seconds=seconds),
    )  # fmt: skip


def _serve(pipe: Any, rank: int, size: int, store: str) -> None:
    _join(rank, size, store, ANSWER_WITHIN)
    while True:
        case = pipe.recv()
        try:
            pipe.send(("done", _attend(case, rank)))
        except (RingError, TypeError, ValueError) as error:
            pipe.send(("refused", f"{type(error).__name__}: {error}"))
        except BaseException:
            pipe.send(("broken", traceback.format_exc()))


FAULTS = ("killed", "stopped", "raises", "hangs")
GROUP_TIMEOUT = 8.0
SLACK = 30.0  # a busy machine


class Faults:
    """A rank is gone at a random instant, in a call or between two: all others are told in time."""

    def draw(self, rng: random.Random) -> Case:
        case = Ring().draw(rng)
        return case | {
            "wrong": None, "strategy": rng.choice(("gather", "lend", "ring")), "groups": "shared",
            "fault": rng.choice(FAULTS), "victim": rng.randrange(case["ranks"]),
            "delay": round(rng.uniform(0.0, 0.2), 4),
        }  # fmt: skip

    def check(self, case: Case) -> None:
        group = _Group(case["ranks"], _suffer, case)
        try:
            for pipe in group.pipes:
                assert pipe.poll(ANSWER_WITHIN), "a rank did not start"
                assert pipe.recv() == "ready"
            victim = group.processes[case["victim"]].pid or 0
            time.sleep(case["delay"])
            if case["fault"] in ("killed", "stopped"):
                os.kill(victim, signal.SIGKILL if case["fault"] == "killed" else signal.SIGSTOP)
            until = time.monotonic() + GROUP_TIMEOUT + SLACK
            for rank, pipe in enumerate(group.pipes):
                if rank == case["victim"]:
                    continue
                assert pipe.poll(max(0.0, until - time.monotonic())), f"rank {rank} waits on"
                error = pipe.recv()
                assert isinstance(error, RingError), error
                assert error.ranks in ((), (case["victim"],)), (error.ranks, error)
        finally:
            _kill(group)


def _suffer(pipe: Any, rank: int, size: int, store: str, case: Case) -> None:
    _join(rank, size, store, GROUP_TIMEOUT)
    try:
        _attend(case, rank)
        pipe.send("ready")
        until = time.monotonic() + case["delay"]
        while True:
            _attend(case, rank)
            if rank == case["victim"] and time.monotonic() > until:
                if case["fault"] == "raises":
                    return
                if case["fault"] == "hangs":
                    time.sleep(GROUP_TIMEOUT + SLACK)
    except RingError as error:
        pipe.send(error)
    except BaseException:
        pipe.send(traceback.format_exc())
