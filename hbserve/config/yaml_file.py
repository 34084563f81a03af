"""Configurations in YAML, with errors that name the line."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from hbserve.config.sections import Config
from hbserve.config.validation import from_dict
from hbserve.errors import ConfigError


def load(path: str | Path) -> Config:
    """Read a configuration from a YAML file.

    Raises:
        ConfigError: naming key, file and line of what cannot be honoured.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text in UTF-8") from None
    try:
        document = yaml.safe_load(text)
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        duplicate = _duplicate_key(tree)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path} holds itself, or is nested too deeply") from None
    if duplicate is not None:
        raise ConfigError(f"{path}:{duplicate[1]}: {duplicate[0]} is given twice")
    _add_log_level(document)
    try:
        return from_dict(document, base_dir=path.parent)
    except ConfigError as error:
        line = _line_of(tree, error.key)
        raise ConfigError(f"{path}:{line}: {error}") from None


def _add_log_level(document: Any) -> None:
    """Take the environment's LOG_LEVEL where the file gives no ``logging.level``."""
    level = os.environ.get("LOG_LEVEL")
    if level and isinstance(document, dict) and isinstance(section := document.setdefault("logging", {}), dict):
        section.setdefault("level", level.upper())


def _line_of(tree: yaml.Node | None, key: str) -> int:
    """Return the line of a dotted key such as ``gpu_instances[1].port``, or of its nearest enclosing key."""
    line, node = 1, tree
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(node, yaml.MappingNode):
            entry = next(((k, v) for k, v in node.value if k.value == part), None)
            if entry is None:
                break
            line, node = entry[0].start_mark.line + 1, entry[1]
        elif isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _duplicate_key(node: yaml.Node | None) -> tuple[str, int] | None:
    """Return the first key that a mapping has twice, and its line: YAML would keep the last value without an error."""
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if key.value in keys:
                return key.value, key.start_mark.line + 1
            keys.add(key.value)
            found = _duplicate_key(value)
            if found:
                return found
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            found = _duplicate_key(item)
            if found:
                return found
    return None
