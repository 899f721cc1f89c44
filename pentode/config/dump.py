"""A Config as YAML that loads back as the same Config."""

from pathlib import Path
from typing import Any

import yaml

from pentode.config.schema import Config
from pentode.config.validate import adapter
from pentode.config.yaml_reader import scalar


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars, every field in the schema's order."""
    return adapter(Config).dump_python(config, mode="json")


def to_yaml(config: Config) -> str:
    """The config as YAML text."""
    return yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)


def save_yaml(config: Config, path: Path) -> None:
    """Write the config where `load_config` can read it."""
    path.write_text(to_yaml(config), encoding="utf-8")


class Dumper(yaml.SafeDumper):
    """Quotes each text that our reader would not read as that text: it knows more numbers than PyYAML does."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = None if isinstance(scalar(text), str) and text.isprintable() else '"'  # escapes odd line ends
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value that is used twice out twice."""
        return True


Dumper.add_representer(str, Dumper.represent_text)
