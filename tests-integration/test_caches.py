"""What packages remember between calls: bounded, told in one table, forgotten by one function."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dilated_core
from dilated_core import DilatedPattern, clear_caches, dilated_attention
from dilated_core._branches import Branches
from dilated_core._schedules.schedule import schedule
from dilated_core.extending import on_clear, remembered

ROOT = Path(__file__).parents[1]


def decorated() -> dict[str, set[str]]:
    """The functions of all packages whose results are remembered, by the decorator."""
    found: dict[str, set[str]] = {}
    for file in ROOT.glob("packages/*/src/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for each in getattr(node, "decorator_list", ()):
                name = ast.unparse(each).partition("(")[0].rpartition(".")[2]
                found.setdefault(name, set()).add(f"{file.stem}.{node.name}")
    return found


def test_the_table_names_every_cache_and_no_other() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("## Caches")[2].partition("## ")[0]
    told: dict[str, str] = {}
    for line in table.splitlines():
        if line.startswith("|"):
            _, first, *_, cleared, _ = line.split("|")
            module = ""
            for name in re.findall(r"`([\w.]+)`", first):
                module = name.rpartition(".")[0].rpartition(".")[2] or module
                told[f"{module}.{name.rpartition('.')[2]}"] = cleared.strip()
    found = decorated()
    remembering = found["remembered"]
    once = found.get("cache", set())
    assert "lru_cache" not in found
    assert remembering <= {name for name, cleared in told.items() if cleared == "yes"}
    assert once <= {name for name, cleared in told.items() if cleared == "no"}
    named = {name for name, cleared in told.items() if cleared == "yes"}
    assert named <= remembering


def test_what_is_remembered_is_forgotten() -> None:
    calls: list[int] = []

    @remembered(2)
    def double(number: int) -> int:
        calls.append(number)
        return 2 * number

    kept = {"a": 1}
    on_clear(kept.clear)
    assert [double(1), double(1), double(2), double(3), double(1)] == [2, 2, 4, 6, 2]
    assert calls == [1, 2, 3, 1]  # of three results two are kept
    clear_caches()
    assert double(1) == 2
    assert calls[-1] == 1
    assert len(calls) == 5
    assert not kept


def test_results_are_the_same_after_a_clear() -> None:
    query = torch.randn(1, 24, 2, 8)
    pattern = DilatedPattern([8, 16], [1, 2])
    before = dilated_attention(query, query, query, pattern, is_causal=True, backend="torch")
    assert schedule.cache_info().currsize
    clear_caches()
    assert schedule.cache_info().currsize == 0
    after = dilated_attention(query, query, query, pattern, is_causal=True, backend="torch")
    assert torch.equal(before, after)
    assert Branches.from_code(pattern.code) == Branches.from_code(pattern.code)


CHANGING = """
import gc, os, sys
import torch
from dilated_core import DilatedKVCache, DilatedPattern, clear_caches, dilated_attention
from dilated_core import dilated_attention_varlen

torch.set_num_threads(1)
try:
    from dilated_sparse import block_sparse_attention, layouts
except ImportError:
    layouts = None

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def call(number):
    length, heads = 8 + number % 701, 1 + number % 3
    q = torch.randn(1, length, heads, 4, requires_grad=True)
    pattern = DilatedPattern([8 + number % 89, 64], [1, 1 + number % 5])
    dilated_attention(q, q, q, pattern, is_causal=number % 2 == 0).sum().backward()
    bounds = torch.tensor([0, number % length, length])
    with torch.no_grad():
        dilated_attention_varlen(q[0], q[0], q[0], bounds, pattern, is_causal=True)
        DilatedKVCache(pattern).attend(q, q, q)
        if layouts is not None and number % 4 == 0:
            layout = layouts.sliding_window(length, window=9, block_size=16)
            block_sparse_attention(q, q, q, layout, is_causal=True)

def live():
    gc.collect()
    return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())

for number in range(900):  # all caches are full then
    call(number)
tensors, memory = live(), resident()
for number in range(900, 2900):
    call(number)
more, grown = live() - tensors, resident() - memory
clear_caches()
print(more, grown, live())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the resident memory is read from /proc")
def test_memory_of_two_thousand_calls_of_changing_shapes_is_flat() -> None:
    command = [sys.executable, "-c", CHANGING]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    more, grown, left = map(int, done.stdout.split())
    assert more < 64, f"{more} tensors more are alive"
    assert grown < 48 * 2**20, f"{grown / 2**20:.0f} MiB more are resident"
    assert left < 64


def test_the_function_is_public() -> None:
    assert "clear_caches" in dilated_core.__all__
