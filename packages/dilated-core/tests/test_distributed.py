"""DDP and FSDP2 around a module, two real processes over gloo."""

import subprocess
import sys

import pytest
import torch

from dilated_core import DilatedPattern, MultiheadDilatedAttention

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("core_distributed")]

WORKER = """
import os, sys, torch
import torch.distributed as dist
from datetime import timedelta
from dilated_core import DilatedPattern, MultiheadDilatedAttention

def loss_of(layer, x):
    return (layer(x, is_causal=True)[0] * torch.linspace(-1, 1, 48)).sum() / 4

def main(kind, rank, world, store, result):
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=timedelta(seconds=60),
    )
    torch.manual_seed(0)
    layer = MultiheadDilatedAttention(48, 6, DilatedPattern([5, 11], [1, 2]))
    inputs = torch.randn(4, 23, 48)
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(layer)
    else:
        from torch.distributed.fsdp import fully_shard
        wrapped = fully_shard(layer)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for _ in range(2):
        # Gradients are averaged over ranks, each of which has its share of the batch.
        loss = world * loss_of(wrapped, inputs[rank::world])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = {
        name: p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()
        for name, p in layer.named_parameters()
    }
    if rank == 0:
        torch.save(state, result)
    dist.destroy_process_group()

main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
# Gloo's threads outlive the group, and one that frees a tensor while the interpreter is finalized
# ends the process with SIGABRT.
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_like_one(kind, tmp_path):
    torch.manual_seed(0)
    layer = MultiheadDilatedAttention(48, 6, DilatedPattern([5, 11], [1, 2]))
    inputs = torch.randn(4, 23, 48)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        loss = (layer(inputs, is_causal=True)[0] * torch.linspace(-1, 1, 48)).sum() / 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    result = tmp_path / "state.pt"
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-W", "error::UserWarning:dilated_core", str(script), kind]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path / "store"), str(result)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    state = torch.load(result, weights_only=True)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(state[name], parameter.detach(), msg=name)
