"""What a section of the config is: a frozen pydantic dataclass, and what its class says about its fields."""

import types
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, cast, dataclass_transform, get_args, get_origin

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

SETTINGS = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

AtLeastOne = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Activation = Literal["silu", "relu", "gelu", "gelu_new", "gelu_pytorch_tanh"]
Probability = Annotated[float, Field(ge=0, lt=1)]

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)  # no specifiers: they would hide Field's defaults
def section(cls: type[T]) -> type[T]:
    """A class of annotated fields as a section: frozen, keyword-only, strict about types, no keys but its own.

    A dataclass and not a BaseModel, on which Nanotron's field name `model_config` is reserved.
    """
    return cast(type[T], dataclass(cls, config=SETTINGS, frozen=True, kw_only=True))


def fields_of(kind: Any) -> dict[str, FieldInfo]:
    """The fields of a section class, in the order written."""
    return kind.__pydantic_fields__


def required(kind: Any) -> set[str]:
    """The names of the fields that have no default."""
    return {name for name, field in fields_of(kind).items() if field.is_required()}


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a type without None: (A, B) of `A | B | None`, (A,) of A."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(m for part in get_args(annotation) if part is not type(None) for m in members(part))
    return (annotation,)


def nullable(annotation: Any) -> bool:
    """Whether None is one of a type's values."""
    return annotation is None or type(None) in get_args(annotation)


def is_section(kind: Any) -> bool:
    """Whether a type is the class of a section."""
    return isinstance(kind, type) and is_dataclass(kind)


def marker(kind: Any) -> tuple[str, str]:
    """The field that says which of several kinds a section is, and this kind's word there: ("type", "llama")."""
    name = "type" if "type" in fields_of(kind) else "name"
    return name, fields_of(kind)[name].default
