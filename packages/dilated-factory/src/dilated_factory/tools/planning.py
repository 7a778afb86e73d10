"""What attention over a sequence takes on each of P devices: memory, bytes, operations, time."""

# Shapes: B batch, N length, P devices, n = N / P, H heads, H_kv key heads, D head_dim.

import importlib.util
import time
from dataclasses import dataclass, replace

import torch

from dilated_core import DilatedPattern, dilated_attention
from dilated_factory.errors import missing_package
from dilated_factory.room import require_room


@dataclass(frozen=True)
class Workload:
    """The attention of one layer: one call, and its backward unless `forward_only`.

    Attributes:
        pattern: which keys a query sees.
        length: positions N.
        heads: query heads H.
        head_dim: width D of a head.
        batch: sequences B.
        is_causal: whether the keys after each query are hidden.
        dtype: of query, key and value.
        device: where it is timed.
        forward_only: whether there is no backward.
        kv_heads: key heads H_kv; heads when None.
    """

    pattern: DilatedPattern
    length: int
    heads: int
    head_dim: int
    batch: int = 1
    is_causal: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    forward_only: bool = False
    kv_heads: int | None = None

    def flops(self) -> int:
        """Operations of one forward, by the definition of the pattern."""
        one = self.pattern.flops(self.length, self.heads, self.head_dim, is_causal=self.is_causal)
        return self.batch * one

    @property
    def forwards(self) -> float:
        """How many forwards cost as much; a backward counts as 2.5."""
        return 1.0 if self.forward_only else 3.5


@dataclass(frozen=True)
class Needs:
    """What the device that has most to do needs.

    Attributes:
        rows: positions that it holds, n.
        flops: operations.
        received_bytes: rows and gradients that come from other devices.
        tensor_bytes: query, key, value, output and log-sum-exp.
        gradient_bytes: gradients of query, key and value; 0 without a backward.
        message_bytes: the most that rows of other devices take.
        compute_seconds: of the operations.
        exchange_seconds: of the bytes; None if the speed of the links is not known.
        exposed_seconds: of these, what computing does not hide; None likewise.
        strategy: how rows travel and why; None on one device.
    """

    rows: int
    flops: int
    received_bytes: int
    tensor_bytes: int
    gradient_bytes: int
    message_bytes: int
    compute_seconds: float
    exchange_seconds: float | None
    exposed_seconds: float | None
    strategy: str | None

    @property
    def memory_bytes(self) -> int:
        """The most that is held at once, or a little less."""
        return self.tensor_bytes + self.gradient_bytes + self.message_bytes


def make_plan(
    work: Workload,
    devices: int,
    *,
    flops_per_second: float,
    bytes_per_second: float | None = None,
) -> Needs:
    """Plan attention on P devices that share each sequence, padded to a multiple of P.

    Args:
        work: the attention.
        devices: P; more than one need dilated-ring, whose plan this is.
        flops_per_second: what a device reaches in this attention.
        bytes_per_second: what a device receives from others.

    Raises:
        MissingPackageError: several devices, and dilated-ring is not installed.
        ValueError: the work cannot be spread over so many devices.
    """
    if devices > 1:
        return _spread(work, devices, flops_per_second, bytes_per_second)
    item, rows = work.dtype.itemsize, work.batch * work.length
    inputs = rows * work.head_dim * (work.heads + 2 * (work.kv_heads or work.heads))
    flops = round(work.flops() * work.forwards)
    return Needs(
        rows=work.length,
        flops=flops,
        received_bytes=0,
        tensor_bytes=item * (inputs + rows * work.head_dim * work.heads)
        + max(4, item) * rows * work.heads,
        gradient_bytes=0 if work.forward_only else item * inputs,
        message_bytes=0,
        compute_seconds=flops / flops_per_second,
        exchange_seconds=0.0,
        exposed_seconds=0.0,
        strategy=None,
    )


def _spread(
    work: Workload, devices: int, flops_per_second: float, bytes_per_second: float | None
) -> Needs:
    if importlib.util.find_spec("dilated_ring") is None:
        raise missing_package("a plan for several devices", "dilated-ring")
    import dilated_ring

    made = dilated_ring.plan(
        work.pattern,
        length=-(-work.length // devices) * devices,
        world_size=devices,
        heads=work.heads,
        head_dim=work.head_dim,
        kv_heads=work.kv_heads,
        batch=work.batch,
        dtype=work.dtype,
        is_causal=work.is_causal,
        flops_per_second=flops_per_second,
        # An unknown speed stays unknown below; bytes do not depend on it.
        bytes_per_second=bytes_per_second or 1.0,
    )
    assert made.flops is not None
    memory, messages = made.memory, made.memory.forward_messages
    times = [x for x in (made.forward, made.backward) if x is not None]
    if work.forward_only:
        times = times[:1]
    else:
        messages = memory.kept + max(messages, memory.backward_messages)
    known = bytes_per_second is not None
    return Needs(
        rows=made.shard,
        flops=round(made.flops * work.forwards),
        received_bytes=made.traffic.forward if work.forward_only else made.traffic.total,
        tensor_bytes=memory.tensors,
        gradient_bytes=0 if work.forward_only else memory.gradients,
        message_bytes=messages,
        compute_seconds=sum(each.compute for each in times),
        exchange_seconds=sum(each.communication for each in times) if known else None,
        exposed_seconds=sum(each.exposed for each in times) if known else None,
        strategy=f"{made.strategy}: {made.reason}",
    )


def measure_flops_per_second(work: Workload, *, positions: int = 4096) -> float:
    """What this machine's CPU reaches in a forward of one sequence, cut to some positions."""
    one = replace(work, length=min(work.length, positions), batch=1)
    rows = one.length * one.heads * one.head_dim
    require_room("what is measured without --tflops", 2 * rows * one.dtype.itemsize)
    query = torch.randn(1, one.length, one.heads, one.head_dim, dtype=one.dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        dilated_attention(query, query, query, one.pattern, is_causal=one.is_causal)
        seconds.append(time.perf_counter() - start)
    return one.flops() / min(seconds)
