"""The hash of `dilated_core._dropout`, on uint32."""

# Kernels are a language of their own: their names have no Python types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def mix(x):
    """The hash of `dilated_core._dropout`, on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def state_of_call(seed, batch):
    """The hash's state after the seed and the batch row."""
    state = mix((seed & 0xFFFFFFFF).to(tl.uint32))
    state = mix(state ^ ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    return mix(state ^ batch.to(tl.uint32))


@triton.jit
def state_of_query(call_state, head, position):
    return mix(mix(call_state ^ head.to(tl.uint32)) ^ position.to(tl.uint32))


@triton.jit
def state_of_key(position):
    return mix(position.to(tl.uint32) ^ 0x9E3779B9)
