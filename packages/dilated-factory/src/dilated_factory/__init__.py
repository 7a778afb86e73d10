"""LongNet models, a registry of attention, configurations, training and the command line.

Modules are imported when a name of theirs is first used, so the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dilated_factory.__about__ import __version__
from dilated_factory.errors import (
    CorpusError,
    InputError,
    MissingPackageError,
    RunError,
)

if TYPE_CHECKING:
    from dilated_factory.attention import default_registry
    from dilated_factory.config import LongNetConfig, LongNetEncoderConfig, TrainConfig
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
    from dilated_factory.configs.files import to_toml
    from dilated_factory.configs.kinds import parse_any, read_config
    from dilated_factory.configs.pool import PoolConfig, create_pool
    from dilated_factory.encoder import LongNetEncoder
    from dilated_factory.generation import generate, generate_tokens
    from dilated_factory.interop import register_with_transformers
    from dilated_factory.interop.gigapath import SlideEncoder, SlideEncoderConfig
    from dilated_factory.interop.torchscale import load_torchscale
    from dilated_factory.layers import TransformerDecoderLayer, TransformerEncoderLayer
    from dilated_factory.longnet import LongNetLM
    from dilated_factory.registry import Registry, Runtime, create_attention
    from dilated_factory.selection import Environment, Selection

__all__ = [
    "AttentionConfig",
    "AutoConfig",
    "BlockSparseConfig",
    "BlockSparseDilatedConfig",
    "BlockSparseRingConfig",
    "BlockSparseRingDistributedConfig",
    "CorpusError",
    "DilatedConfig",
    "Environment",
    "InputError",
    "LongNetConfig",
    "LongNetEncoder",
    "LongNetEncoderConfig",
    "LongNetLM",
    "MissingPackageError",
    "MultiheadConfig",
    "PoolConfig",
    "Registry",
    "RingConfig",
    "RingMultiheadConfig",
    "RunError",
    "Runtime",
    "Selection",
    "SlideEncoder",
    "SlideEncoderConfig",
    "TrainConfig",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "__version__",
    "create_attention",
    "create_pool",
    "default_registry",
    "generate",
    "generate_tokens",
    "load_torchscale",
    "parse_any",
    "read_config",
    "register_with_transformers",
    "to_toml",
]

# The module of each name that is not here yet.
_HOMES = {
    "default_registry": "attention",
    "LongNetConfig": "config",
    "LongNetEncoderConfig": "config",
    "TrainConfig": "config",
    "AttentionConfig": "configs.attention",
    "AutoConfig": "configs.attention",
    "BlockSparseConfig": "configs.attention",
    "BlockSparseDilatedConfig": "configs.attention",
    "BlockSparseRingConfig": "configs.attention",
    "BlockSparseRingDistributedConfig": "configs.attention",
    "DilatedConfig": "configs.attention",
    "MultiheadConfig": "configs.attention",
    "RingConfig": "configs.attention",
    "RingMultiheadConfig": "configs.attention",
    "to_toml": "configs.files",
    "parse_any": "configs.kinds",
    "read_config": "configs.kinds",
    "PoolConfig": "configs.pool",
    "create_pool": "configs.pool",
    "LongNetEncoder": "encoder",
    "generate": "generation",
    "generate_tokens": "generation",
    "register_with_transformers": "interop",
    "SlideEncoder": "interop.gigapath",
    "SlideEncoderConfig": "interop.gigapath",
    "load_torchscale": "interop.torchscale",
    "TransformerDecoderLayer": "layers",
    "TransformerEncoderLayer": "layers",
    "LongNetLM": "longnet",
    "Registry": "registry",
    "Runtime": "registry",
    "create_attention": "registry",
    "Environment": "selection",
    "Selection": "selection",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
