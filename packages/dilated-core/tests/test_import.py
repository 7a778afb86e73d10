"""Importing dilated_core is light: what torch costs, and little more."""

import subprocess
import sys

CODE = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import dilated_core
print(time.perf_counter() - start)
print(*(set(sys.modules) - before))
"""


def test_import_adds_little_to_torch():
    times, modules = [], set()
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", CODE], capture_output=True, text=True, check=True
        )
        seconds, names = done.stdout.splitlines()
        times.append(float(seconds))
        modules |= {name.split(".")[0] for name in names.split()}
    assert min(times) < 0.2
    assert not modules & {"triton", "matplotlib", "numpy", "safetensors"}
