"""The registry: from a configuration's kind to the function that builds it. Nothing is global."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_args

from pydantic import ValidationError
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from dilated_core.interfaces import BufferSource
from dilated_factory.configs.attention import AttentionConfig
from dilated_factory.configs.base import describe_invalid, did_you_mean
from dilated_factory.errors import InputError, missing_package

ConfigT = TypeVar("ConfigT", bound=AttentionConfig)


@dataclass(frozen=True)
class Runtime:
    """What a module needs beside its configuration and what only exists in a running process.

    Attributes:
        registry: for what is built inside, such as the attention in multihead attention.
        group: the ranks that a sequence is spread over; None for torch's default group, or for
            none if there is no such.
        buffers: where buffers of exchanges come from, such as a memory pool; None for torch.

    Examples:
        >>> Runtime(default_registry()).group is None
        True
    """

    registry: Registry
    group: ProcessGroup | DeviceMesh | None = None
    buffers: BufferSource | None = None


Build = Callable[[ConfigT, Runtime], nn.Module]


@dataclass(frozen=True)
class _Entry(Generic[ConfigT]):
    config_type: type[ConfigT]
    build: Build[ConfigT]


class Registry:
    """Kinds of attention and how each is built. Empty at first; see `default_registry`.

    A plain object: importing a package changes no registry, and two registries share nothing.
    Copies are independent; pickling works if the registered functions can be pickled. All methods
    can be called from any thread.

    Examples:
        >>> registry = default_registry()
        >>> attention = registry.create(
        ...     {"kind": "dilated", "segment_lengths": [64, 256], "dilation_rates": [1, 4]}
        ... )
        >>> attention.pattern
        DilatedPattern([64, 256], [1, 4])
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry[Any]] = {}
        self._missing: dict[str, tuple[str, ...]] = {}

    def register(self, config_type: type[ConfigT], build: Build[ConfigT]) -> None:
        """Let `build(config, runtime)` make the modules for configurations of this type.

        Args:
            config_type: a subclass of AttentionConfig whose `kind` is a literal with a default.
            build: returns a module that satisfies `dilated_core.interfaces.AttentionModule`, or
                multihead attention.

        Raises:
            TypeError: `config_type` is no such class.
            ValueError: its kind is taken.
        """
        kind = _kind_of(config_type)
        entry = _Entry(config_type, build)
        # setdefault is atomic: of two threads that register one kind, one gets the error.
        if self._entries.setdefault(kind, entry) is not entry:
            raise ValueError(f"kind must be new in this registry. Got {kind!r}.")

    def register_missing(self, kind: str, *packages: str) -> None:
        """Let requests for `kind` say that these packages must be installed."""
        self._missing[kind] = packages

    def __contains__(self, kind: object) -> bool:
        return kind in self._entries

    def __iter__(self) -> Iterator[str]:
        """The kinds that can be built, in the order in which they were registered."""
        return iter(tuple(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def missing(self) -> dict[str, tuple[str, ...]]:
        """The kinds that cannot be built, and the packages that each needs."""
        return {k: packages for k, packages in self._missing.copy().items() if k not in self}

    def config_type(self, kind: str) -> type[AttentionConfig]:
        """The class of the configurations of a kind.

        Raises:
            MissingPackageError: the kind is known, but needs packages that are not installed.
            InputError: (a ValueError) the kind is not known.
        """
        return self._entry(kind).config_type

    def parse(self, values: Mapping[str, Any]) -> AttentionConfig:
        """A configuration from plain data whose `kind` says which.

        Raises:
            MissingPackageError: the kind is known, but needs packages that are not installed.
            InputError: (a ValueError) the kind is not known, or a field is invalid.
        """
        if "kind" not in values:
            raise InputError(f"kind is required: one of {', '.join(map(repr, self))}. Got none.")
        config_type = self.config_type(values["kind"])
        kinds = {kind: entry.config_type for kind, entry in self._entries.copy().items()}
        try:
            return config_type.model_validate(values, context={"kinds": kinds})
        except ValidationError as error:
            raise InputError(describe_invalid(error)) from None

    def create(
        self,
        config: AttentionConfig | Mapping[str, Any],
        *,
        group: ProcessGroup | DeviceMesh | None = None,
        buffers: BufferSource | None = None,
    ) -> nn.Module:
        """The module that a configuration asks for.

        Args:
            config: a configuration, or plain data that `parse` takes.
            group: the ranks that a sequence is spread over, where the kind spreads it.
            buffers: where buffers of exchanges come from, where there are exchanges.

        Raises:
            MissingPackageError: the kind is known, but needs packages that are not installed.
            InputError: (a ValueError) the kind is not known, or a field is invalid.
            TypeError: `config` is neither, or not of the class that was registered for its kind.
            ValueError: a group or buffers are given to a kind that uses none.
        """
        if isinstance(config, Mapping):
            config = self.parse(config)
        if not isinstance(config, AttentionConfig):
            raise TypeError(
                f"config must be an AttentionConfig or a mapping. Got {type(config).__name__}."
            )
        entry = self._entry(config.kind)
        if not isinstance(config, entry.config_type):
            raise TypeError(
                f"config must be a {entry.config_type.__name__} for kind {config.kind!r}. "
                f"Got {type(config).__name__}."
            )
        return entry.build(config, Runtime(self, group, buffers))

    def _entry(self, kind: object) -> _Entry[Any]:
        entry = self._entries.get(kind) if isinstance(kind, str) else None
        if entry is not None:
            return entry
        if isinstance(kind, str) and (packages := self._missing.get(kind)):
            raise missing_package(f"kind {kind!r}", *packages)
        known = [*self, *self.missing()]
        raise InputError(f"kind {kind!r} is not registered. {did_you_mean(str(kind), known)}")


def create_attention(
    config: AttentionConfig | Mapping[str, Any],
    registry: Registry,
    *,
    group: ProcessGroup | DeviceMesh | None = None,
    buffers: BufferSource | None = None,
) -> nn.Module:
    """`registry.create(config, ...)`, for callers that get both from outside.

    Examples:
        >>> values = {"kind": "dilated", "segment_lengths": [64, 256], "dilation_rates": [1, 4]}
        >>> create_attention(values, default_registry()).pattern
        DilatedPattern([64, 256], [1, 4])
    """
    return registry.create(config, group=group, buffers=buffers)


def _kind_of(config_type: type[AttentionConfig]) -> str:
    if not (isinstance(config_type, type) and issubclass(config_type, AttentionConfig)):
        raise TypeError(f"config_type must be a subclass of AttentionConfig. Got {config_type!r}.")
    field = config_type.model_fields["kind"]
    if get_args(field.annotation) != (field.default,):
        raise TypeError(
            f"config_type must have a kind that is a literal with a default, as in "
            f"`kind: Literal['mine'] = 'mine'`. Got {config_type.__name__}."
        )
    kind: str = field.default
    return kind
