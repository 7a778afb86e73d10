"""One sequence over two processes: each holds a half, and together they give what one would.

    python examples/two_ranks.py
    torchrun --nproc-per-node 2 examples/two_ranks.py

Without torchrun the file starts its two processes itself. On GPUs the backend is "nccl", and each
rank moves its share to its own device.
"""

import tempfile

import torch
import torch.distributed as dist

from dilated_core import DilatedPattern, MultiheadDilatedAttention
from dilated_ring import (
    RingMultiheadDilatedAttention,
    local_positions,
    plan,
    shard_sequence,
    shared_loss,
    unshard_sequence,
)

WIDTH, HEADS, LENGTH = 64, 4, 1500  # the length need not divide
PATTERN = DilatedPattern([128, 512, 2048], [1, 4, 16])


def work() -> None:
    """What each rank does; the process group is there."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights and the same sequence on all ranks
    layer = RingMultiheadDilatedAttention(WIDTH, HEADS, PATTERN)
    sequence = torch.randn(1, LENGTH, WIDTH)  # (batch, length, width)

    # This rank's rows; those that fill the last rank's share are padding.
    rows, padding = shard_sequence(sequence, multiple_of=64)
    places = local_positions(rows.shape[1])  # what position embeddings would take
    output, _ = layer(rows, is_causal=True, key_padding_mask=padding)
    whole = unshard_sequence(output, length=LENGTH)

    # A mean over the rows of all ranks: each knows how many of its own count.
    real = torch.ones_like(rows[..., 0], dtype=torch.bool) if padding is None else ~padding
    summed = output[real].square().sum()
    loss = shared_loss(summed, output, weight=real.sum())
    loss.backward()
    for weight in layer.parameters():  # as DistributedDataParallel does
        dist.all_reduce(weight.grad)
        weight.grad /= ranks

    # The same layer in one process: its state dict fits.
    alone = MultiheadDilatedAttention(WIDTH, HEADS, PATTERN)
    alone.load_state_dict(layer.state_dict())
    expected, _ = alone(sequence, is_causal=True)
    (expected.square().sum() / LENGTH).backward()
    off = (whole - expected).abs().max().item()
    pairs = zip(layer.parameters(), alone.parameters(), strict=True)
    off_gradient = max((a.grad - b.grad).abs().max().item() for a, b in pairs)

    told: list[str | None] = [None] * ranks
    dist.all_gather_object(told, f"rank {rank}: {rows.shape[1]} rows, from {places[0].item()} on")
    if rank == 0:
        print("\n".join(map(str, told)))
        print(f"output: differs from one process by {off:.1e}, gradients by {off_gradient:.1e}")
        job = plan(PATTERN, length=2048, world_size=ranks, heads=HEADS, head_dim=16, is_causal=True)
        print(f"rows travel by {job.strategy!r}")
    assert max(off, off_gradient) < 1e-4


def start(rank: int, ranks: int, meeting: str) -> None:
    """A process that this file starts itself."""
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    work()
    dist.destroy_process_group()


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        work()
        dist.destroy_process_group()
    else:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (2, f"file://{folder}/meeting")
            torch.multiprocessing.spawn(start, arguments, nprocs=2)
