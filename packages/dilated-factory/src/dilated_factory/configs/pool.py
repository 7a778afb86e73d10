"""Configuration of a memory pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from dilated_factory.configs.base import FrozenConfig
from dilated_factory.errors import missing_package

if TYPE_CHECKING:
    from dilated_pool import UnifiedMemoryPool


class PoolConfig(FrozenConfig):
    """`dilated_pool.UnifiedMemoryPool`."""

    kind: Literal["pool"] = "pool"
    limit_bytes: int | None = Field(default=None, ge=0)
    # Not None for the latter: TOML has no null.
    overhead: Annotated[float, Field(ge=1)] | Literal["unlimited"] = 1.25
    fill: Literal["poison"] | None = None
    stacks: bool = False


def create_pool(config: PoolConfig) -> UnifiedMemoryPool:
    """A new pool, for `create_attention(..., buffers=pool)`.

    Raises:
        MissingPackageError: dilated-pool is not installed.
    """
    try:
        from dilated_pool import UnifiedMemoryPool
    except ImportError:
        raise missing_package("kind 'pool'", "dilated-pool") from None
    return UnifiedMemoryPool(
        config.limit_bytes,
        overhead=None if config.overhead == "unlimited" else config.overhead,
        fill=config.fill,
        stacks=config.stacks,
    )
