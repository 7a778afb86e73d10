"""Configurations of every kind: lossless in JSON and TOML, strict, with helpful errors."""

import inspect
import json
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from dilated_factory import InputError
from dilated_factory.configs.attention import (
    AttentionConfig,
    AutoConfig,
    DilatedConfig,
    HeadAttentionConfig,
    MultiheadConfig,
)
from dilated_factory.configs.base import FrozenConfig, parse_config
from dilated_factory.configs.files import read_values, to_toml
from dilated_factory.configs.kinds import CONFIG_TYPES, config_type, parse_any, read_config
from dilated_factory.configs.layouts import DocumentConfig, build_layout
from dilated_factory.configs.models import LongNetConfig, LongNetEncoderConfig, TrainConfig
from dilated_factory.configs.pool import PoolConfig, create_pool
from dilated_factory.kinds.default import register_dilated
from dilated_factory.kinds.registry import Registry

from .random_configs import LAYOUTS, any_config

ALL_TYPES = [*CONFIG_TYPES.values(), *LAYOUTS]


@given(any_config, st.sampled_from(["python", "json", "toml"]))
def test_a_round_trip_is_lossless(
    tmp_path_factory: pytest.TempPathFactory, config: FrozenConfig, form: str
) -> None:
    if form == "python":
        again = parse_any(config.model_dump())
    else:
        text = config.model_dump_json() if form == "json" else to_toml(config)
        path = tmp_path_factory.getbasetemp() / f"config.{form}"
        path.write_text(text, encoding="utf-8")
        again = read_config(path)
    assert again == config
    assert type(again) is type(config)
    assert hash(again) == hash(config)


@pytest.mark.parametrize("kind", ALL_TYPES)
def test_toml_can_leave_none_out(kind: type[FrozenConfig]) -> None:
    for name, field in kind.model_fields.items():
        annotation: Any = field.annotation
        try:
            TypeAdapter(annotation).validate_python(None)
        except ValidationError:
            continue
        assert field.default is None, f"{kind.__name__}.{name}"


@given(any_config)
def test_the_schema_is_that_of_the_data(config: FrozenConfig) -> None:
    schema = json.loads(json.dumps(type(config).model_json_schema()))
    assert schema["additionalProperties"] is False
    assert set(config.model_dump()) == set(schema["properties"])
    assert schema["properties"]["kind"]["const"] == config.model_dump()["kind"]


def test_every_kind_has_a_configuration_and_the_nearest_is_offered() -> None:
    for kind, its_type in CONFIG_TYPES.items():
        assert config_type(kind) is its_type
    with pytest.raises(InputError, match=r"kind 'dilatedd' is not known. Did you mean 'dilated'\?"):
        config_type("dilatedd")
    with pytest.raises(InputError, match="kind is required: one of 'dilated', "):
        parse_any({})
    with pytest.raises(InputError, match="It must be one of 'dilated', "):
        parse_any({"kind": 7})


@pytest.mark.parametrize("form", ["python", "json", "toml"])
def test_an_unknown_key_is_an_error_with_the_nearest_name(form: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"kind": "dilated", "segment_length": [8], "dilation_rates": [1]}
    says = r"'segment_length' is not permitted here. Did you mean 'segment_lengths'\? Got \[8\]."
    if form == "python":
        with pytest.raises(ValueError, match=says):
            DilatedConfig(**values)
        return
    path = tmp_path / f"config.{form}"
    toml = 'kind = "dilated"\nsegment_length = [8]\ndilation_rates = [1]\n'
    path.write_text(json.dumps(values) if form == "json" else toml)
    with pytest.raises(InputError, match=says):
        read_config(path)


def test_an_unknown_key_inside_is_an_error_that_says_where() -> None:
    layout = {"kind": "bigbird", "windw_blocks": 3}
    with pytest.raises(InputError, match=r"layout.bigbird: 'windw_blocks' .* 'window_blocks'\?"):
        parse_any({"kind": "block_sparse", "layout": layout})
    with pytest.raises(InputError, match=r"layout: kind 'bigbrd' .* Did you mean 'bigbird'\?"):
        parse_any({"kind": "block_sparse", "layout": {"kind": "bigbrd"}})
    with pytest.raises(InputError, match=r"'zzzz' is not permitted.* It must be one of 'kind',"):
        parse_any({"kind": "pool", "zzzz": 1})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "dilated"}, "segment_lengths: Field required. dilation_rates: Field required."),
        (
            {"kind": "dilated", "segment_lengths": [8, 4], "dilation_rates": [1]},
            "segment_lengths and dilation_rates must have the same number of entries",
        ),
        ({"embed_dim": 0}, "embed_dim: Input should be greater than 0. Got 0."),
        ({"num_heads": -3}, "num_heads: Input should be greater than 0. Got -3."),
        ({"embed_dim": 25}, "embed_dim must be divisible by num_heads. Got 25 and 3."),
        ({"num_kv_heads": 2}, "num_heads must be divisible by num_kv_heads. Got 3 and 2."),
        ({"attention": {"kind": "pool"}}, "attention: kind 'pool' is not known."),
        ({"attention": {}}, "attention: Unable to extract tag"),
        ({"kind": "pool", "limit_bytes": -1}, "limit_bytes: "),
        ({"kind": "pool", "overhead": 0.5}, "overhead"),
    ],
)
def test_invalid_values_are_errors_of_one_line(values: dict[str, Any], says: str) -> None:
    multihead = {
        "kind": "dilated_multihead",
        "embed_dim": 24,
        "num_heads": 3,
        "attention": {"kind": "dilated", "segment_lengths": [8], "dilation_rates": [1]},
    }
    with pytest.raises(InputError) as caught:
        parse_any(values if "kind" in values else multihead | values)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"segment_lengths": (8,)}, "segment_lengths and dilation_rates must be given together"),
        ({}, "segment_lengths and dilation_rates, or layout, or all are required"),
        (
            {"segment_lengths": (8,) * 7, "dilation_rates": (1,) * 7, "head_groups": "split"},
            "heads must be at least the number of branches",
        ),
        ({"layout": {"kind": "strided", "stride": 3}, "kv_heads": 4}, "divisible by kv_heads"),
        ({"layout": {"kind": "strided", "stride": 3}, "world": 3, "nodes": 2}, "multiple of nodes"),
    ],
)
def test_an_impossible_request_is_an_error(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AutoConfig(length=64, heads=6, head_dim=8, **fields)


def test_files_that_are_not_what_they_say_are_errors(tmp_path: Path) -> None:
    for name, content, says in (
        ("a.json", "{", "is not valid JSON"),
        ("a.toml", "=", "is not valid TOML"),
        ("a.yaml", "", "must end in .json or .toml"),
        ("b.json", "[3]", "must hold an object. Got list."),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=says):
            read_values(tmp_path / name)


class _MineConfig(AttentionConfig):
    kind: Literal["mine"] = "mine"
    width: int


def test_a_third_party_kind_nests_and_round_trips_through_its_registry() -> None:
    registry = Registry()
    register_dilated(registry)
    registry.register(_MineConfig, lambda config, runtime: pytest.fail("not built here"))
    config = MultiheadConfig(embed_dim=24, num_heads=3, attention=_MineConfig(width=5))
    values = config.model_dump()
    assert values["attention"] == {"kind": "mine", "width": 5}
    assert registry.parse(values) == config
    assert registry.parse(json.loads(config.model_dump_json())) == config
    with pytest.raises(InputError, match=r"attention.*'widht'.*'width'"):
        registry.parse(values | {"attention": {"kind": "mine", "widht": 5}})
    with pytest.raises(InputError, match="kind 'mine' is not known"):
        parse_config(MultiheadConfig, values)


def test_the_schema_of_nested_attention_lists_the_kinds() -> None:
    schema = TypeAdapter(HeadAttentionConfig).json_schema()
    assert set(schema["discriminator"]["mapping"]) >= {"dilated", "ring", "auto"}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_layout_has_the_arguments_and_defaults_of_its_function(kind: type[FrozenConfig]) -> None:
    sparse = pytest.importorskip("dilated_sparse", reason="dilated-sparse is not installed")
    function = getattr(sparse.layouts, kind.model_fields["kind"].default)
    parameters = dict(inspect.signature(function).parameters)
    for own in ("length", "device"):  # of the call, not of the layout
        parameters.pop(own, None)
    assert set(parameters) == set(kind.model_fields) - {"kind"}
    for name, parameter in parameters.items():
        field = kind.model_fields[name]
        if parameter.default is not parameter.empty:
            assert field.default == parameter.default, name
        else:
            assert field.is_required()


def test_a_document_layout_fits_one_length() -> None:
    sparse = pytest.importorskip("dilated_sparse", reason="dilated-sparse is not installed")
    config = DocumentConfig(lengths=(3, 8), block_size=4)
    assert build_layout(config, 11) == sparse.layouts.document([3, 8], block_size=4)
    with pytest.raises(ValueError, match=r"lengths must add up to 12. Got 11."):
        build_layout(config, 12)


def test_a_pool_has_the_settings_of_its_configuration() -> None:
    pytest.importorskip("dilated_pool", reason="dilated-pool is not installed")
    with create_pool(PoolConfig(limit_bytes=64, overhead="unlimited")).borrow((7,)) as tensor:
        assert tensor.shape == (7,)


def test_no_limit_on_overhead_is_the_pools_none_and_a_word_in_files() -> None:
    config = PoolConfig.model_validate({"overhead": None})
    assert config == PoolConfig(overhead="unlimited")
    assert parse_any(tomllib.loads(to_toml(config))) == config
    pytest.importorskip("dilated_pool", reason="dilated-pool is not installed")
    assert "overhead=None" in repr(create_pool(config).__reduce__())


def test_a_union_of_pattern_and_layout_offers_no_backend_that_cannot_serve_it() -> None:
    values = {
        "kind": "block_sparse_dilated",
        "segment_lengths": [8],
        "dilation_rates": [1],
        "layout": {"kind": "sliding_window", "window": 16, "block_size": 8},
    }
    assert parse_any({**values, "backend": "torch"})
    with pytest.raises(
        InputError, match="backend: Input should be 'reference', 'torch' or 'triton'"
    ):
        parse_any({**values, "backend": "flex"})


def test_schemas_describe_fields_and_leave_examples_of_python_out() -> None:
    for kind in CONFIG_TYPES.values():
        text = json.dumps(kind.model_json_schema())
        assert ">>>" not in text
        assert "Examples:" not in text


def every_type() -> list[type[BaseModel]]:
    """All kinds, and what is nested in their fields."""
    found: list[type[BaseModel]] = []
    left: list[Any] = list(ALL_TYPES)
    while left:
        each = left.pop()
        left += get_args(each)
        if inspect.isclass(each) and issubclass(each, BaseModel) and each not in found:
            found.append(each)
            left += [field.annotation for field in each.model_fields.values()]
    return found


@pytest.mark.parametrize("kind", every_type())
def test_every_field_of_a_configuration_says_what_it_is(kind: type[BaseModel]) -> None:
    fields = kind.model_fields
    assert fields
    assert not [name for name, field in fields.items() if not (field.description or "").strip()]
    described = kind.model_json_schema()["properties"]
    assert all("description" in described[name] for name in fields)


@pytest.mark.parametrize("kind", [LongNetConfig, LongNetEncoderConfig])
def test_a_long_context_has_a_larger_rotary_base_unless_it_is_given(
    kind: type[LongNetConfig | LongNetEncoderConfig],
) -> None:
    bases = {context: kind(context=context).angle_base for context in (64, 8191, 8192, 2**20)}
    assert bases == {64: 1e4, 8191: 1e4, 8192: 5e6, 2**20: 5e6}
    assert kind(context=8192, rotary_base=1e4).angle_base == 1e4
    # xPos is torchscale's, whose base is this one.
    assert kind(context=8192, positions="xpos").angle_base == 1e4
    # What is written says it, so a later default changes nothing.
    written = kind(context=8192).model_dump_json()
    assert json.loads(written)["rotary_base"] == 5e6
    assert kind.model_validate_json(written) == kind(context=8192)


@pytest.mark.parametrize(
    ("steps", "share"), [(1, 0.75), (2, 0.75), (10, 0.99), (12, 0.42), (8, 0.5)]
)
def test_a_run_that_begins_with_short_sequences_ends_with_its_whole_context(
    steps: int, share: float
) -> None:
    config = TrainConfig(
        model=LongNetConfig(context=12), steps=steps, short_context=4, short_share=share
    )
    contexts = [config.context_at(step) for step in range(steps)]
    assert contexts[-1] == 12
    assert contexts == sorted(contexts)
    assert contexts.count(4) == int(steps * share)
