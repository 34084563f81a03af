"""Configurations in YAML, with errors that name the line."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hbserve.config.sections import Config
from hbserve.config.validation import from_dict
from hbserve.errors import ConfigError
from hbserve.hints import shown

_MAX_BYTES = 1 << 20
_MAX_VALUES = 100_000
"""Values of a document with every alias written out; a configuration has some hundred."""
_UNDEFINED_VALUE = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
"""Errors of PyYAML's own constructors for a scalar that its tag does not allow, such as ``!!int abc``."""


PRESETS = Path(__file__).resolve().parents[1] / "configs"
"""Folder of the configurations that come with HBServe; in a clone a link to the top folder of that name."""


@dataclass(frozen=True)
class Document:
    """A configuration as plain data, before it is checked, with the lines of its keys.

    Attributes:
        path: the file, as errors name it; None: there is no file.
        folder: folder from which relative paths count.
        values: plain data; whatever a YAML file may hold.
    """

    path: str | None = None
    folder: Path | None = None
    values: Any = None
    tree: yaml.Node | None = None

    def line_of(self, key: str) -> int:
        """Return the line of a dotted key such as ``gpu_instances[1].port``, or of its nearest enclosing key."""
        return _line_of(self.tree, key)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Any:
        """Return the values with some replaced, by dotted key; those of outer keys first."""
        values = {} if self.values is None and self.path is None else copy.deepcopy(self.values)
        for key in sorted(overrides, key=lambda key: key.count(".")):
            _override(values, key, copy.deepcopy(overrides[key]))
        if "model.tensor_parallel_size" in overrides:
            _resize_instances(values, overrides["model.tensor_parallel_size"])
        return values

    def build(self, overrides: Mapping[str, Any]) -> Config:
        """Check the values and make the configuration; arguments and errors as in `load`."""
        try:
            return from_dict(self.with_overrides(overrides), base_dir=self.folder)
        except ConfigError as error:
            if self.path is None or nearest_key(error.key, overrides) is not None:
                raise
            raise ConfigError(f"{self.path}:{self.line_of(error.key)}: {error}", error.key) from None


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a configuration from a YAML file.

    Args:
        path: a file, or the name of one in `PRESETS`, with or without its ending.
        overrides: values that replace those of the file, by dotted key such as ``server.port``. A size for
            ``model.tensor_parallel_size`` replaces those of the instances too, and moves their GPUs apart.

    Raises:
        ConfigError: naming key, file and line of what cannot be honoured.
    """
    return read(path).build(overrides or {})


def read(path: str | Path) -> Document:
    """Read a YAML file without a check of its keys; arguments and errors as in `load`."""
    path = _find(path)
    text = _read(path)
    try:
        document, tree = _parse(text, str(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path} holds itself, or is nested too deeply") from None
    return Document(str(path), Path(path).expanduser().parent, document, tree)


def parse_value(text: str) -> Any:
    """Read one value in YAML's notation, such as ``[60, 100]``.

    Raises:
        ConfigError: the text is not valid YAML.
    """
    try:
        return _parse(text, "the value")[0]
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{shown(text)} is not valid YAML: {error}") from None


def nearest_key(key: str, among: Collection[str]) -> str | None:
    """Return the key, or the nearest key around it, that is among some."""
    while key and key not in among:
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
    return key or None


def _find(path: str | Path) -> str | Path:
    name = str(path)
    if "/" not in name and not os.path.isfile(name):
        for preset in (PRESETS / name, PRESETS / f"{name}.yaml"):
            if preset.suffix == ".yaml" and preset.is_file():
                return preset.resolve()
    return path


def _read(path: str | Path) -> str:
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        presets = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
        hint = f"; shipped are: {presets}" if isinstance(error, FileNotFoundError) and "/" not in str(path) else ""
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}{hint}") from None
    except (ValueError, RuntimeError) as error:  # a null character; an unknown user's home
        raise ConfigError(f"cannot read the configuration {str(path)!a}: {error}") from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path} is larger than {_MAX_BYTES} bytes, which no configuration is")
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text in UTF-8") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, whose every error is a `yaml.YAMLError` with the line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except _UNDEFINED_VALUE:
            kind = node.tag.rpartition(":")[2]
            what = f"{shown(node.value)} is not a value of the type {kind}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from None


# 1e3 is a number in YAML 1.2 and in JSON; YAML 1.1, which PyYAML reads, takes it for text.
_EXPONENT = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+\Z")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def _parse(text: str, path: str) -> tuple[Any, yaml.Node | None]:
    loader = _Loader(text)
    try:
        tree = loader.get_single_node()
        if tree is None:
            return None, None
        _check_tree(tree, path)  # before the merges (<<) of the construction write aliases out
        return loader.construct_document(tree), tree
    finally:
        loader.dispose()


def _check_tree(tree: yaml.Node, path: str) -> None:
    """Refuse a document that holds itself, whose aliases make it too large, or that has a key twice."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size_of(node: yaml.Node) -> int:
        known = sizes.get(id(node))
        if known is not None:
            return known
        if id(node) in open_nodes:
            raise RecursionError
        open_nodes.add(id(node))
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, path)
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        size = 1 + sum(size_of(child) for child in children)
        if size > _MAX_VALUES:
            line = node.start_mark.line + 1
            raise ConfigError(f"{path}:{line}: has more than {_MAX_VALUES} values when its aliases are written out")
        open_nodes.remove(id(node))
        sizes[id(node)] = size
        return size

    size_of(tree)


def _check_keys(node: yaml.MappingNode, path: str) -> None:
    """Refuse a key that stands twice in a mapping: YAML would keep the last value without an error."""
    keys: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in keys:
                raise ConfigError(f"{path}:{key.start_mark.line + 1}: {key.value} is given twice")
            keys.add(key.value)


def _override(document: Any, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(document, dict):
            return  # from_dict says what is wrong with it
        if document.get(section) is None:
            document[section] = {}
        document = document[section]
    if isinstance(document, dict):
        document[name] = value


def _resize_instances(document: Any, size: Any) -> None:
    """Give all instances the same number of ranks.

    The GPUs of an instance begin at its ``gpu_id``, or behind those of the instance before it on its host if these
    reach so far now. Instances with the same ``gpu_id`` go on sharing their GPUs.
    """
    given = document.get("gpu_instances") if isinstance(document, dict) else None
    if not isinstance(given, list):
        return
    places = {place for instance in given if (place := _place(instance)) is not None}
    moved: dict[tuple[str, int], int] = {}
    free: dict[str, int] = {}  # by host: the first GPU behind those that are taken
    for host, gpu_id in sorted(places):
        moved[host, gpu_id] = max(gpu_id, free.get(host, 0))
        free[host] = moved[host, gpu_id] + (size if isinstance(size, int) else 0)
    for index, instance in enumerate(given):
        if isinstance(instance, dict):
            given[index] = {key: value for key, value in instance.items() if key != "tensor_parallel_size"}
            place = _place(instance)
            if place is not None and "gpu_id" in instance:
                given[index]["gpu_id"] = moved[place]


def _place(instance: Any) -> tuple[str, int] | None:
    """Return host and first GPU of an instance; None: its values are not valid."""
    values = instance if isinstance(instance, dict) else {"gpu_id": None}
    gpu_id, host = values.get("gpu_id", 0), values.get("host", "")
    return (host, gpu_id) if isinstance(host, str) and type(gpu_id) is int and gpu_id >= 0 else None


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
