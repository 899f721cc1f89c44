"""What editors and shells complete from: the JSON Schema, and every dotted path."""

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from pentode.config.legacy import INERT
from pentode.config.schema import Config
from pentode.config.validate import adapter, all_keys


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a config file, kinds included, draft 2020-12.

    Wider than the classes where the loader is: a null for a default, tags such as `is_llama_config`, inert keys.
    """
    schema = adapter(Config).json_schema(mode="validation")
    definitions = schema["$defs"]
    for made in [schema, *definitions.values()]:
        for name, field in made.get("properties", {}).items():
            _any_kind(field)
            if "default" in field and "const" not in field:
                made["properties"][name] = {"anyOf": [field, {"type": "null"}]}
    for kind, tag in (("LlamaConfig", "is_llama_config"), ("GPT2Config", "is_gpt2_config")):
        definitions[kind]["properties"][tag] = {"type": "boolean", "description": "the same as `type`"}
    for dotted, inert in INERT.items():
        for made in _holders(schema, definitions, dotted.split(".")[:-1]):
            made["properties"].setdefault(
                dotted.rpartition(".")[2], {"deprecated": True, "description": f"no effect: {inert.why}"}
            )
    return {"$schema": GenerateJsonSchema.schema_dialect, "title": "Pentode config"} | schema


def field_paths() -> list[str]:
    """Every dotted path that an override may set, list indices as 0."""
    return list(all_keys(Config))


def _any_kind(field: dict[str, Any]) -> None:
    """Let a section without `type` be any kind that fits, where pydantic says exactly one."""
    for part in (field, *field.get("anyOf", ())):
        if "oneOf" in part:
            part["anyOf"] = part.pop("oneOf")
            part.pop("discriminator", None)


def _holders(schema: dict[str, Any], definitions: dict[str, Any], path: list[str]) -> list[dict[str, Any]]:
    """The definitions that the sections at `path` may have."""
    found = [schema]
    for name in path:
        found = [
            definitions[ref] for made in found if name in made["properties"] for ref in _refs(made["properties"][name])
        ]
    return found


def _refs(field: dict[str, Any]) -> list[str]:
    """The names of all definitions that a property refers to."""
    here = [field["$ref"].rpartition("/")[2]] if "$ref" in field else []
    return here + [name for part in field.get("anyOf", ()) for name in _refs(part)]
