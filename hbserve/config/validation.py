"""Checks of a whole configuration before any process sees it: types, keys, files; and what follows from other keys.

Limits of single values stand on their fields (`hbserve.config.fields`); msgspec checks them, and `_from_msgspec` turns
its messages into ours. `hbserve.config.limits` has those that concern several keys.
"""

from __future__ import annotations

import os
import re
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from hbserve.config.foreign_names import unknown_name
from hbserve.config.keys import error_at, parts_of, section_in, types_of
from hbserve.config.limits import check_limits
from hbserve.config.sections import DEFAULT_MODE, Config, InstanceConfig, InstanceRole, Mode, ModelConfig
from hbserve.config.semi_pd import SemiPDConfig
from hbserve.errors import ConfigError
from hbserve.hints import nearest, shown
from hbserve.model_source import expand_user, known_as, resolve_model

_MAX_KEY_LENGTH = 100  # in an error
_MAX_INT_BITS = 63
"""Size of integers that messages between processes can carry."""
ENVIRONMENT = {
    "logging.level": "LOG_LEVEL",
    "semi_pd.prefill_percentage": "SEMI_PD_PREFILL_SM_PERCENTILE",
    "semi_pd.decode_percentage": "SEMI_PD_DECODE_SM_PERCENTILE",
}
"""Variables of the environment that give a key's value where nothing else does."""
_DEFAULT_SHARES = {"prefill_percentage": 80, "decode_percentage": 100}
_LOG_LEVELS = {"WARN": "WARNING", "CRITICAL": "ERROR", "FATAL": "ERROR", "TRACE": "DEBUG"}
"""Names of levels in other programs that read LOG_LEVEL."""

msgspec.json.Decoder(Config)  # prepares the class. msgspec 0.22 crashes if two threads do so at once, later


def from_dict(document: Any, base_dir: Path | None = None) -> Config:
    """Build and validate a configuration from plain data.

    Relative model paths that do not exist from the working directory are looked up from
    ``base_dir`` and its parent, so that shipped files work from any working directory.

    Raises:
        ConfigError: with attribute ``key``, the dotted key at fault.
    """
    if not isinstance(document, dict):
        raise error_at("", "the configuration must be a mapping of sections")
    _check_keys(document)
    document = _with_log_level(_with_placement(_with_mode(document)))
    try:
        config = msgspec.convert(document, Config)
    except msgspec.ValidationError as error:
        raise _from_msgspec(error, document) from None
    except UnicodeEncodeError as error:
        raise error_at("", f"a value holds a lone surrogate, which is no character: {error.object!a}") from None
    return _complete(config, base_dir)


def with_instance(config: Config, instance: InstanceConfig) -> Config:
    """Return the configuration with one more instance, or with this one in the place of its namesake.

    Roles that the others lack are no reason to refuse it: they may have changed, or come later.

    Raises:
        ConfigError: if the instance does not fit to the others.
    """
    others = [other for other in config.gpu_instances if other.instance_id != instance.instance_id]
    values = msgspec.to_builtins(instance)
    try:
        msgspec.convert(values, InstanceConfig)
    except msgspec.ValidationError as error:
        raise _from_msgspec(error, values, f"gpu_instances[{len(others)}].") from None
    extended = msgspec.structs.replace(config, gpu_instances=(*others, instance))
    check_limits(extended, is_whole=False)
    return extended


def default_instances(mode: Mode, tensor_parallel_size: int) -> tuple[InstanceConfig, ...]:
    """Return the instances of a configuration without ``gpu_instances``."""
    defaults = {
        "auto": (("unified-0", InstanceRole.UNIFIED, 0),),
        "unified": (("unified-0", InstanceRole.UNIFIED, 0),),
        "disaggregated": (
            ("prefill-0", InstanceRole.PREFILL, 0),
            ("decode-0", InstanceRole.DECODE, tensor_parallel_size),
        ),
        "semi_pd": (("semi-0", InstanceRole.SEMI_PD, 0),),
    }
    return tuple(
        InstanceConfig(name, role, gpu_id=gpu_id, kv_rank=rank, tensor_parallel_size=tensor_parallel_size)
        for rank, (name, role, gpu_id) in enumerate(defaults[mode])
    )


# --- defaults that depend on other keys, files or the environment ----------------------------------


def _with_mode(document: dict[str, Any]) -> dict[str, Any]:
    return document | {"mode": mode_of(document)}


def mode_of(document: dict[str, Any]) -> Any:
    """Return the mode of plain data: as it is given, else by the types of the instances, else the default.

    A given ``auto`` stays for unified instances that this host starts: their roles may then change.
    """
    given, instances = document.get("mode"), document.get("gpu_instances")
    if given not in (None, "auto"):
        return given
    if not instances or not isinstance(instances, list | tuple):
        return DEFAULT_MODE
    instances = [values for values in instances if isinstance(values, dict)]
    roles = [values.get("instance_type") for values in instances]
    phases = [InstanceRole.PREFILL, InstanceRole.DECODE]
    if InstanceRole.SEMI_PD in roles:
        return "semi_pd"
    if any(role in phases for role in roles):
        return "disaggregated"
    return "unified" if given is None or any(values.get("port") is not None for values in instances) else given


def _with_placement(document: dict[str, Any]) -> dict[str, Any]:
    """Have mode ``auto`` place requests where most of their prompt is cached; it may start several instances."""
    given = document.get("performance", {})
    if document["mode"] != "auto" or not isinstance(given, dict) or given.get("placement") is not None:
        return document
    return document | {"performance": given | {"placement": "prefix_aware"}}


def _with_log_level(document: dict[str, Any]) -> dict[str, Any]:
    """Take the environment's LOG_LEVEL where no ``logging.level`` is given, in any case of letters."""
    given = document.get("logging", {})
    text = os.environ.get(ENVIRONMENT["logging.level"], "").strip()
    if not text or not isinstance(given, dict) or given.get("level") is not None:
        return document
    words = _words_at("logging.level")
    level = _LOG_LEVELS.get(text.upper(), text.upper())
    if level not in words:
        what = f"the environment's LOG_LEVEL has the unknown value {shown(text)}{nearest(text.upper(), words)}"
        raise error_at("logging.level", what)
    return document | {"logging": given | {"level": level}}


def _complete(given: Config, base_dir: Path | None) -> Config:
    replace = msgspec.structs.replace
    model, rpc = given.model, given.rpc
    source = _resolve(model.path, base_dir, "model.path")
    name = known_as(model.path)
    if model.served_name is None and name not in ("", ".", "..", "~", Path(source).name):
        model = replace(model, served_name=name)  # of a link to the folder: the name that the user knows
    model = replace(model, path=source)
    if model.tokenizer_path is not None:
        tokenizer_path = _resolve(model.tokenizer_path, base_dir, "model.tokenizer_path")
        if not os.path.isdir(tokenizer_path):  # only `model.path` is fetched or converted
            raise error_at("model.tokenizer_path", f"must be a folder, and there is none at {shown(tokenizer_path)}")
        model = replace(model, tokenizer_path=tokenizer_path)
    size = model.tensor_parallel_size
    instances = tuple(
        replace(
            instance,
            kv_rank=rank if instance.kv_rank is None else instance.kv_rank,
            tensor_parallel_size=size if instance.tensor_parallel_size is None else instance.tensor_parallel_size,
        )
        for rank, instance in enumerate(given.gpu_instances)
    )
    speculation = given.speculation
    if speculation.model is not None:
        speculation = replace(speculation, model=_resolve(speculation.model, base_dir, "speculation.model"))
    if rpc.key_file is not None:
        rpc = replace(rpc, key_file=_find_key_file(rpc.key_file, base_dir))
    config = replace(
        given,
        model=model,
        gpu_instances=instances or default_instances(given.mode, size),
        rpc=rpc,
        speculation=speculation,
        semi_pd=_complete_semi_pd(given.semi_pd),
    )
    check_limits(config)
    return config


def _complete_semi_pd(given: SemiPDConfig) -> SemiPDConfig:
    shares = {name: getattr(given, name) for name in _DEFAULT_SHARES}
    for name, default in _DEFAULT_SHARES.items():
        if shares[name] is None:
            variable = ENVIRONMENT[f"semi_pd.{name}"]
            text = os.environ.get(variable, str(default)).strip()
            if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= 100:
                raise error_at(f"semi_pd.{name}", f"the environment's {variable} must be in 1..100, got {shown(text)}")
            shares[name] = int(text)
    ladder = given.ladder
    if ladder.unified is None:
        is_chosen = given.mixed or given.slo is not None
        ladder = msgspec.structs.replace(ladder, unified=(100,) if is_chosen else ())
    mixed = bool(ladder.unified) and given.slo is not None if given.mixed is None else given.mixed
    return msgspec.structs.replace(given, **shares, ladder=ladder, mixed=mixed)


def _resolve(path: str, base_dir: Path | None, key: str) -> str:
    try:
        return resolve_model(path, () if base_dir is None else (base_dir, base_dir.parent))
    except ConfigError as error:
        raise error_at(key, str(error)) from None


def _find_key_file(path: str, base_dir: Path | None) -> str:
    try:
        expanded = expand_user(path)
    except ConfigError as error:
        raise error_at("rpc.key_file", str(error)) from None
    for candidate in (expanded, (base_dir or Path()) / path):
        if os.path.isfile(candidate):
            return str(candidate.resolve())
    raise error_at("rpc.key_file", f"there is no file {shown(path)}; make one with python -m hbserve.rpc.cluster_key")


# --- keys and types, with messages of ours ---------------------------------------------------------


def _check_keys(document: dict[str, Any]) -> None:
    """Refuse unknown keys before types are checked: msgspec would not name the nearest valid key."""

    def check(section: type[msgspec.Struct], values: Any, prefix: str) -> None:
        if section is ModelConfig and isinstance(values, str):
            raise error_at("model", f"is a section; write it as {{path: {shown(values)}}}")
        if not isinstance(values, dict):
            return  # a wrong type: msgspec's message is right
        fields = types_of(section)
        for key, value in values.items():
            if key not in fields:
                name = key if isinstance(key, str) else shown(key)
                raise error_at(
                    f"{prefix}{name}"[:_MAX_KEY_LENGTH], f"unknown key{unknown_name(name, list(fields), str)}"
                )
            if isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
                raise error_at(f"{prefix}{key}", f"must be below 2**{_MAX_INT_BITS}, got {shown(value)}")
            inner = section_in(fields[key])
            if inner is not None:
                check(inner, value, f"{prefix}{key}.")

    check(Config, document, "")
    instances = document.get("gpu_instances")
    for index, values in enumerate(instances if isinstance(instances, list) else ()):
        check(InstanceConfig, values, f"gpu_instances[{index}].")


def _from_msgspec(error: msgspec.ValidationError, values: Any, prefix: str = "") -> ConfigError:
    """Turn ``Expected `int` >= 1 - at `$.rpc.port` `` into ``rpc.port: must be in 1..65535, got 0``.

    Args:
        values: plain data that could not be converted.
        prefix: key of these data in the configuration.
    """
    what, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    key = prefix + path
    if what.startswith("Invalid enum value"):
        wrong = what.partition(" value ")[2].strip("'")
        return error_at(key, f"unknown value {shown(wrong)}{nearest(wrong, _words_at(key))}")
    if re.match(r"Expected `\w+` ([<>]=? |matching |of length )", what):
        limits = [member for member in _types_at(key) if isinstance(member, msgspec.Meta)]
        limit = limits[0] if key.endswith("]") else limits[-1]  # of an item, or of the value itself
        for part in re.findall(r"[^.\[\]]+", path):
            values = values[int(part)] if isinstance(values, list | tuple) else values[part]
        return error_at(key, f"must be {limit.description}, got {shown(values)}")
    missing = re.fullmatch(r"Object missing required field `(\w+)`", what)
    if missing is not None:
        return error_at(key, f"add the key {missing[1]}, which has no default")
    found = re.fullmatch(r"Expected `object(?: \| null)?`, got `(\w+)`", what)
    if found is not None:
        keys = ", ".join(types_of(_section_at(key)))
        return error_at(key, f"must be a section with keys of its own ({keys}), got {found[1]}")
    return error_at(key, what.replace("`", ""))


def _section_at(key: str) -> type:
    """Return the class of a key that is a section."""
    return next(part for part in _types_at(key) if isinstance(part, type) and issubclass(part, msgspec.Struct))


def _words_at(key: str) -> list[str]:
    """Return the valid values of a key that takes one of a few words."""
    words: list[Any] = []
    for kind in _types_at(key):
        words += list(kind) if isinstance(kind, type) and issubclass(kind, Enum) else []
        words += get_args(kind) if get_origin(kind) is Literal else []
    return [str(word) for word in words]


def _types_at(key: str) -> list[Any]:
    """Return the type of a key with its parts; see `parts_of`."""
    kind: Any = Config
    for name in re.sub(r"\[[^]]*\]", "", key).split("."):
        struct = next(part for part in parts_of(kind) if isinstance(part, type) and issubclass(part, msgspec.Struct))
        kind = types_of(struct)[name]
    return parts_of(kind)
