"""What all configurations share: frozen data, and errors that name the nearest known key."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails

from dilated_factory.errors import InputError

Config = TypeVar("Config", bound="FrozenConfig")
KIND = Field(description="the kind of configuration, and no other")


class FrozenConfig(BaseModel):
    """Base of all configurations: immutable, unknown keys and infinite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        found = handler(core_schema)
        described = handler.resolve_ref_schema(found)
        if "description" in described:  # the docstring, whose examples are Python
            described["description"] = described["description"].partition("\n\nExamples:")[0]
        return found

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, values: Any) -> Any:
        # pydantic's own message for a surplus key does not say which one was meant.
        for key in values if isinstance(values, Mapping) else ():
            if key not in cls.model_fields:
                raise ValueError(
                    f"{key!r} is not permitted here. {did_you_mean(str(key), cls.model_fields)} "
                    f"Got {values[key]!r}."
                )
        return values

    def to_dict(self) -> dict[str, Any]:
        """Plain values, and the kind as ``model_type``: what peft asks of a model's `config`."""
        values = self.model_dump(mode="json")
        return values | {"model_type": values.get("kind")}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the nearest known name, or all of them where none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"It must be one of {', '.join(map(repr, known))}."


def describe_invalid(error: ValidationError) -> str:
    """One line for a failed validation: every field, what it requires and what came."""
    return " ".join(_describe(problem) for problem in error.errors(include_url=False))


def _describe(problem: ErrorDetails) -> str:
    field = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "union_tag_invalid":
        known = problem["ctx"]["expected_tags"].replace("'", "").split(", ")
        tag = problem["ctx"]["tag"]
        return f"{field}: kind {tag!r} is not known. {did_you_mean(tag, known)}"
    if problem["type"] == "value_error":  # our own, which says what came
        return f"{field}: {message}" if field else message
    if problem["type"] in ("missing", "union_tag_not_found"):
        return f"{field}: {message}."
    return f"{field}: {message}. Got {problem['input']!r}."


def parse_config(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a configuration, with a one-line :class:`InputError` where pydantic writes many."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(describe_invalid(error)) from None
