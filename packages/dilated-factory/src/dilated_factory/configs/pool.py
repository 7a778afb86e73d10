"""Configuration of a memory pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from dilated_factory.configs.base import KIND, FrozenConfig
from dilated_factory.errors import missing_package

if TYPE_CHECKING:
    from dilated_pool import UnifiedMemoryPool


class PoolConfig(FrozenConfig):
    """`dilated_pool.UnifiedMemoryPool`.

    Examples:
        >>> create_pool(PoolConfig(limit_bytes=1 << 20)).stats().limit_bytes
        1048576
    """

    kind: Annotated[Literal["pool"], KIND] = "pool"
    limit_bytes: int | None = Field(
        default=None, ge=0, description="of blocks, lent and idle; None means no limit"
    )
    # None, as the pool has it, is kept under a word: TOML has no null.
    overhead: Annotated[float, Field(ge=1)] | Literal["unlimited"] = Field(
        default=1.25, description="reserved bytes over the peak of live ones, at most"
    )
    fill: Literal["poison"] | None = Field(
        default=None, description="poison overwrites idle blocks and checks them when lent again"
    )
    stacks: bool = Field(default=False, description="keep where each lease was made; slow")

    @field_validator("overhead", mode="before")
    @classmethod
    def _none_by_its_word(cls, value: Any) -> Any:
        return "unlimited" if value is None else value


def create_pool(config: PoolConfig) -> UnifiedMemoryPool:
    """A new pool, for `create_attention(..., buffers=pool)`.

    Raises:
        MissingPackageError: dilated-pool is not installed.

    Examples:
        >>> create_pool(PoolConfig(limit_bytes=1 << 20)).stats().reserved_bytes
        0
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
