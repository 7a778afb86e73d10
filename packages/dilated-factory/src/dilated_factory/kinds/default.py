"""The default registry: each kind of attention as a composition of what the packages offer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from dilated_core import DilatedAttention, DilatedPattern, MultiheadDilatedAttention
from dilated_core.interfaces import BufferSource
from dilated_factory.configs.attention import (
    AttentionConfig,
    AutoConfig,
    BlockSparseConfig,
    BlockSparseDilatedConfig,
    BlockSparseRingConfig,
    BlockSparseRingDistributedConfig,
    DilatedConfig,
    MultiheadConfig,
    RingConfig,
    RingMultiheadConfig,
)
from dilated_factory.configs.layouts import LayoutConfig, build_layout
from dilated_factory.kinds.registry import Registry, Runtime
from dilated_factory.kinds.selection import Environment, Selection

if TYPE_CHECKING:
    from dilated_sparse import BlockLayout


def default_registry() -> Registry:
    """A new registry of all that the installed packages can build.

    Kinds that need a package that is not installed are known to it by name, and asking for one is
    an error that says what to install.

    Examples:
        >>> registry = default_registry()  # a new one of what is installed
        >>> registry is default_registry()
        False
    """
    registry = Registry()
    register_dilated(registry)
    for register, kinds, packages in _OPTIONAL:
        missing = [package for package in packages if not _installed(package)]
        if not missing:
            register(registry)
        for kind in kinds if missing else ():
            registry.register_missing(kind, *missing)
    return registry


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def register_dilated(registry: Registry) -> None:
    """Register `dilated`, `dilated_multihead` and `auto`, which need dilated-core only."""
    registry.register(DilatedConfig, _dilated)
    registry.register(MultiheadConfig, _multihead)
    registry.register(AutoConfig, _auto)


def register_ring(registry: Registry) -> None:
    """Register `ring` and `ring_multihead`, which need dilated-ring."""
    registry.register(RingConfig, _ring)
    registry.register(RingMultiheadConfig, _ring_multihead)


def register_sparse(registry: Registry) -> None:
    """Register `block_sparse` and `block_sparse_dilated`, which need dilated-sparse."""
    registry.register(BlockSparseConfig, _block_sparse)
    registry.register(BlockSparseDilatedConfig, _block_sparse_dilated)


def register_sparse_ring(registry: Registry) -> None:
    """Register `block_sparse_ring` and its form for meshes, which need ring and sparse."""
    registry.register(BlockSparseRingConfig, _block_sparse_ring)
    registry.register(BlockSparseRingDistributedConfig, _block_sparse_ring_distributed)


# What registers which kinds, and the packages beyond dilated-core that they need.
_OPTIONAL = (
    (register_ring, ("ring", "ring_multihead"), ("dilated-ring",)),
    (register_sparse, ("block_sparse", "block_sparse_dilated"), ("dilated-sparse",)),
    (
        register_sparse_ring,
        ("block_sparse_ring", "block_sparse_ring_distributed"),
        ("dilated-ring", "dilated-sparse"),
    ),
)


class LayoutAttention(nn.Module):
    """Attention over a layout that is built for the length of each call.

    Args:
        layout: what to build.
        make: the attention over one layout. It has no parameters, so it is made at each call.
        spread: the ranks that a sequence is spread over in equal parts; None where it is not.
    """

    def __init__(
        self,
        layout: LayoutConfig,
        make: Callable[[BlockLayout], nn.Module],
        *,
        spread: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.make = make
        self.spread = spread

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend: query (B, N, H, D), key and value (B, N, H_kv, D), mask (B, N) True = ignore."""
        length = query.shape[1] * (1 if self.spread is None else self.spread.count())
        attention = self.make(build_layout(self.layout, length)).train(self.training)
        out: Tensor = attention(
            query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask
        )
        return out

    def extra_repr(self) -> str:
        """The layout."""
        return repr(self.layout)


class Ranks:
    """A group that copies of a module share, since groups cannot be copied.

    Args:
        group: None for all ranks.
    """

    def __init__(self, group: ProcessGroup | DeviceMesh | None) -> None:
        self.group = group

    def count(self) -> int:
        """How many there are."""
        if isinstance(self.group, DeviceMesh):
            return self.group.size()
        if not dist.is_available() or not dist.is_initialized():
            return 1
        return dist.get_world_size(self.group)

    def __deepcopy__(self, memo: dict[int, object]) -> Ranks:
        return self


def _require_local(config: AttentionConfig, runtime: Runtime) -> None:
    for name in ("group", "buffers"):
        if getattr(runtime, name) is not None:
            raise ValueError(
                f"{name} must be None for kind {config.kind!r}, which exchanges nothing. "
                f"Got {getattr(runtime, name)!r}."
            )


def _dilated(config: DilatedConfig, runtime: Runtime) -> nn.Module:
    _require_local(config, runtime)
    return DilatedAttention(
        config.pattern, scale=config.scale, dropout=config.dropout, backend=config.backend
    )


def _multihead(config: MultiheadConfig, runtime: Runtime) -> nn.Module:
    attention = runtime.registry.create(
        config.attention, group=runtime.group, buffers=runtime.buffers
    )
    return MultiheadDilatedAttention(
        config.embed_dim,
        config.num_heads,
        None,
        num_kv_heads=config.num_kv_heads,
        bias=config.bias,
        layer_norm=config.layer_norm,
        layer_norm_eps=config.layer_norm_eps,
        gamma_init=config.gamma_init,
        attention=attention,
    )


def _auto(config: AutoConfig, runtime: Runtime) -> nn.Module:
    selection = Selection.of(config, Environment.of(runtime.registry))
    return runtime.registry.create(selection.config, group=runtime.group, buffers=runtime.buffers)


def _ring(config: RingConfig, runtime: Runtime) -> nn.Module:
    return _ring_over(
        config.pattern, config=config, ranks=Ranks(runtime.group), buffers=runtime.buffers
    )


def _ring_multihead(config: RingMultiheadConfig, runtime: Runtime) -> nn.Module:
    from dilated_ring import RingMultiheadDilatedAttention

    return RingMultiheadDilatedAttention(
        config.embed_dim,
        config.num_heads,
        config.pattern,
        num_kv_heads=config.num_kv_heads,
        bias=config.bias,
        layer_norm=config.layer_norm,
        layer_norm_eps=config.layer_norm_eps,
        gamma_init=config.gamma_init,
        dropout=config.dropout,
        group=runtime.group,
        strategy=config.strategy,
        validate=config.validate_ranks,
        buffers=runtime.buffers,
    )


def _block_sparse(config: BlockSparseConfig, runtime: Runtime) -> nn.Module:
    from dilated_sparse import BlockSparseAttention

    _require_local(config, runtime)
    make = partial(
        BlockSparseAttention, scale=config.scale, dropout=config.dropout, backend=config.backend
    )
    return LayoutAttention(config.layout, make)


def _block_sparse_dilated(config: BlockSparseDilatedConfig, runtime: Runtime) -> nn.Module:
    from dilated_sparse import BlockSparseDilatedAttention

    _require_local(config, runtime)
    make = partial(
        BlockSparseDilatedAttention,
        config.pattern,
        scale=config.scale,
        dropout=config.dropout,
        backend=config.backend,
    )
    return LayoutAttention(config.layout, make)


def _block_sparse_ring(config: BlockSparseRingConfig, runtime: Runtime) -> nn.Module:
    return _over_ranks(config, runtime)


def _block_sparse_ring_distributed(
    config: BlockSparseRingDistributedConfig, runtime: Runtime
) -> nn.Module:
    if runtime.group is not None and getattr(runtime.group, "ndim", 1) != 2:
        raise ValueError(
            f"group must be a DeviceMesh of two dimensions, (nodes, ranks on a node), for kind "
            f"{config.kind!r}. Got {runtime.group!r}."
        )
    return _over_ranks(config, runtime)


def _over_ranks(
    config: BlockSparseRingConfig | BlockSparseRingDistributedConfig, runtime: Runtime
) -> nn.Module:
    ranks = Ranks(runtime.group)
    make = partial(_ring_over, config=config, ranks=ranks, buffers=runtime.buffers)
    return LayoutAttention(config.layout, make, spread=ranks)


def _ring_over(
    pattern: BlockLayout | DilatedPattern,
    *,
    config: RingConfig | BlockSparseRingConfig | BlockSparseRingDistributedConfig,
    ranks: Ranks,
    buffers: BufferSource | None,
) -> nn.Module:
    from dilated_ring import RingDilatedAttention

    return RingDilatedAttention(
        pattern,
        group=ranks.group,
        scale=config.scale,
        dropout=config.dropout,
        strategy=config.strategy,
        validate=config.validate_ranks,
        buffers=buffers,
    )
