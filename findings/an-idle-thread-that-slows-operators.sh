#!/usr/bin/env bash
# torch 2.13.0 on Linux's CPUs (its wheel's GNU OpenMP): a thread that has run one parallel operator,
# and then only waits, makes every operator of all other threads slower for as long as it lives.
#
# An operator that runs in a thread has helpers of its own, as many as torch.get_num_threads() less
# one, and they stay until the thread ends. Where all threads of OpenMP are more than the CPU's
# cores, and with torch's default of a thread a core one more is enough, GNU's OpenMP no longer
# waits awake: each operator has its helpers woken anew. A training of many small operators, as
# attention over short segments is on a CPU, meets it through a thread that draws the next batch or
# writes a checkpoint with torch.
#
# What to do: draw batches where the steps are, or in a process; let a thread end with its task; or
# have threads beside the training compute with numpy, which has no such helpers.
#
# Seen with torch 2.13.0+cpu, two cores of an AMD EPYC, exp2 of half a million numbers, median of
# rounds of 400: 38 us; beside the idle thread 72 us; after it ended 38 us. On a machine whose cores
# are taken by others it may be the other way round: waiting awake for a helper that has no core
# took 8 ms there. GOMP_SPINCOUNT=1000, set before torch is imported, keeps most of both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0" "numpy<3"
cat > "$folder/idle.py" <<'PY'
import statistics
import threading
import time

import torch

x = torch.randn(512, 1024)


def usual(rounds=9, calls=400):
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            torch.exp2(x)
        found.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(found)


def seen():
    def once():
        torch.exp2(x)
        ready.set()
        done.wait()

    usual()
    alone = usual()
    ready, done = threading.Event(), threading.Event()
    idle = threading.Thread(target=once)
    idle.start()
    ready.wait()
    beside = usual()
    done.set()
    idle.join()
    after = usual()
    print(f"alone {alone:.0f} us, beside an idle thread {beside:.0f} us, after it {after:.0f} us")
    return beside > 1.4 * alone and after < 1.2 * alone


assert torch.get_num_threads() > 1, "one core has no helpers"
# Others may take the cores for a while.
assert any(seen() for _ in range(10))
PY
"$folder/venv/bin/python" "$folder/idle.py"
