"""All kinds of configuration of the project, and any of them from plain data or a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dilated_factory.configs.attention import (
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
from dilated_factory.configs.base import FrozenConfig, did_you_mean, parse_config
from dilated_factory.configs.files import read_values
from dilated_factory.configs.genomes import GenomeConfig
from dilated_factory.configs.models import LongNetConfig, LongNetEncoderConfig, TrainConfig
from dilated_factory.configs.pool import PoolConfig
from dilated_factory.configs.slides import SlideEncoderConfig, SlideTaskConfig
from dilated_factory.errors import InputError

_TYPES: tuple[type[FrozenConfig], ...] = (
    DilatedConfig,
    MultiheadConfig,
    RingConfig,
    RingMultiheadConfig,
    BlockSparseConfig,
    BlockSparseDilatedConfig,
    BlockSparseRingConfig,
    BlockSparseRingDistributedConfig,
    AutoConfig,
    PoolConfig,
    LongNetConfig,
    LongNetEncoderConfig,
    SlideEncoderConfig,
    SlideTaskConfig,
    GenomeConfig,
    TrainConfig,
)
CONFIG_TYPES: Mapping[str, type[FrozenConfig]] = MappingProxyType(
    {kind.model_fields["kind"].default: kind for kind in _TYPES}
)


def config_type(kind: object) -> type[FrozenConfig]:
    """The class of the configurations of a kind.

    Raises:
        InputError: the kind is not known.
    """
    if isinstance(kind, str) and kind in CONFIG_TYPES:
        return CONFIG_TYPES[kind]
    raise InputError(f"kind {kind!r} is not known. {did_you_mean(str(kind), CONFIG_TYPES)}")


def parse_any(values: Mapping[str, Any]) -> FrozenConfig:
    """A configuration from plain data whose `kind` says which.

    Raises:
        InputError: no kind, an unknown one, or an invalid field.

    Examples:
        >>> parse_any({"kind": "dilated", "segment_lengths": [64], "dilation_rates": [1]}).kind
        'dilated'
    """
    if "kind" not in values:
        raise InputError(f"kind is required: one of {', '.join(map(repr, CONFIG_TYPES))}.")
    return parse_config(config_type(values["kind"]), values)


def read_config(path: str | Path) -> FrozenConfig:
    r"""The configuration in a JSON or TOML file.

    Raises:
        InputError: as `parse_any`, or the file is not what its name's ending says.
        OSError: the file cannot be read.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("pool.toml").write_text('kind = "pool"\nlimit_bytes = 1024')
        >>> read_config("pool.toml").limit_bytes
        1024
    """
    return parse_any(read_values(path))
