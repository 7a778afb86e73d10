"""What `dilated plan model` says beside what training takes: bytes kept for backward, peaks.

On the CPU the bytes that a forward keeps are counted by hooks of autograd, each storage once and
parameters left out, and the peak of a whole step by torch's profiler, where nothing is compiled. On
CUDA the peak of a step is what torch's allocator says, and the script fails if a plan is further
from it than a tenth.

    python benchmarks/plan.py --device cpu [--json FILE]
    python benchmarks/plan.py --device cuda [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from typing import Any, get_args

import torch
from _machine import describe
from torch.profiler import ProfilerActivity, profile

from dilated_factory import LongNetConfig, TrainConfig
from dilated_factory.training.optimizer import build_optimizers
from dilated_factory.training.parallel import Parallel
from dilated_factory.training.planning import Recomputed, Setup, plan_training
from dilated_factory.training.precision import autocast
from dilated_factory.training.weights import RECOMPUTED, initial_model

SMALL: tuple[dict[str, Any], ...] = (
    {"embed_dim": 64, "num_heads": 4, "num_layers": 4, "context": 512},
    {"embed_dim": 48, "num_heads": 2, "num_layers": 2, "context": 96, "ffn_dim": 320,
     "vocab_size": 1000, "positions": "xpos"},
)  # fmt: skip
LARGE: tuple[dict[str, Any], ...] = (
    {"embed_dim": 768, "num_heads": 12, "num_layers": 12, "context": 65536},
    {"embed_dim": 512, "num_heads": 8, "num_layers": 8, "context": 32768},
    {"embed_dim": 2048, "num_heads": 16, "num_layers": 16, "context": 2048, "vocab_size": 50000},
)
WITHIN = 0.1


def main() -> None:
    """Plan and measure each setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", help="write the results to this file")
    arguments = parser.parse_args()
    machine = describe(arguments.device)
    print(json.dumps(machine), flush=True)
    settings = itertools.product(
        SMALL if arguments.device == "cpu" else LARGE,
        (False, True),
        ("float32", "bfloat16") if arguments.device == "cpu" else ("bfloat16",),
        get_args(Recomputed),
    )
    rows = []
    for shape, compiled, dtype, recompute in settings:
        config = TrainConfig(
            model=LongNetConfig(**shape), batch_size=2, steps=1, dtype=dtype, recompute=recompute,
        )  # fmt: skip
        row = {
            **shape, "compiled": compiled, "dtype": dtype, "recompute": recompute,
            **measure(config, Setup(arguments.device, compiled)),
        }  # fmt: skip
        rows.append(row)
        print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        torch._dynamo.reset()
        if arguments.json:
            with open(arguments.json, "w", encoding="utf-8") as file:
                json.dump({"machine": machine, "plans": rows}, file, indent=1)
    far = [row for row in rows if abs(row.get("peak_ratio", 1) - 1) > WITHIN]
    if far and arguments.device == "cuda":
        sys.exit(f"{len(far)} plans are further than {WITHIN:.0%} from what was measured")


def measure(config: TrainConfig, setup: Setup) -> dict[str, Any]:
    """A step, planned and measured."""
    needs = plan_training(config, setup)
    device = torch.device(setup.device)
    parallel = Parallel(device)
    model = initial_model(config, parallel.attention(config)).to(device)
    model.activation_checkpointing = RECOMPUTED[config.recompute]
    if setup.compiled:
        model.compile_blocks()
    optimizers = build_optimizers(model, config)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    windows = torch.randint(config.model.vocab_size, (config.batch_size, config.model.context + 1))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def loss() -> torch.Tensor:
        (share,) = parallel.shares(windows)
        tokens, targets, positions, _ = share.to(device)
        own.update(x.untyped_storage().data_ptr() for x in (tokens, targets, positions))
        with autocast(device, config.dtype):
            return model.loss(tokens, targets, positions=positions)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    step()
    found: dict[str, Any] = {"planned_peak": needs.peak}
    if setup.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        found["measured_peak"] = torch.cuda.max_memory_allocated()
        model = optimizers = None  # type: ignore[assignment]  # the next one needs the room
        torch.cuda.empty_cache()
    else:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = loss()
        del total
        expected = needs.activations
        # The table that is given to a block which is computed again is held, but no hook sees it.
        if config.recompute != "all":
            expected += needs.inputs - 8 * (2 * config.batch_size + 1) * config.model.context
        found |= {"planned_kept": expected, "counted_kept": sum(kept.values())}
        if not setup.compiled:
            found["measured_peak"] = needs.weights + needs.optimizer + allocated(step)
    if "measured_peak" in found:
        found["peak_ratio"] = round(needs.peak / found["measured_peak"], 3)
    return found


def allocated(step: Any) -> int:
    """The most bytes on the CPU at once that a call allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as told:
        step()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in told.profiler.kineto_results.events()  # type: ignore[union-attr]  # set once it has run
        if event.name() == "[memory]"
    )
    return max(itertools.accumulate(change for _, change in changes))


if __name__ == "__main__":
    main()
