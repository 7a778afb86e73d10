"""A process that used gloo ends well; what would abort it is only waited for."""

import subprocess
import sys

import pytest

HELD = """
import pathlib, threading, time
from dilated_core.extending import let_gloo_rest, let_gloo_rest_at_exit
let_gloo_rest_at_exit()
def work():
    name = pathlib.Path(f"/proc/self/task/{threading.get_native_id()}/comm")
    name.write_text("pt_gloo_runloop")
    started.set()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    print("let go", flush=True)
    name.write_text("other")
started = threading.Event()
threading.Thread(target=work, daemon=True).start()
started.wait()
"""

PINNED = """
import sys, torch
import torch.distributed as dist
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
group = dist.distributed_c10d._get_default_group()
from dilated_core import DilatedPattern, dilated_attention
x = torch.randn(1, 16, 2, 8, requires_grad=True)
before = sys.getrefcount(group)
dilated_attention(x, x, x, DilatedPattern([16], [1])).sum().backward()
print(sys.getrefcount(group) - before, "torch._dynamo" in sys.modules)
"""


def output_of(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what threads do")
def test_the_end_waits_for_a_thread_of_gloo_that_works():
    """One that frees a tensor while the interpreter ends would abort the process (torch 2.13)."""
    assert output_of(HELD) == "let go\n"
    assert output_of(f"{HELD}\nlet_gloo_rest()\nprint('rested')") == "let go\nrested\n"


@pytest.mark.distributed
def test_a_backward_neither_imports_the_compiler_nor_keeps_a_process_group(tmp_path):
    """torch.distributed.nn, which the compiler imports, has the group as default argument."""
    assert output_of(PINNED, str(tmp_path / "store")) == "0 False\n"
