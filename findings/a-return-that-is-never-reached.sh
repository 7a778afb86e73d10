#!/usr/bin/env bash
# triton 3.6.0: after a return that a compile-time condition takes, the rest of a kernel's function
# is compiled all the same, and its type must agree.
#
#     if WIDE:              # a tl.constexpr
#         return x[:, None] + x[None, :]
#     return x
#
# With WIDE=True this is refused ("Inconsistent return types"), although only the first return can
# be reached; with an else before the second it compiles. What makes it dear is that Triton's
# interpreter (TRITON_INTERPRET=1) runs both: attention kernels whose masks are made by such a
# function pass every test on a CPU, and meet the compiler on the first GPU.
#
# What to do: one return, behind if and else; and compile kernels where there is no GPU, which
# needs none (a GPUTarget is enough). Upstream: triton issue 9719, pull request 10257.
#
# Seen on Linux, Python 3.11 and 3.12, triton 3.6.0:
#   if, return, return            WIDE=False compiles    WIDE=True CompilationError
#   if, return, else, return      WIDE=False compiles    WIDE=True compiles
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "triton==3.6.0"
cat > "$folder/returns.py" <<'PY'
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def early(x, WIDE: tl.constexpr):
    if WIDE:
        return x[:, None] + x[None, :]
    return x


@triton.jit
def either(x, WIDE: tl.constexpr):
    if WIDE:
        return x[:, None] + x[None, :]
    else:
        return x


@triton.jit
def kernel(out, EARLY: tl.constexpr, WIDE: tl.constexpr):
    x = tl.arange(0, 16)
    if EARLY:
        y = early(x, WIDE)
    else:
        y = either(x, WIDE)
    tl.store(out, tl.sum(tl.ravel(y), 0))


def compiles(is_early, wide):
    kinds = {"out": "*i32", "EARLY": "constexpr", "WIDE": "constexpr"}
    source = ASTSource(kernel, kinds, {"EARLY": is_early, "WIDE": wide})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    except triton.CompilationError as error:
        assert "Inconsistent return types" in str(error.__cause__ or error)
        return "no"
    return "yes"


print(*(compiles(is_early, wide) for is_early in (True, False) for wide in (False, True)))
PY
seen=$("$folder/venv/bin/python" "$folder/returns.py")
echo "compiles: early return narrow, wide; if and else narrow, wide: $seen"
[ "$seen" = "yes no yes yes" ]
