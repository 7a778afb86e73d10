#!/usr/bin/env bash
# torch 2.13.0 (2.11.0 too, with two threads): what is imported after init_process_group decides
# whether destroy_process_group ends gloo's threads.
#
# torch.distributed.nn.functional has the default group as a default argument of ten functions
# (`group=group.WORLD`), which Python evaluates when the module is imported. FSDP, DTensor's older
# relatives and torch._dynamo import it. Imported before init_process_group the defaults are None;
# imported after it they are the group itself, which then lives as long as the process: its three
# threads (gloo_tcp_loop, two pt_gloo_runloop) are still there after destroy_process_group.
#
# Why it matters for sequence parallel training: the first backward that goes through
# torch._disable_dynamo imports the compiler, usually after the group was made. A thread of gloo
# that frees its last tensor while the interpreter ends takes the process down (SIGABRT,
# "terminate called without an active exception"; pytorch issue 190489), after all work was done.
#
# What to do: import torch.distributed.nn (or torch._dynamo) before init_process_group.
#
# Seen on Linux, Python 3.11, torch 2.13.0 (threads of gloo after destroy_process_group):
#   nothing imported        0
#   imported before         0
#   imported after          3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "torch==2.13.0"
cat > "$folder/threads.py" <<'PY'
import gc
import importlib
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
import torch
import torch.distributed as dist

when, store = sys.argv[1:]
MODULE = "torch.distributed.nn.functional"
if when == "before":
    importlib.import_module(MODULE)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
if when == "after":
    importlib.import_module(MODULE)
dist.all_reduce(torch.ones(3))
dist.destroy_process_group()
gc.collect()
print(sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm")))
PY
seen=""
for when in nothing before after; do
    count=$("$folder/venv/bin/python" "$folder/threads.py" "$when" "$folder/store-$when")
    echo "imported: $when    threads of gloo left: $count"
    seen="$seen $count"
done
[ "$seen" = " 0 0 3" ]
