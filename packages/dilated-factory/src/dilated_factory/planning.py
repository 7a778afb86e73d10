"""What attention over a sequence takes on each of P devices: memory, bytes, operations, time."""

# Shapes: B batch, N length, P devices, n = N / P, H heads, H_kv key heads, D head_dim.

import importlib.util
import time
from dataclasses import dataclass

import torch

from dilated_core import DilatedPattern, dilated_attention
from dilated_factory.errors import missing_package

# Seven products of matrices in a forward and its backward, two of them in the forward.
_TRAINING = 3.5


@dataclass(frozen=True)
class Shape:
    """The attention of one layer.

    Attributes:
        pattern: which keys a query sees.
        length: positions N.
        heads: query heads H.
        head_dim: width D of a head.
        kv_heads: key heads H_kv.
        batch: sequences B.
        is_causal: whether the keys after each query are hidden.
        dtype: of query, key and value.
    """

    pattern: DilatedPattern
    length: int
    heads: int
    head_dim: int
    kv_heads: int
    batch: int = 1
    is_causal: bool = False
    dtype: torch.dtype = torch.bfloat16

    def flops(self) -> int:
        """Operations of a forward."""
        one = self.pattern.flops(self.length, self.heads, self.head_dim, is_causal=self.is_causal)
        return self.batch * one


@dataclass(frozen=True)
class Plan:
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
    shape: Shape,
    devices: int,
    *,
    training: bool,
    flops_per_second: float,
    bytes_per_second: float | None = None,
) -> Plan:
    """Plan attention on P devices that share each sequence, padded to a multiple of P.

    Args:
        shape: the attention.
        devices: P; more than one need dilated-ring, whose plan this is.
        training: count the backward too.
        flops_per_second: what a device reaches in this attention.
        bytes_per_second: what a device receives from others.

    Raises:
        MissingPackageError: several devices, and dilated-ring is not installed.
        ValueError: the shape cannot be spread over so many devices.
    """
    if devices > 1:
        return _spread(shape, devices, training, flops_per_second, bytes_per_second)
    item, rows = shape.dtype.itemsize, shape.batch * shape.length
    inputs = rows * shape.head_dim * (shape.heads + 2 * shape.kv_heads)
    flops = round(shape.flops() * (_TRAINING if training else 1))
    wide = max(4, item)
    return Plan(
        rows=shape.length,
        flops=flops,
        received_bytes=0,
        tensor_bytes=item * (inputs + rows * shape.head_dim * shape.heads)
        + wide * rows * shape.heads,
        gradient_bytes=item * inputs if training else 0,
        message_bytes=0,
        compute_seconds=flops / flops_per_second,
        exchange_seconds=0.0,
        exposed_seconds=0.0,
        strategy=None,
    )


def _spread(
    shape: Shape,
    devices: int,
    training: bool,
    flops_per_second: float,
    bytes_per_second: float | None,
) -> Plan:
    if importlib.util.find_spec("dilated_ring") is None:
        raise missing_package("a plan for several devices", "dilated-ring")
    import dilated_ring

    made = dilated_ring.plan(
        shape.pattern,
        length=-(-shape.length // devices) * devices,
        world_size=devices,
        heads=shape.heads,
        head_dim=shape.head_dim,
        kv_heads=shape.kv_heads,
        batch=shape.batch,
        dtype=shape.dtype,
        is_causal=shape.is_causal,
        flops_per_second=flops_per_second,
        # An unknown speed stays unknown below; bytes do not depend on it.
        bytes_per_second=bytes_per_second or 1.0,
    )
    memory, passes = made.memory, [made.forward] + ([made.backward] if training else [])
    messages = memory.forward_messages
    if training:
        messages = memory.kept + max(messages, memory.backward_messages)
    known = bytes_per_second is not None
    return Plan(
        rows=made.shard,
        flops=round(made.flops * (_TRAINING if training else 1)),
        received_bytes=made.traffic.total if training else made.traffic.forward,
        tensor_bytes=memory.tensors,
        gradient_bytes=memory.gradients if training else 0,
        message_bytes=messages,
        compute_seconds=sum(each.compute for each in passes),
        exchange_seconds=sum(each.communication for each in passes) if known else None,
        exposed_seconds=sum(each.exposed for each in passes) if known else None,
        strategy=f"{made.strategy}: {made.reason}",
    )


def measure_flops_per_second(shape: Shape, *, positions: int = 4096) -> float:
    """What this machine's CPU reaches in a forward of one sequence, cut to some positions."""
    length = min(shape.length, positions)
    query = torch.randn(1, length, shape.heads, shape.head_dim, dtype=shape.dtype)
    flops = shape.pattern.flops(length, shape.heads, shape.head_dim, is_causal=shape.is_causal)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        dilated_attention(query, query, query, shape.pattern, is_causal=shape.is_causal)
        seconds.append(time.perf_counter() - start)
    return flops / min(seconds)
