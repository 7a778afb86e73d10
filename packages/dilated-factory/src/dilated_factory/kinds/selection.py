"""`Selection`: which kind of attention and which backend serve a request, and why no other.

A pure function of the request and of the environment, which says what is installed.
"""

# Shapes: N length, H heads, D head_dim, P world, n = N / P.

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch

from dilated_factory.configs.attention import (
    AttentionConfig,
    AutoConfig,
    BlockSparseConfig,
    BlockSparseDilatedConfig,
    BlockSparseRingConfig,
    BlockSparseRingDistributedConfig,
    DilatedConfig,
    RingConfig,
)
from dilated_factory.errors import InputError, missing_package
from dilated_factory.kinds.cost import Cost, estimate
from dilated_factory.kinds.registry import Registry

# What dilated-core's kernels serve; `select_backend` there decides again for each call.
_TRITON_DTYPES = ("float16", "bfloat16", "float32")
_TRITON_MAX_HEAD_DIM = 256
_TRITON_MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Environment:
    """What there is to choose from.

    Attributes:
        kinds: the kinds that can be built.
        missing: the packages that other kinds need.
        triton: whether triton is installed.
        capability: compute capability of the CUDA device, None where there is none.

    Examples:
        >>> "dilated" in Environment.of(default_registry()).kinds
        True
    """

    kinds: frozenset[str]
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    triton: bool = False
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, registry: Registry) -> Self:
        """This process, with the kinds of a registry."""
        return cls(
            frozenset(registry),
            registry.missing(),
            importlib.util.find_spec("triton") is not None,
            torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
        )


class Rejected(NamedTuple):
    """A kind and backend that was not picked, and why."""

    kind: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """The pick for a request.

    Attributes:
        kind: of the attention.
        backend: that computes it.
        config: what `create_attention` takes to build it. Its backend is that of the request: a
            call on another device takes the backend that serves it there.
        reason: why it was picked.
        cost: what it is estimated to cost.
        rejected: every other kind and backend, and why it was not.

    Examples:
        >>> request = AutoConfig(
        ...     length=4096,
        ...     heads=8,
        ...     head_dim=64,
        ...     segment_lengths=(64, 4096),
        ...     dilation_rates=(1, 16),
        ... )
        >>> Selection.of(request, Environment.of(default_registry())).kind
        'dilated'
    """

    kind: str
    backend: str
    config: AttentionConfig
    reason: str
    cost: Cost
    rejected: tuple[Rejected, ...]

    @classmethod
    def of(cls, request: AutoConfig, environment: Environment) -> Self:
        """The cheapest of the kinds and backends that compute what is requested.

        Raises:
            MissingPackageError: the request can be served, once a package is installed.
            InputError: (a ValueError) no kind serves it; the message says why of each.
            ValueError: the layout does not fit the length or the heads.
        """
        costs: dict[_Candidate, Cost] = {}
        rejected = []
        for candidate in _CANDIDATES:
            why = _obstacle(candidate, request, environment)
            if why is None:
                kind = _KINDS[candidate.kind]
                costs[candidate] = estimate(
                    request, candidate.backend, spread=kind.spread, mesh=kind.mesh
                )
            else:
                rejected.append(Rejected(candidate.kind, candidate.backend, why))
        if not costs:
            raise _nothing(request, environment, rejected)
        best = min(costs, key=lambda candidate: costs[candidate].seconds)
        for other, cost in costs.items():
            if other is not best:
                slower = cost.seconds / costs[best].seconds
                why = f"it is estimated to take {slower:.2f} times as long as the pick"
                rejected.append(Rejected(other.kind, other.backend, why))
        return cls(
            best.kind,
            best.backend,
            _config(best.kind, request),
            _reason(best, request, len(costs)),
            costs[best],
            tuple(rejected),
        )


class _Candidate(NamedTuple):
    kind: str
    backend: str


class _Kind(NamedTuple):
    config_type: type[AttentionConfig]
    backends: tuple[str, ...]
    pattern: bool
    layout: bool
    spread: bool = False
    mesh: bool = False


_KINDS = {
    "dilated": _Kind(DilatedConfig, ("triton", "torch", "reference"), True, False),
    "ring": _Kind(RingConfig, ("triton", "torch"), True, False, spread=True),
    "block_sparse": _Kind(BlockSparseConfig, ("triton", "torch", "reference"), False, True),
    "block_sparse_dilated": _Kind(
        BlockSparseDilatedConfig, ("triton", "torch", "reference"), True, True
    ),
    "block_sparse_ring": _Kind(BlockSparseRingConfig, ("torch",), False, True, spread=True),
    "block_sparse_ring_distributed": _Kind(
        BlockSparseRingDistributedConfig, ("torch",), False, True, spread=True, mesh=True
    ),
}
_CANDIDATES = [_Candidate(name, backend) for name, k in _KINDS.items() for backend in k.backends]


def _obstacle(candidate: _Candidate, request: AutoConfig, environment: Environment) -> str | None:
    """Why a candidate cannot or should not serve the request."""
    return (
        _wrong_function(_KINDS[candidate.kind], request)
        or _wrong_world(_KINDS[candidate.kind], request)
        or _not_there(candidate.kind, environment)
        or _wrong_backend(candidate.backend, request, environment)
    )


def _wrong_function(kind: _Kind, request: AutoConfig) -> str | None:
    for what, serves, given in (
        ("dilated pattern", kind.pattern, request.pattern is not None),
        ("layout", kind.layout, request.layout is not None),
    ):
        if serves and not given:
            return f"it needs a {what}, and the request has none"
        if given and not serves:
            return f"it leaves out the request's {what}"
    return None


def _wrong_world(kind: _Kind, request: AutoConfig) -> str | None:
    if request.world > 1 and not kind.spread:
        return f"it keeps a sequence on one device, the request spreads it over {request.world}"
    if kind.mesh and request.nodes == 1:
        return "it needs several nodes, and the request has one"
    if kind.mesh and request.world == request.nodes:
        return "it needs several ranks on a node, and the request has one"
    return None


def _not_there(kind: str, environment: Environment) -> str | None:
    if kind in environment.kinds:
        return None
    packages = environment.missing.get(kind, ())
    return f"{' and '.join(packages)} not installed" if packages else "it is not registered"


def _wrong_backend(backend: str, request: AutoConfig, environment: Environment) -> str | None:
    if request.backend is not None and backend != request.backend:
        return f"backend={request.backend!r} was given"
    if request.device == "cuda" and environment.capability is None:
        return "there is no CUDA device"
    if backend == "reference" and request.backend is None:
        return "it is the slow oracle: it runs only when asked for"
    return _triton_obstacle(request, environment) if backend == "triton" else None


def _triton_obstacle(request: AutoConfig, environment: Environment) -> str | None:
    if request.device != "cuda" or environment.capability is None:
        return f"it needs CUDA, the request is for {request.device}"
    if not environment.triton:
        return "triton is not installed"
    if request.dtype not in _TRITON_DTYPES:
        return f"it computes in {', '.join(_TRITON_DTYPES)}, the request is for {request.dtype}"
    if request.head_dim > _TRITON_MAX_HEAD_DIM:
        return f"its head_dim is at most {_TRITON_MAX_HEAD_DIM}, the request's {request.head_dim}"
    if environment.capability < _TRITON_MIN_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 or newer"
    return None


def _config(kind: str, request: AutoConfig) -> AttentionConfig:
    """The request as a configuration of a kind: the fields that both have."""
    config_type = _KINDS[kind].config_type
    shared = config_type.model_fields.keys() & request.model_fields_set - {"kind", "backend"}
    values: dict[str, Any] = {name: getattr(request, name) for name in shared}
    if "backend" in config_type.model_fields:
        values["backend"] = request.backend
    return config_type.model_validate(values)


def _reason(best: _Candidate, request: AutoConfig, count: int) -> str:
    where = "on one device" if request.world == 1 else f"over {request.world} ranks"
    if request.backend is not None:
        why = "with the backend that was given"
    elif count == 1:
        why = "the only one that can"
    else:
        why = f"the cheapest of {count} by estimated time"
    what = " and ".join(
        name
        for name, given in (("dilated pattern", request.pattern), ("layout", request.layout))
        if given is not None
    )
    return f"computes the {what} {where}: {why}"


def _nothing(request: AutoConfig, environment: Environment, rejected: list[Rejected]) -> InputError:
    """The error for a request that nothing serves; it names packages that would help."""
    for name, kind in _KINDS.items():
        packages = environment.missing.get(name)
        if packages and not (_wrong_function(kind, request) or _wrong_world(kind, request)):
            return missing_package(f"the request (kind {name!r} serves it)", *packages)
    reasons = "; ".join(f"{kind} with {backend}: {why}" for kind, backend, why in rejected)
    return InputError(f"no kind of attention serves the request: {reasons}.")
