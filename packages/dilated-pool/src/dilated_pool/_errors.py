"""The errors of the pool."""


class PoolError(RuntimeError):
    """What every error of the pool is.

    Examples:
        >>> try:
        ...     UnifiedMemoryPool(limit_bytes=64).lease((1000,))
        ... except PoolError as error:
        ...     print(type(error).__name__)
        PoolLimitError
    """


class PoolLimitError(PoolError):
    """A block would take the reserved bytes over the limit.

    Attributes:
        needed_bytes: size of the block that was asked for.
        limit_bytes: the pool's limit.

    Examples:
        >>> try:
        ...     UnifiedMemoryPool(limit_bytes=64).lease((1000,))
        ... except PoolLimitError as error:
        ...     print(error.needed_bytes, error.limit_bytes)
        4096 64
    """

    def __init__(self, needed_bytes: int, limit_bytes: int, situation: str) -> None:
        super().__init__(
            f"a block of {needed_bytes} bytes does not fit into limit_bytes={limit_bytes}: "
            f"{situation}"
        )
        self.needed_bytes = needed_bytes
        self.limit_bytes = limit_bytes


class PoolLockedError(PoolError):
    """The pool is locked and a lease, made at the place the message names, needed a new block.

    Examples:
        >>> pool = UnifiedMemoryPool()
        >>> pool.lock()
        >>> pool.lease((2,))
        Traceback (most recent call last):
        dilated_pool._errors.PoolLockedError: ...
    """


class PoolClosedError(PoolError):
    """The pool is closed.

    Examples:
        >>> pool = UnifiedMemoryPool()
        >>> pool.close()
        >>> pool.lease((2,))
        Traceback (most recent call last):
        dilated_pool._errors.PoolClosedError: ...
    """


class PoolReentryError(PoolError):
    """A finalizer or signal handler that interrupted the pool asked the same pool for memory.

    Examples:
        >>> issubclass(PoolReentryError, PoolError)
        True
    """

    def __init__(self) -> None:
        super().__init__(
            "a finalizer or signal handler interrupted this pool and asked it for memory"
        )


class PoolCorruptionError(PoolError):
    """A block's poison was overwritten while nobody held a lease of it.

    Examples:
        >>> issubclass(PoolCorruptionError, PoolError)  # raised with fill="poison" only
        True
    """


class LeaseReleasedError(PoolError):
    """A lease, or its tensor, was used after the lease's release.

    Examples:
        >>> with UnifiedMemoryPool().borrow((2,), dtype=torch.float32, device="cpu") as buffer:
        ...     pass
        >>> buffer.sum()
        Traceback (most recent call last):
        dilated_pool._errors.LeaseReleasedError: ...
    """
