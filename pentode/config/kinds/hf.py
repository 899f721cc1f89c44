"""Reading Hugging Face's `config.json`: the fields we share by name, and what cannot be taken over."""

from typing import Any

from pentode.config.section import fields_of
from pentode.errors import ConfigError


def known_fields(kind: Any, config_json: dict[str, Any]) -> dict[str, Any]:
    """The part of a `config.json` whose keys are fields of `kind`; of several ids that end a text, the first."""
    found = {key: config_json[key] for key in fields_of(kind) if key in config_json}
    ends = found.get("eos_token_id")
    return found | {"eos_token_id": ends[0]} if isinstance(ends, list) and ends else found


def refuse(config_json: dict[str, Any], **allowed: tuple[Any, ...]) -> None:
    """Raises ConfigError naming each key that is there with a value we have no equal of."""
    problems = [
        f"config.json: {key}: {config_json[key]!r} is not built yet; {' or '.join(map(repr, values))} is"
        for key, values in allowed.items()
        if key in config_json and config_json[key] not in values
    ]
    if problems:
        raise ConfigError(problems)
