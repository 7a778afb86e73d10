#!/usr/bin/env bash
# torch 2.13.0: an autograd.Function whose forward has a setup_context beside it has its signature
# inspected at each call (inspect.signature and bind, of forward's arguments), although that is the
# same for ever. Written as forward(ctx, ...) nothing is inspected.
#
# The newer form is the one that the documentation recommends, and a kernel of attention or of a
# norm has eight arguments or so: then a call with nothing in it takes the host four times as long.
# A layer calls several such kernels, so that on a GPU short inputs wait for the host.
#
# What to do: forward(ctx, ...) where torch.func is not asked for, which is what needs the newer
# form; and no Function at all where nothing needs gradients.
#
# Seen on Linux, Python 3.11, torch 2.13.0+cpu (2.11.0 alike), two cores of an AMD EPYC, a forward
# of eight arguments that returns the first:
#   forward(ctx, ...)              5 us
#   forward(...), setup_context   20 us, of which 15 are inspect's
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy<3"
cat > "$folder/calls.py" <<'PY'
import cProfile
import pstats
import statistics
import time

import torch

torch.set_num_threads(1)


class One(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, out, scale, causal, dropout, seed):
        return query.view_as(query)

    @staticmethod
    def backward(ctx, grad):
        return grad, *[None] * 7


class Two(torch.autograd.Function):
    @staticmethod
    def forward(query, key, value, out, scale, causal, dropout, seed):
        return query.view_as(query)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad, *[None] * 7


x = torch.randn(4, requires_grad=True)
arguments = (x, x, x, x, 1.0, True, 0.0, 0)


def time_of(kind, calls=2000):
    start = time.perf_counter()
    for _ in range(calls):
        kind.apply(*arguments)
    return (time.perf_counter() - start) / calls * 1e6


rounds = [(time_of(One), time_of(Two)) for _ in range(9)]
one, two = (statistics.median(x) for x in zip(*rounds, strict=True))
profile = cProfile.Profile()
profile.runcall(time_of, Two, 100)
inspected = sum(
    count for (file, _, name), (count, *_) in pstats.Stats(profile).stats.items()
    if file.endswith("inspect.py") and name == "signature"
)
print(f"{one:.1f} us and {two:.1f} us a call; signatures inspected in 100 calls: {inspected}")
assert inspected == 100, inspected
assert two > 2 * one, (one, two)
PY
"$folder/venv/bin/python" "$folder/calls.py"
