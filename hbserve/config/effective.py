"""The effective configuration of a command: file, flags and environment together, and where each value came from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import yaml

from hbserve.config.fields import Section
from hbserve.config.sections import Config
from hbserve.config.validation import ENVIRONMENT
from hbserve.config.yaml_file import Document, nearest_key
from hbserve.errors import ConfigError


class Flag(NamedTuple):
    """A value that a flag of the command gives to a key; ``name`` is the flag as the user wrote it."""

    name: str
    value: Any


@dataclass(frozen=True)
class EffectiveConfig:
    """A configuration, and what it was made of."""

    config: Config
    document: Document
    flags: Mapping[str, Flag]

    @staticmethod
    def build(document: Document, flags: Mapping[str, Flag]) -> EffectiveConfig:
        """Put file, flags and environment together.

        Raises:
            ConfigError: naming the flag, or key, file and line, of what cannot be honoured.
        """
        try:
            return EffectiveConfig(document.build(_values(flags)), document, flags)
        except ConfigError as error:
            key = nearest_key(error.key, flags)
            if key is None:
                raise
            text = str(error)
            if error.key == key:
                text = text.removeprefix(f"{key}: ")
            separator = " " if text.startswith("must be ") else ": "
            raise ConfigError(f"{flags[key].name}{separator}{text}", error.key) from None

    def as_yaml(self) -> str:
        """Return a YAML file of all keys, each with where its value came from; it makes the same configuration."""
        given = self.document.with_overrides(_values(self.flags))
        return "\n".join(self._lines(self.config, "", given, 0)) + "\n"

    def _lines(self, section: Section, prefix: str, given: Any, depth: int) -> Iterator[str]:
        """Yield the lines of a section.

        Args:
            given: the section's values in file and flags, if there are any.
        """
        given = given if isinstance(given, dict) else {}
        indent = "  " * depth
        for name in section.__struct_fields__:
            key, value, source = prefix + name, getattr(section, name), given.get(name)
            if isinstance(value, Section):
                yield f"{indent}{name}:"
                yield from self._lines(value, f"{key}.", source, depth + 1)
            elif isinstance(value, tuple) and value and isinstance(value[0], Section):
                yield f"{indent}{name}:"
                for index, item in enumerate(value):
                    item_source = source[index] if isinstance(source, list) and index < len(source) else None
                    first, *others = self._lines(item, f"{key}[{index}].", item_source, depth + 1)
                    yield f"{indent}- {first.lstrip()}"
                    yield from others
            else:
                yield f"{indent}{name}: {_shown(value)}  # {self._source(key, source)}"

    def _source(self, key: str, given: Any) -> str:
        variable = ENVIRONMENT.get(key, "")
        if given is None:
            return f"environment {variable}" if os.environ.get(variable, "").strip() else "default"
        flag = nearest_key(key, self.flags)
        if flag is None and self._is_moved(key, given):
            flag = "model.tensor_parallel_size"
        if flag is not None:
            return f"flag {self.flags[flag].name}"
        return f"file {self.document.path}:{self.document.line_of(key)}"

    def _is_moved(self, key: str, given: Any) -> bool:
        """Return whether another number of ranks has moved the GPUs of an instance of the file."""
        found = re.fullmatch(r"gpu_instances\[(\d+)\]\.gpu_id", key)
        return found is not None and self.document.values["gpu_instances"][int(found[1])]["gpu_id"] != given


def _values(flags: Mapping[str, Flag]) -> dict[str, Any]:
    return {key: flag.value for key, flag in flags.items()}


def _shown(value: Any) -> str:
    """Write a value on one line of YAML."""
    text = yaml.safe_dump(msgspec.to_builtins(value), default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
