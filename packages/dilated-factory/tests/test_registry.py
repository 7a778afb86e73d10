"""Registries: plain objects that share nothing, whatever is done to them in whatever order."""

import copy
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from torch import Tensor, nn

from dilated_core import DilatedAttention
from dilated_factory import InputError
from dilated_factory.configs.attention import AttentionConfig, DilatedConfig
from dilated_factory.errors import MissingPackageError
from dilated_factory.kinds.default import default_registry, register_dilated
from dilated_factory.kinds.registry import Registry, Runtime, create_attention

DILATED = DilatedConfig(segment_lengths=(8, 24), dilation_rates=(1, 3))
NAMES = (
    "dilated",
    "dilated_multihead",
    "ring",
    "ring_multihead",
    "block_sparse",
    "block_sparse_dilated",
    "block_sparse_ring",
    "block_sparse_ring_distributed",
)


class FirstConfig(AttentionConfig):
    kind: Literal["first"] = "first"
    factor: float = 1.0


class SecondConfig(AttentionConfig):
    kind: Literal["second"] = "second"
    factor: float = 1.0


class Scaled(nn.Module):
    """A third party's attention: the values, scaled."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        return value * self.factor


def build(config: FirstConfig | SecondConfig, runtime: Runtime) -> nn.Module:
    return Scaled(config.factor)


CUSTOM: dict[str, type[FirstConfig | SecondConfig]] = {"first": FirstConfig, "second": SecondConfig}


def in_threads(work: Callable[[], object], count: int = 4) -> list[object]:
    """Run a function in several threads at once; return results or exceptions."""
    results: list[object] = []
    gate = threading.Barrier(count)

    def run() -> None:
        gate.wait()
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@dataclass
class Pair:
    """A registry and the kinds that it must have."""

    registry: Registry
    kinds: set[str]


class RegistryMachine(RuleBasedStateMachine):
    """Random orders of making, registering, creating, copying, pickling, in threads too."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[Pair] = []
        self.default = set(default_registry())

    registries = Bundle("registries")

    def _add(self, registry: Registry, kinds: set[str]) -> Pair:
        self.pairs.append(Pair(registry, set(kinds)))
        return self.pairs[-1]

    @rule(target=registries)
    def make_an_empty_one(self) -> Pair:
        return self._add(Registry(), set())

    @rule(target=registries)
    def make_a_default_one(self) -> Pair:
        return self._add(default_registry(), self.default)

    @rule(target=registries, pair=registries)
    def deepcopy(self, pair: Pair) -> Pair:
        return self._add(copy.deepcopy(pair.registry), pair.kinds)

    @rule(target=registries, pair=registries)
    def pickle(self, pair: Pair) -> Pair:
        return self._add(pickle.loads(pickle.dumps(pair.registry)), pair.kinds)

    @rule(pair=registries, kind=st.sampled_from(sorted(CUSTOM)))
    def register(self, pair: Pair, kind: str) -> None:
        if kind in pair.kinds:
            with pytest.raises(ValueError, match="must be new in this registry"):
                pair.registry.register(CUSTOM[kind], build)
        else:
            pair.registry.register(CUSTOM[kind], build)
            pair.kinds.add(kind)

    @rule(pair=registries, kind=st.sampled_from(sorted(CUSTOM)))
    def register_in_threads(self, pair: Pair, kind: str) -> None:
        results = in_threads(lambda: pair.registry.register(CUSTOM[kind], build))
        succeeded = [result for result in results if result is None]
        assert len(succeeded) == (kind not in pair.kinds)
        pair.kinds.add(kind)

    @rule(pair=registries, kind=st.sampled_from(["dilated", *sorted(CUSTOM)]))
    def create(self, pair: Pair, kind: str) -> None:
        config = DILATED if kind == "dilated" else CUSTOM[kind](factor=3.0)
        if kind not in pair.kinds:
            with pytest.raises(InputError, match=f"kind '{kind}' is not registered"):
                create_attention(config, pair.registry)
            return
        results = in_threads(lambda: create_attention(config, pair.registry))
        expected = DilatedAttention if kind == "dilated" else Scaled
        assert all(type(result) is expected for result in results), results
        assert len(set(map(id, results))) == len(results)

    @invariant()
    def every_registry_has_its_own_kinds(self) -> None:
        for pair in self.pairs:
            assert set(pair.registry) == pair.kinds
            assert len(pair.registry) == len(pair.kinds)


RegistryMachine.TestCase.settings = settings(stateful_step_count=20)
TestRegistryIsolation = RegistryMachine.TestCase


def test_every_name_is_registered_or_says_what_to_install() -> None:
    registry = default_registry()
    assert set(NAMES) == (set(registry) | set(registry.missing())) - {"auto"}
    assert not set(registry) & set(registry.missing())


@pytest.mark.parametrize("kind", NAMES[2:])
def test_a_missing_package_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    registry = default_registry()
    assert set(registry) == {"dilated", "dilated_multihead", "auto"}
    with pytest.raises(MissingPackageError, match=r"pip install packages/dilated-core") as caught:
        registry.create({"kind": kind})
    assert isinstance(caught.value, ImportError)
    if "block_sparse_ring" in kind:
        assert "dilated-ring and dilated-sparse, which are not installed" in str(caught.value)


def test_only_the_missing_one_of_two_packages_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != "dilated_ring" or None)
    with pytest.raises(MissingPackageError, match="needs dilated-ring, which is not installed"):
        default_registry().create({"kind": "block_sparse_ring"})


def test_an_import_registers_nothing() -> None:
    import dilated_factory.kinds.default
    import dilated_factory.kinds.registry

    assert list(Registry()) == []
    for module in (dilated_factory.kinds.default, dilated_factory.kinds.registry):
        assert not [name for name, value in vars(module).items() if isinstance(value, Registry)]


def test_wrong_arguments_are_errors_that_name_them() -> None:
    registry = Registry()
    register_dilated(registry)
    with pytest.raises(
        TypeError, match=r"config_type must be a subclass of AttentionConfig. Got 3"
    ):
        registry.register(cast(Any, 3), build)

    class NoLiteral(AttentionConfig):
        kind: str = "any"

    with pytest.raises(TypeError, match=r"kind that is a literal with a default.*Got NoLiteral"):
        registry.register(NoLiteral, cast(Any, build))
    with pytest.raises(TypeError, match=r"config must be an AttentionConfig or a mapping. Got int"):
        registry.create(cast(Any, 3))
    with pytest.raises(InputError, match="kind is required: one of 'dilated', "):
        registry.create({})
    with pytest.raises(InputError, match=r"kind 'dilate' is not registered. Did you mean"):
        registry.create({"kind": "dilate"})
    with pytest.raises(InputError, match=r"kind \[\] is not registered. It must be one of"):
        registry.create({"kind": []})


def test_a_configuration_of_another_class_of_the_same_kind_is_an_error() -> None:
    class DilatedConfig(AttentionConfig):
        kind: Literal["dilated"] = "dilated"

    with pytest.raises(TypeError, match="config must be a DilatedConfig for kind 'dilated'"):
        default_registry().create(DilatedConfig())


@pytest.mark.parametrize("argument", ["group", "buffers"])
def test_what_a_kind_would_ignore_is_an_error(argument: str) -> None:
    registry = default_registry()
    multihead = {"kind": "dilated_multihead", "embed_dim": 24, "num_heads": 3}
    for config in (DILATED.model_dump(), multihead | {"attention": DILATED}):
        given: dict[str, Any] = {argument: object()}
        with pytest.raises(ValueError, match=f"{argument} must be None for kind 'dilated'"):
            registry.create(config, **given)
