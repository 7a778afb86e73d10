"""FSDP2 around each layer of a model, two real processes over gloo."""

import atexit
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dilated_core.extending import let_gloo_rest
from dilated_factory import LongNetConfig, LongNetLM
from dilated_factory.slides import embedding
from dilated_factory.training.parallel import leave

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("factory_distributed")]

CONFIGS = [
    LongNetConfig(
        vocab_size=23, embed_dim=32, num_heads=4, num_layers=2, segment_lengths=(5, 12, 40),
        dilation_rates=(1, 2, 3), context=37, tie_embeddings=tied,
    )
    for tied in (False, True)
]  # fmt: skip

WORKER = """
import os, sys, torch
import torch.distributed as dist
from datetime import timedelta
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from dilated_factory import LongNetConfig, LongNetLM

def train(config, rank, world):
    torch.manual_seed(0)
    model = LongNetLM(config, activation_checkpointing=True)
    tokens = torch.randint(23, (4, 41))
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "loss")
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(tokens[rank::world]).backward()
        optimizer.step()
    return {name: x.full_tensor() for name, x in model.state_dict().items()}

def main(rank, world, store, result, configs):
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=timedelta(seconds=120),
    )
    configs = [LongNetConfig.model_validate_json(config) for config in configs]
    states = [train(config, rank, world) for config in configs]
    if rank == 0:
        torch.save(states, result)
    dist.destroy_process_group()

main(int(sys.argv[1]), 2, sys.argv[2], sys.argv[3], sys.argv[4:])
# Gloo's threads outlive the group, and one that frees a tensor while the interpreter is finalized
# ends the process with SIGABRT.
sys.stdout.flush()
os._exit(0)
"""


def trained_alone(config: LongNetConfig) -> LongNetLM:
    torch.manual_seed(0)
    model = LongNetLM(config)
    tokens = torch.randint(23, (4, 41))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(tokens).backward()
        optimizer.step()
    return model


def test_two_processes_with_a_shard_each_train_like_one(tmp_path: Path) -> None:
    result, script = tmp_path / "states.pt", tmp_path / "worker.py"
    script.write_text(WORKER)
    told = [str(tmp_path / "store"), str(result)]
    told += [config.model_dump_json() for config in CONFIGS]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), *told],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    for config, state in zip(CONFIGS, torch.load(result, weights_only=True), strict=True):
        model = trained_alone(config)
        assert set(state) == set(model.state_dict())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                state[name], parameter.detach(), msg=name, rtol=1e-4, atol=1e-5
            )


def gather(store: Path) -> None:
    assert embedding._meet({"a slide": "is empty"}) == {"a slide": "is empty"}


def take_the_loss(store: Path) -> None:
    """Of ranks that share targets, without dilated-ring."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    shape = LongNetConfig(embed_dim=8, num_heads=1, num_layers=1, context=16)
    LongNetLM(shape).loss(torch.zeros(1, 9, dtype=torch.int64), group=dist.group.WORLD)
    leave()


@pytest.mark.parametrize("use_gloo", [gather, take_the_loss])
def test_what_uses_gloo_has_its_threads_rest_at_the_end(
    use_gloo: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []
    monkeypatch.setattr(atexit, "register", told.append)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "::1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    use_gloo(tmp_path / "store")
    assert let_gloo_rest in told
    assert not dist.is_initialized()


LEAVING = """
import pathlib, sys, threading, time
import torch.distributed as dist
from dilated_factory.training.parallel import leave

def work():
    name = pathlib.Path(f"/proc/self/task/{threading.get_native_id()}/comm")
    name.write_text("pt_gloo_runloop")
    started.set()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        pass
    print("let go", flush=True)
    name.write_text("other")

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
started = threading.Event()
thread = threading.Thread(target=work)
thread.start()
started.wait()
leave()
print("left", dist.is_initialized(), flush=True)
thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what threads do")
def test_a_group_is_left_when_gloos_threads_rest(tmp_path: Path) -> None:
    """DistributedDataParallel would wait for them with the lock that they need (torch 2.13)."""
    command = [sys.executable, "-c", LEAVING, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "let go\nleft False\n"
