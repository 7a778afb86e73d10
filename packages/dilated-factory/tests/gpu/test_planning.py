"""What is planned for a training step is what the GPU's allocator says."""

import gc
from typing import Any

import pytest
import torch

from dilated_factory import LongNetConfig, TrainConfig
from dilated_factory.training.optimizer import build_optimizers
from dilated_factory.training.parallel import Parallel
from dilated_factory.training.planning import Setup, plan_training
from dilated_factory.training.precision import autocast
from dilated_factory.training.weights import RECOMPUTED, initial_model

SHAPE: dict[str, Any] = {"embed_dim": 512, "num_heads": 8, "num_layers": 6, "context": 16384}


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_an_eager_forward_keeps_is_planned(recompute: Any, dtype: Any) -> None:
    config = TrainConfig(
        model=LongNetConfig(**SHAPE), batch_size=2, steps=1, dtype=dtype, recompute=recompute
    )
    device = torch.device("cuda")
    model = initial_model(config).to(device)
    model.activation_checkpointing = RECOMPUTED[recompute]
    windows = torch.randint(256, (2, SHAPE["context"] + 1))
    (share,) = Parallel(device).shares(windows)
    tokens, targets, positions, _ = share.to(device)
    own = {x.data_ptr() for x in (tokens, targets, *model.parameters())}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, autocast(device, config.dtype):
        model.loss(tokens, targets, positions=positions)
    counted = sum(size for size, _ in kept.values())
    # Positions and their table are among them, or not.
    assert counted == pytest.approx(
        plan_training(config, Setup("cuda", False)).activations, rel=0.02
    )


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_the_peak_of_a_step_is_within_a_tenth(recompute: Any, compiled: bool) -> None:
    config = TrainConfig(
        model=LongNetConfig(**SHAPE), batch_size=2, steps=1, dtype="bfloat16", recompute=recompute
    )
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    device = torch.device("cuda")
    parallel = Parallel(device)
    model = initial_model(config).to(device)
    model.activation_checkpointing = RECOMPUTED[recompute]
    if compiled:
        model.compile_blocks()
    optimizers = build_optimizers(model, config)
    windows = torch.randint(256, (2, SHAPE["context"] + 1))
    for _ in range(2):  # the second has all state, and compiles nothing
        torch.cuda.reset_peak_memory_stats()
        (share,) = parallel.shares(windows)
        tokens, targets, positions, _ = share.to(device)
        with autocast(device, config.dtype):
            loss = model.loss(tokens, targets, positions=positions)
        loss.backward()
        parallel.clip_gradients(model, config.gradient_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    measured = torch.cuda.max_memory_allocated() - before
    assert plan_training(config, Setup("cuda", compiled)).peak == pytest.approx(measured, rel=0.1)
