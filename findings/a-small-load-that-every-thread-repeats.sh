#!/usr/bin/env bash
# triton 3.6.0, compiled for compute capability 9.0: a load of fewer elements than a program has
# threads, whose elements go with the columns of a product, is made anew in the layout of the
# product: each thread copies all columns that it will need, 16 of 64 here, with an address for
# each, instead of one that all share through shared memory.
#
# The backward of attention reads two numbers of each query beside a tile of queries, and so meets
# it with the usual tiles of 64 and 4 warps: in a kernel of that shape a seventh of the instructions
# of a step were these addresses and copies. Nothing says so, and the results are right.
#
# What to do: load as many elements as there are threads. Two numbers of a column as a tile
# (2, columns), with tl.split(tl.trans(tile)), are copied once.
#
# Seen on Linux, Python 3.11 and 3.12, triton 3.6.0 (no GPU is needed), 64 columns, 128 threads, 3
# stages; asynchronous copies in the PTX, and its lines:
#   two loads of 64      108 copies    1226 lines
#   a tile of 2 x 64      15 copies     722 lines
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "triton==3.6.0"
cat > "$folder/loads.py" <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def kernel(query, key, terms, out, steps, TILE: tl.constexpr):
    rows, columns, dims = tl.arange(0, 64), tl.arange(0, 64), tl.arange(0, 64)
    k = tl.load(key + rows[:, None] * 64 + dims[None, :])
    acc = tl.zeros([64, 64], tl.float32)
    for step in range(steps):
        at = step * 64 + columns
        q = tl.load(query + at[:, None] * 64 + dims[None, :])
        if TILE:
            both = tl.load(terms + 2 * at[None, :] + tl.arange(0, 2)[:, None])
            shift, factor = tl.split(tl.trans(both))
        else:
            shift, factor = tl.load(terms + 2 * at), tl.load(terms + 2 * at + 1)
        s = tl.dot(k, tl.trans(q))
        p = tl.exp2(s - shift[None, :]) * factor[None, :]
        acc = tl.dot(p.to(q.dtype), q, acc)
    tl.store(out + rows[:, None] * 64 + dims[None, :], acc)


def copies(tile):
    kinds = dict(query="*bf16", key="*bf16", terms="*fp32", out="*fp32", steps="i32")
    facts = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(kernel, kinds | {"TILE": "constexpr"}, {"TILE": tile}, facts)
    options = {"num_warps": 4, "num_stages": 3}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    found = len(re.findall(r"cp\.async\.c[ag]", ptx))
    print(f"{'a tile of 2 x 64' if tile else 'two loads of 64'}: {found} copies, "
          f"{len(ptx.splitlines())} lines")
    return found


assert copies(False) > 4 * copies(True)
PY
"$folder/venv/bin/python" "$folder/loads.py"
